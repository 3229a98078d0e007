"""``python -m lit_threeseven`` is the command ``lit-threeseven``."""

from lit_threeseven.run.cli import main

main()
