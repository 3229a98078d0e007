"""What a user can fix."""


class UserError(ValueError):
    """Something the user can fix; the message is a sentence that says what was given and what to do."""


class DivergedError(UserError, FloatingPointError):
    """Training led to weights that are not finite."""
