"""Whether a generated answer is right: what the stage `critical` asks about each.

A checker is a function `check(answer, reference) -> bool` of two texts without special tokens: what the model said, and
the response of the dataset. `CHECKERS` holds ours; any other is named as `module:function`.
"""

import importlib
import os
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError, UsageError

Check = Callable[[str, str], Any]
_MARK = "####"
_NUMBER = re.compile(r"(?:(?<![0-9])-)?[0-9][0-9,]*(?:\.[0-9]+)?|(?:(?<![0-9])-)?\.[0-9]+")


class CheckerError(SstokenError):
    """A checker raised, or gave something else than True or False."""


def final_number(answer: str, reference: str) -> bool:
    """Whether both end in the same number: the first after the last `####`; without that mark, the last of the text.

    Commas between digits do not matter, and 18 is 18.0. A reference without a number accepts nothing.
    """
    expected = _final_number(reference)
    return expected is not None and _final_number(answer) == expected


def exact(answer: str, reference: str) -> bool:
    """Whether both are the same text, but for white space at the ends."""
    return answer.strip() == reference.strip()


CHECKERS: dict[str, Check] = {"final-number": final_number, "exact": exact}


class Checker:
    """A checker by name; it pickles as its name."""

    def __init__(self, name: str) -> None:
        """Find it.

        Args:
            name: of `CHECKERS`, or `module:function`, found as Python finds modules and in the working directory.

        Raises:
            UsageError: there is none; says why it does not import.
        """
        self.name = name
        self._check = CHECKERS.get(name) or _imported(name)

    def __reduce__(self) -> tuple[type["Checker"], tuple[str]]:
        """Each process finds it anew."""
        return Checker, (self.name,)

    def __call__(self, answer: str, reference: str) -> bool:
        """Whether the answer is right.

        Raises:
            CheckerError: the checker raised, or gave something else; one line.
        """
        try:
            verdict = self._check(answer, reference)
        except Exception as error:  # it is somebody else's code
            text = " ".join(str(error).split())[:200]
            raise CheckerError(f"checker {self.name} raised {type(error).__name__}: {text}") from error
        if not isinstance(verdict, bool) and type(verdict).__name__ != "bool":  # numpy's
            raise CheckerError(f"checker {self.name} gave {verdict!r:.100}; legal is True or False")
        return bool(verdict)

    @property
    def source(self) -> Path | None:
        """The file that defines it; None: one of ours, or not in a file."""
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
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the module does when it is imported
        text = " ".join(str(error).split())[:200]
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
