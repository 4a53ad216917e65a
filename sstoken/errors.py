"""The two kinds of error a user can cause. Anything else that escapes is a defect of ours."""


class SstokenError(Exception):
    """The work failed: one line that says what was given, what is legal and what to do. Exit code 1."""

    exit_code = 1


class UsageError(SstokenError, ValueError):
    """The request itself is wrong (a value out of range, a path that is not there). Exit code 2."""

    exit_code = 2


class NothingLeftError(SstokenError):
    """The work came to its end, and there is nothing in it to go on from: the data has to change, or the settings."""
