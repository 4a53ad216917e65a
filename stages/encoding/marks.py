"""Marks that say whether a turn is trained on, in the spellings of various trainers."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sstoken.stages.encoding.column_names import words_of
from sstoken.stages.encoding.messages import BadRow, NeedsDecision

TURN_MARKS = ("weight", "loss_weight", "train", "training", "trainable", "loss", "loss_mask", "mask")
"""Message keys of OpenAI and SlimOrca, LLaMA-Factory, Axolotl, ..., XTuner and ms-swift."""
ROW_MARKS = ("loss_weights", "turn_weights", "train_mask", "weights", "sample_weight", *TURN_MARKS)
"""Columns with a list of marks, one per message, or one mark for the row."""
PROMPTS_TOO = ("train_on_input", "train_on_inputs", "train_on_prompt")
"""Columns that say whether the prompt is trained on too."""
_UNKNOWN_SENSE = "mask"
"""In some datasets 1 means trained on, in others masked out; the marks of user turns tell which."""
_WORDS = {"true": True, "yes": True, "false": False, "no": False}
_OF_TRAINING = ("train", "learn", "loss")
_LIKE_MARKS = (*_OF_TRAINING, "mask", "unmask", "weight", "supervis", "ignor", "skip")
"""How words begin in the names of other marks, such as `train_on_turn`, `loss_scale` and `masked`."""


def _read_mark(value: Any, name: str, where: str) -> bool:
    """Return whether a mark says that its turn is trained on; refuse weights between 0 and 1."""
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower(), value)
    if not isinstance(value, bool | int | float):
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise BadRow("unclear mark", f"{where}: {name} is {str(value)[:40]!r}, neither 0 nor 1") from None
    if value not in (0, 1):
        raise BadRow(
            "fractional weight",
            f"{where}: {name} is {value}; a turn is trained on or not, so make it 0 or 1, or leave the weights "
            f"out with --ignore-column {name}",
        )
    return bool(value)


def turn_marks(turns: Sequence[Mapping[str, Any]], answers: Sequence[bool]) -> list[bool]:
    """Return whether each turn is trained on, according to its own marks; `answers` are the assistant's turns.

    Raises:
        BadRow: not a mark, a weight other than 0 and 1, an ambiguous mark, or one of only part of a message.
    """
    trained = [True] * len(turns)
    for name in TURN_MARKS:
        if not any(name in turn for turn in turns):
            continue
        marks = [
            None if turn.get(name) is None else _read_mark(turn[name], name, f"message {number}")
            for number, turn in enumerate(turns, 1)
        ]
        trained = [t and m is not False for t, m in zip(trained, _trained(name, marks, answers), strict=True)]
    if any(turn.get("train_detail") for turn in turns):
        raise BadRow(
            "unclear mark",
            "train_detail marks parts of a message, which is not supported; leave it out with --ignore-column "
            "train_detail",
        )
    return trained


def count_marked(turns: Sequence[Mapping[str, Any]], answers: Sequence[bool]) -> int:
    """Return how many turns that are not answers are marked as trained on."""
    names = set(TURN_MARKS) - {_UNKNOWN_SENSE}
    marked = (any(turn.get(n) in (True, "true") for n in names) for turn in turns)  # 1 == True
    return sum(m and not answer for m, answer in zip(marked, answers, strict=True))


def list_marks(value: list[Any], name: str, answers: Sequence[bool]) -> list[bool]:
    """Return whether each turn is trained on, according to a column with a mark per message or per answer.

    Raises:
        BadRow: as `turn_marks`; or the list has another length.
    """
    marks: list[bool | None] = [_read_mark(mark, name, f"column {name}") for mark in value]
    if len(marks) == sum(answers) != len(answers):
        rest = iter(marks)
        marks = [next(rest) if answer else None for answer in answers]
    if len(marks) != len(answers):
        raise BadRow("unclear mark", f"column {name} has {len(marks)} marks for {len(answers)} messages")
    return [mark is not False for mark in _trained(name, marks, answers)]


def row_mark(value: Any, name: str) -> bool:
    """Return whether a row is trained on, by a column with one mark for the row.

    A value that is not a mark, such as the row's loss, marks nothing.

    Raises:
        BadRow: a weight other than 0 and 1, which is not supported.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in ("weight", "loss_weight", "sample_weight") and is_number:
        return _read_mark(value, name, "column")
    try:
        return name == _UNKNOWN_SENSE or _read_mark(value, name, "column")
    except BadRow:
        return True


def refuse_unknown_marks(values: Iterable[tuple[str, str, Any]], lengths: Collection[int]) -> None:
    """Refuse keys and columns that look like marks and are none that this module knows.

    Args:
        values: as for `check_unused`.
        lengths: how many marks a column may hold: one per turn, or one per answer.

    Raises:
        NeedsDecision: a mark of unknown sense.
    """
    for shown, name, value in values:
        of_turns = shown != name
        marks = value if isinstance(value, list) else [value]
        fits = of_turns or isinstance(value, bool) or (isinstance(value, list) and len(marks) in lengths)
        beginnings = _OF_TRAINING if isinstance(value, bool) else _LIKE_MARKS
        if not fits or not any(word.startswith(beginnings) for word in words_of(name)):
            continue
        if all(isinstance(mark, bool) or mark in (0, 1) or str(mark).lower() in _WORDS for mark in marks):
            raise NeedsDecision(
                "unclear mark",
                f"{shown} seems to say what is trained on; name it {'train' if of_turns else 'loss_mask'} (true: "
                f"trained), or leave it out with --ignore-column {name}",
            )


def _trained(name: str, marks: list[bool | None], answers: Sequence[bool]) -> list[bool | None]:
    """Return the marks with True meaning trained on."""
    if name != _UNKNOWN_SENSE or all(mark is None for mark in marks):
        return marks
    others = {mark for mark, answer in zip(marks, answers, strict=True) if not answer and mark is not None}
    if len(others) != 1:
        raise BadRow(
            "unclear mark",
            f"whether {name} 1 means trained or masked out is ambiguous; name it loss_mask (1: trained), or leave "
            f"it out with --ignore-column {name}",
        )
    (untrained,) = others
    return [None if mark is None else mark is not untrained for mark in marks]
