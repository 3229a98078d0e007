"""The command line of `fit`, `validate`, `test` and `predict`. The network itself doesn't need it."""
