"""Train the three-or-seven network; the same as the command lit-threeseven."""

from lit_threeseven.run.cli import main

if __name__ == "__main__":
    main()
