"""JSON with nothing lost: integers of any size, and a key that stands twice is an error."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from sstoken.stages.encoding.messages import BadRow

MAX_ELEMENT = 256 << 20
"""Longest element of an array, in characters; a longer one is an error rather than a machine out of memory."""
_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


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
    """`value`, parsed where it is a string that starts like JSON and is; columns often hold JSON as text.

    Raises:
        BadRow: an object in it has a key twice.
    """
    if isinstance(value, str) and value.lstrip()[:1] in tuple(opening):
        try:
            return parse_json(value)
        except DuplicateKeyError as error:
            raise BadRow("duplicate key", str(error)) from error
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
_PLAIN = json.JSONDecoder(parse_int=str, parse_float=str)
"""Finds where a value ends that `DECODER` refuses."""


def elements(stream: Any) -> Iterator[tuple[Any, tuple[str, str] | None]]:
    """The elements of one JSON array, read as they are asked for.

    Args:
        stream: binary, UTF-8, with or without a byte order mark.

    Yields:
        An element's value, or None and what is wrong with it (an element that is JSON and still cannot be held).

    Raises:
        ValueError: the text is no JSON array, from the element on that was to be next.
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
    """The part of a text that is looked at, and a place in it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogatepass").decode
        self._text = ""
        self._ended = False
        self.at = 0
        self._more()
        self._text = self._text.removeprefix("\ufeff")

    def next_sign(self) -> str:
        """The next character that is no space, without passing it; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self._text) or self._ended:
                return self._text[self.at : self.at + 1]
            self._more()

    def element(self) -> tuple[Any, tuple[str, str] | None]:
        """Read one value and pass it."""
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
                # At the end of what was read, `1`, `1.` and `1e+` may be the beginning of a number.
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
        """Drop what is behind and read on, the more the longer the element is."""
        self._text = self._text[self.at :]
        self.at = 0
        data = self._stream.read(max(_CHUNK, len(self._text)))
        self._ended = not data
        self._text += self._decode(data, not data)
