"""Train the three-or-seven network; the same as the command lit-threeseven."""

from lit_threeseven.__main__ import main

if __name__ == "__main__":
    main()
