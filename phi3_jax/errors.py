"""The errors that a user can mend."""


class UserError(ValueError):
    """Something that the caller gave cannot be used; the message says what it is and what to do."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message says what is wrong with it and what to do."""
