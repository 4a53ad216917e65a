"""Say in plain English what pydantic wants a value to be."""

from collections.abc import Mapping
from typing import Any

_BOUNDS = {
    "greater_than_equal": ("ge", "legal is {} or more"),
    "greater_than": ("gt", "legal is more than {}"),
    "less_than_equal": ("le", "legal is {} or less"),
    "less_than": ("lt", "legal is less than {}"),
}
_KINDS = {
    "int": "it has to be a whole number",
    "float": "it has to be a number, such as 0.5",
    "finite_number": "it has to be a finite number",
    "bool": "it has to be true or false",
    "string": "it has to be text",
    "tuple": "it has to be a list",
    "list": "it has to be a list",
    "dict": "it has to be a mapping of names to values",
}


def has_to_be(error: Mapping[str, Any]) -> str:
    """Return what an error of pydantic's asks for, such as `legal is 1 or more`."""
    kind = str(error["type"])
    if kind in _BOUNDS:
        name, text = _BOUNDS[kind]
        return text.format(error["ctx"][name])
    told = _KINDS.get(kind) or _KINDS.get(kind.partition("_")[0])
    message = str(error["msg"]).removeprefix("Value error, ")
    return told or message[:1].lower() + message[1:]
