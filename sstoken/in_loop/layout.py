"""The earlier home of `find_segments`; import it from `sstoken`."""

from sstoken.in_loop.response_tokens import find_segments

__all__ = ["find_segments"]
