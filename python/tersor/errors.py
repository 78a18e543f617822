"""The one error that a user is meant to read."""


class TersorError(ValueError):
    """Bad input: the message names the cause and the fix, on one line."""
