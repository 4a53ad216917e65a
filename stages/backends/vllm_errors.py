"""Errors inside vLLM's processes."""

from sstoken.errors import in_one_line


class EngineError(Exception):
    """vLLM cannot do what was requested; the message is one line."""


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, with its type unless it is an `EngineError`."""
    errors = getattr(error, "errors", None)
    if callable(errors):  # pydantic's first line is only the number of errors
        return in_one_line(errors()[0]["msg"], 400)
    text = in_one_line(error, 400)
    return text if isinstance(error, EngineError) else f"{type(error).__name__}: {text}"
