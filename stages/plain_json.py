"""JSON of files that may be damaged: every problem is a ValueError. Also digests of JSON values."""

import hashlib
import json
from typing import Any


def parse(content: str | bytes) -> Any:
    """Return the value of a JSON text; bytes are UTF-8.

    Raises:
        ValueError: not JSON, not UTF-8, nested too deep, or a number of more than 4,300 digits.
    """
    try:
        return json.loads(content if isinstance(content, str) else content.decode())
    except RecursionError:
        raise ValueError("nested too deep") from None


def parse_object(content: str | bytes) -> dict[str, Any]:
    """Return the object of a JSON text.

    Raises:
        ValueError: see `parse`; or it is not an object.
    """
    value = parse(content)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return value


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's JSON text with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
