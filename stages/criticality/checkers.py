"""Checkers decide whether a generated answer is right.

A checker is a function `check(answer, reference) -> bool` of two texts without special tokens: the model's answer and
the dataset's response. `CHECKERS` holds ours; others are given as `module:function`.
"""

import os
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from sstoken.errors import SstokenError, UsageError, in_one_line

Check = Callable[[str, str], Any]
_MARK = "####"
_NUMBER = re.compile(r"(?:(?<![0-9])-)?[0-9][0-9,]*(?:\.[0-9]+)?|(?:(?<![0-9])-)?\.[0-9]+")


class CheckerError(SstokenError):
    """A checker raised an exception, or returned neither True nor False."""


def final_number(answer: str, reference: str) -> bool:
    """Compare final numbers: the first after the last `####`, or without that mark, the last number of the text.

    Commas between digits are ignored, and 18 equals 18.0. A reference without a number accepts nothing.
    """
    expected = _final_number(reference)
    return expected is not None and _final_number(answer) == expected


def exact(answer: str, reference: str) -> bool:
    """Compare the texts, ignoring whitespace at both ends."""
    return answer.strip() == reference.strip()


CHECKERS: dict[str, Check] = {"final-number": final_number, "exact": exact}


class Checker:
    """A checker by name. Pickles as its name."""

    def __init__(self, name: str) -> None:
        """Find the checker: a key of `CHECKERS`, or `module:function`, from Python's path or the working directory.

        Raises:
            UsageError: there is none, or it does not import.
        """
        self.name = name
        self._check = CHECKERS.get(name) or _imported(name)

    def __reduce__(self) -> tuple[type["Checker"], tuple[str]]:
        """Pickle the name: each process imports the checker itself."""
        return Checker, (self.name,)

    def __call__(self, answer: str, reference: str) -> bool:
        """Return whether the answer is right.

        Raises:
            CheckerError: the checker raised an exception, or returned neither True nor False.
        """
        try:
            verdict = self._check(answer, reference)
        except Exception as error:  # a user's checker may raise anything
            text = in_one_line(error, 200)
            raise CheckerError(f"checker {self.name} raised {type(error).__name__}: {text}") from error
        if not isinstance(verdict, bool) and type(verdict).__name__ != "bool":  # numpy's
            raise CheckerError(f"checker {self.name} returned {verdict!r:.100}; legal: True or False")
        return bool(verdict)

    @property
    def source(self) -> Path | None:
        """The file that defines a user's checker; None for one of ours, or if there is no file."""
        if self.name in CHECKERS:
            return None
        module = sys.modules.get(self.name.partition(":")[0])
        file = getattr(module, "__file__", None)
        return Path(file) if file else None


def _final_number(text: str) -> Decimal | None:
    head, mark, tail = text.rpartition(_MARK)
    found = _NUMBER.findall(tail if mark else text)
    if not found:
        return None
    return Decimal(found[0 if mark else -1].replace(",", ""))


def _imported(name: str) -> Check:
    module, separator, attribute = name.partition(":")
    legal = f"legal: {', '.join(CHECKERS)}, or MODULE:FUNCTION"
    if not separator or not module or not attribute:
        raise UsageError(f"checker {name!r} is not known; {legal}")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        found: Any = resolve_name(name)
    except Exception as error:  # a user's module may raise anything on import
        text = in_one_line(error, 200)
        raise UsageError(
            f"checker {name!r} does not import ({type(error).__name__}: {text}); {legal}"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(found):
        raise UsageError(f"checker {name!r} is {type(found).__name__}, not a function; {legal}")
    check: Check = found
    return check
