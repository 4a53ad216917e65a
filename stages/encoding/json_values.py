"""JSON with nothing lost: integers of any size, and a key that stands twice is an error."""

import json
from typing import Any


class DuplicateKeyError(ValueError):
    """An object has a key twice; every parser would keep one of the two values and drop the other."""


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    NaN and the infinities are let through as Python reads them; `check_text` refuses them where they are used.

    Raises:
        DuplicateKeyError: naming the key.
        ValueError, RecursionError: not JSON, a number of over 4,300 digits, nested too deep.
    """
    return DECODER.decode(text)


def json_or_text(value: Any, opening: str = "[") -> Any:
    """`value`, parsed where it is a string that starts like JSON and is; columns often hold JSON as text."""
    if isinstance(value, str) and value.lstrip()[:1] in tuple(opening):
        try:
            return parse_json(value)
        except DuplicateKeyError:
            raise
        except (ValueError, RecursionError):
            return value
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKeyError(
            f"the key {next(n for n in names if names.count(n) > 1)!r} stands there twice"
        )
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object)
