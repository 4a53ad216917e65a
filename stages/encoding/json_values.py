"""JSON values. Parsing is lossless: numbers of any size, and duplicate keys are errors."""

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from sstoken.stages.encoding.messages import BadRow

MAX_ELEMENT = 256 << 20
"""The longest array element accepted, in characters; a longer one is an error rather than out of memory."""
_CHUNK = 1 << 20
_NOTHING = frozenset(("", "[]", "{}", "none", "null", "nan", "n/a", "na", "<noinput>", "nooutput"))
_SPACE = re.compile(r"[ \t\n\r]*")


class DuplicateKeyError(ValueError):
    """An object has a duplicate key; other parsers would silently drop one of the two values."""


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    NaN and infinities pass, as in Python's json; `check_text` refuses them where they are used.

    Raises:
        DuplicateKeyError: with the key.
        ValueError, RecursionError: not JSON, a number of more than 4,300 digits, or nested too deep.
    """
    return DECODER.decode(text)


def json_or_text(value: Any, opening: str = "[") -> Any:
    """Parse `value` if it is a string that starts like JSON and is valid; columns often hold JSON as text.

    Raises:
        BadRow: an object in it has a duplicate key.
    """
    if isinstance(value, str) and value.lstrip()[:1] in tuple(opening):
        try:
            return parse_json(value)
        except DuplicateKeyError as error:
            raise BadRow("duplicate key", str(error)) from error
        except (ValueError, RecursionError):
            return value
    return value


def turns_or_text(value: Any) -> Any:
    """Parse `value` if it is JSON text of turns; any other JSON text, such as an answer in JSON, stays text.

    Returns a list of turns for one turn and for an object with `messages`, and any other value as it is.
    """
    parsed = json_or_text(value, "[{")
    if isinstance(parsed, Mapping):
        parsed = parsed.get("messages", [parsed])
    if isinstance(value, str) and not (isinstance(parsed, list) and parsed and all(map(_is_turn, parsed))):
        return value
    return parsed


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and not value.keys().isdisjoint(("role", "from"))


def says_something(value: Any) -> bool:
    """Return whether a value is not empty, in any of the usual spellings of empty."""
    if isinstance(value, str):
        return value.strip().lower() not in _NOTHING
    if isinstance(value, Mapping | list | tuple):
        return any(says_something(v) for v in (value.values() if isinstance(value, Mapping) else value))
    return value is not None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKeyError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return value


def _number(text: str) -> Any:
    """Return the float that is printed as this number; a Decimal if none is, which `check_text` refuses."""
    number = float(text)
    if repr(number) == text:
        return number
    try:
        exact = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"the number {text[:40]} is out of range") from None
    # The shortest form, and the one of 17 digits that C and others print.
    return number if exact in (Decimal(repr(number)), Decimal(f"{number:.17g}")) else exact


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number)
_PLAIN = json.JSONDecoder(parse_int=str, parse_float=str)
"""Finds the end of a value that `DECODER` refuses."""


def elements(stream: Any) -> Iterator[tuple[Any, tuple[str, str] | None]]:
    """Yield the elements of one JSON array from a binary stream of UTF-8, with or without a byte order mark.

    Each is a value, or None and the problem, if the element is JSON that cannot be represented.

    Raises:
        ValueError: the text is not a JSON array, from the next element on.
        RecursionError: an element is nested too deep.
    """
    text = _Text(stream)
    if text.next_sign() != "[":
        raise ValueError("not a JSON array")
    text.at += 1
    while text.next_sign() != "]":
        yield text.element()
        if text.next_sign() == ",":
            text.at += 1
            if text.next_sign() == "]":
                raise ValueError("a comma before the closing bracket")
        elif text.next_sign() != "]":
            raise ValueError(
                f"{text.next_sign() or 'the end'!r} where a comma or the closing bracket should be"
            )
    text.at += 1
    if text.next_sign():
        raise ValueError("more text after the closing bracket")


class _Text:
    """A window onto the text, with a cursor."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogatepass").decode
        self._text = ""
        self._ended = False
        self.at = 0
        self._more()
        self._text = self._text.removeprefix("\ufeff")

    def next_sign(self) -> str:
        """Return the next character that is not whitespace without consuming it; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self._text) or self._ended:
                return self._text[self.at : self.at + 1]
            self._more()

    def element(self) -> tuple[Any, tuple[str, str] | None]:
        """Parse one value and move past it."""
        while True:
            problem = None
            try:
                try:
                    value, end = DECODER.raw_decode(self._text, self.at)
                except json.JSONDecodeError:
                    raise
                except ValueError as error:
                    reason = "duplicate key" if isinstance(error, DuplicateKeyError) else "broken JSON"
                    value, problem = None, (reason, str(error)[:100])
                    _, end = _PLAIN.raw_decode(self._text, self.at)
                # At the end of the window, `1`, `1.` and `1e+` may be the start of a longer number.
                rest = self._text[end : end + 4]
                if self._ended or len(rest) == 4 or rest[:1] in tuple(",] \t\n\r"):
                    self.at = end
                    return value, problem
            except json.JSONDecodeError as error:
                if self._ended or not (error.msg.startswith("Unterm") or error.pos > len(self._text) - 12):
                    raise
            if len(self._text) - self.at > MAX_ELEMENT:
                raise ValueError(f"an element of over {MAX_ELEMENT >> 20} MiB")
            self._more()

    def _more(self) -> None:
        """Drop text behind the cursor and read more; longer elements read larger blocks."""
        self._text = self._text[self.at :]
        self.at = 0
        data = self._stream.read(max(_CHUNK, len(self._text)))
        self._ended = not data
        self._text += self._decode(data, not data)
