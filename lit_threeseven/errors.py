"""The one exception that this package raises on purpose."""


class UserError(ValueError):
    """Something that the user can put right; the message is a sentence that says what was given and what to do.

    The command line prints the message alone, without a traceback.
    """
