"""The exceptions that this package raises on purpose."""

import signal


class UserError(ValueError):
    """Something that the user can put right; the message is a sentence that says what was given and what to do.

    The command line prints the message alone, without a traceback.
    """


class Stopped(SystemExit):
    """A training was asked to stop, and has saved all that it takes to go on.

    It ends the program with a sentence, unless it is caught.

    Args:
        signum: The signal that asked for it; 0 if another process got it.
        epochs: Epochs trained so far.
        checkpoint: File to go on from.
    """

    def __init__(self, signum: int, epochs: int, checkpoint: str) -> None:
        reason = {signal.SIGINT: "by Ctrl-C", signal.SIGTERM: "by SIGTERM"}.get(signum, "by a signal")
        super().__init__(
            f"Stopped {reason} after {epochs:,} epochs, which are saved. "
            f"To go on from there, give the same command and --ckpt_path {checkpoint}"
        )
        self.exit_code = 128 + (signum or signal.SIGTERM)
