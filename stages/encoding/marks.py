"""Marks on turns that say whether a trainer learns from them, as the trainers write them."""

from collections.abc import Mapping, Sequence
from typing import Any

from sstoken.stages.encoding.messages import BadRow

TURN_MARKS = ("weight", "loss_weight", "train", "training", "trainable", "loss", "loss_mask", "mask")
"""Keys of a message: OpenAI and SlimOrca, LLaMA-Factory, Axolotl, ..., XTuner and ms-swift."""
ROW_MARKS = ("loss_weights", "turn_weights", "train_mask", "weights", "sample_weight", *TURN_MARKS)
"""Columns: a list with a mark for each message, or one mark for the whole row."""
PROMPTS_TOO = ("train_on_input", "train_on_inputs", "train_on_prompt")
"""Columns that say whether the prompt is trained on as well."""
_UNKNOWN_SENSE = "mask"
"""In some data 1 means trained, in other data masked out; the turns of the user tell which."""
_WORDS = {"true": True, "yes": True, "false": False, "no": False}


def read_mark(value: Any, name: str, where: str) -> bool:
    """Whether the mark says that the turn is trained on.

    Raises:
        BadRow: a weight between (or beyond) 0 and 1: a token is trained on or not; or no mark at all.
    """
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
    """Whether each turn is trained on by the marks that it carries itself.

    Args:
        turns: the row's messages.
        answers: which of them are the assistant's.

    Raises:
        BadRow: as `read_mark`; a mark whose sense is not known; a mark on part of a message.
    """
    trained = [True] * len(turns)
    for name in TURN_MARKS:
        if not any(name in turn for turn in turns):
            continue
        marks = [
            None if turn.get(name) is None else read_mark(turn[name], name, f"message {number}")
            for number, turn in enumerate(turns, 1)
        ]
        trained = [t and m is not False for t, m in zip(trained, _trained(name, marks, answers), strict=True)]
    if any(turn.get("train_detail") for turn in turns):
        raise BadRow(
            "unclear mark",
            "train_detail marks parts of a message, which cannot be honoured; leave it out with --ignore-column "
            "train_detail",
        )
    return trained


def count_marked(turns: Sequence[Mapping[str, Any]], answers: Sequence[bool]) -> int:
    """How many turns that are no answers are marked as to be trained on."""
    names = set(TURN_MARKS) - {_UNKNOWN_SENSE}
    marked = (any(turn.get(n) in (True, "true") for n in names) for turn in turns)  # 1 is True, too
    return sum(m and not answer for m, answer in zip(marked, answers, strict=True))


def list_marks(value: Any, name: str, answers: Sequence[bool]) -> list[bool]:
    """Whether each turn is trained on by a column that holds a mark for each message, or for each answer.

    Raises:
        BadRow: as `read_mark`; a list of another length.
    """
    marks: list[bool | None] = [read_mark(mark, name, f"column {name}") for mark in value]
    if len(marks) == sum(answers) != len(answers):
        rest = iter(marks)
        marks = [next(rest) if answer else None for answer in answers]
    if len(marks) != len(answers):
        raise BadRow("unclear mark", f"column {name} has {len(marks)} marks for {len(answers)} messages")
    return [mark is not False for mark in _trained(name, marks, answers)]


def row_mark(value: Any, name: str) -> bool:
    """Whether a row is trained on by a column that holds one mark for all of it.

    A value that is no mark (the loss of a row, say) marks nothing.

    Raises:
        BadRow: a weight between or beyond 0 and 1, which cannot be honoured.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in ("weight", "loss_weight", "sample_weight") and is_number:
        return read_mark(value, name, "column")
    try:
        return name == _UNKNOWN_SENSE or read_mark(value, name, "column")
    except BadRow:
        return True


def _trained(name: str, marks: list[bool | None], answers: Sequence[bool]) -> list[bool | None]:
    """The marks, where True means trained on."""
    if name != _UNKNOWN_SENSE or all(mark is None for mark in marks):
        return marks
    others = {mark for mark, answer in zip(marks, answers, strict=True) if not answer and mark is not None}
    if len(others) != 1:
        raise BadRow(
            "unclear mark",
            f"whether {name} 1 means trained or masked out cannot be told; name it loss_mask (1: trained), or leave "
            f"it out with --ignore-column {name}",
        )
    (untrained,) = others
    return [None if mark is None else mark is not untrained for mark in marks]
