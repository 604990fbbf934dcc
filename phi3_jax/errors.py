"""The error that a user can mend."""


class UserError(ValueError):
    """Something that the caller gave cannot be used; the message says what it is and what to do."""
