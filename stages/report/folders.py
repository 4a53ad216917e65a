"""Open the folders of a report: masked or tokens folders, with every signal recorded for their tokens.

Only one shard is in memory at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sstoken.errors import SstokenError, UsageError
from sstoken.signals import get_signal, is_signal
from sstoken.stages import joins, tables
from sstoken.stages import manifest as manifests
from sstoken.stages.folders import is_finished
from sstoken.stages.report.shards import OpenedFolder, Shard, read_shard

KINDS = ("masked", "tokens")


@dataclass(frozen=True)
class SignalFacts:
    """A signal that the report shows."""

    key: str
    """`score`, `rel`, `attention`, or `CHECKPOINT.SIGNAL`."""
    label: str
    unit: str
    meaning: str
    signed: bool
    """Whether zero is the middle of its scale."""
    checkpoint: str | None = None


SCORE = SignalFacts(
    "score", "score", "", "what the method ranks tokens by; higher is kept first", signed=False
)


@dataclass
class Folders:
    """The folders of one report: the first, others of the same tokens, and the scores of those tokens."""

    all: list[OpenedFolder]
    scores: dict[str, Path] = field(default_factory=dict)
    """Folders of scores by checkpoint."""
    notes: list[str] = field(default_factory=list)
    """One line for each thing that is not shown, with the reason."""

    @property
    def first(self) -> OpenedFolder:
        """The folder whose rows the report counts."""
        return self.all[0]

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer that made the tokens."""
        return self.first.path / "tokenizer"

    def signals(self) -> list[SignalFacts]:
        """Return the score and every signal that a shard may have, the folder's own first."""
        found = [SCORE]
        if self.first.kind == "masked" and "rel" in self.first.columns:
            layer = self.first.facts.get("layer")
            label = "prompt attention" if layer is None else f"prompt attention (layer {layer})"
            fallen = "history loss minus current loss: how much the loss has fallen"
            to_prompt = "share of the token's attention that goes to the prompt"
            found += [
                SignalFacts("rel", "REL", "nats", fallen, signed=True),
                SignalFacts("attention", label, "share", to_prompt, signed=False),
            ]
        for checkpoint, folder in self.scores.items():
            for name in tables.columns(tables.parts(folder)[0]):
                if is_signal(name):
                    s = get_signal(name)
                    label = "prompt attention" if name == "attention" else name.replace("_", " ")
                    key, label, signed = f"{checkpoint}.{name}", f"{label}, {checkpoint}", s.low < 0 < s.high
                    found.append(SignalFacts(key, label, s.unit, s.meaning, signed, checkpoint))
        return found

    def shards(self, wanted: Sequence[int] | None = None) -> Iterator[Shard]:
        """Yield the shards in order; with `wanted` rows, only shards with at least one of them."""
        first_row = 0
        rows = None if wanted is None else np.array(sorted(wanted))
        for part in tables.parts(self.first.path):
            after = first_row + tables.num_rows(part)
            if rows is None or np.searchsorted(rows, first_row) < np.searchsorted(rows, after):
                yield read_shard(part, first_row, self.first, self.all[1:], self.scores)
            first_row = after


def open_folders(named: Mapping[str, Path], scores: Sequence[Path] = ()) -> Folders:
    """Check one masked or tokens folder, or several masked folders of the same tokens, and find their scores.

    Without `scores`, which `score` wrote, use those in `scores/` beside the first folder that match.

    Raises:
        UsageError: no folder, or a folder does not exist or is of another kind, or several are not all masked.
        SstokenError: a folder is unfinished, damaged, or has other tokens.
    """
    if not named:
        raise UsageError("no folder given; name a masked folder (select) or a tokens folder (encode)")
    opened = [_open(name, path) for name, path in named.items()]
    first = opened[0]
    for each in opened if len(opened) > 1 else ():
        if each.kind != "masked":
            raise UsageError(f"{each.path}: a tokens folder; only masked folders can be shown side by side")
    for each in opened[1:]:
        if each.fingerprint != first.fingerprint:
            raise SstokenError(
                f"{each.path}: made from other tokens than {first.path}; compare selections of the same tokens"
            )
    folders = Folders(opened)
    if first.lean and first.kind == "masked":
        folders.notes.append(
            "A lean dataset: it does not record which tokens belong to the response, so dropped tokens look "
            "like prompt."
        )
    _find_scores(folders, scores)
    return folders


def _open(name: str, path: Path) -> OpenedFolder:
    what = "name a masked folder (select) or a tokens folder (encode)"
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; {what}")
    manifest = manifests.finished(path, "masked dataset")
    parts = tables.parts(path)
    facts = tables.read_metadata(parts[0]) if parts else {}
    if facts.get("kind") not in KINDS:
        kind = facts.get("kind") or manifest.stage
        raise UsageError(f"{path}: a folder of {kind}; {what}")
    return OpenedFolder(name, path, facts["kind"], facts, manifest, tables.columns(parts[0]))


def _find_scores(folders: Folders, given: Sequence[Path]) -> None:
    """Find the scores of these tokens; refuse other scores only if the user named them."""
    beside = folders.first.path.absolute().parent / "scores"
    places = list(given) or ([beside] if beside.is_dir() else [])
    found = [
        each
        for place in places
        for each in ([place] if is_finished(place) else sorted(place.iterdir() if place.is_dir() else ()))
        if is_finished(each) and tables.parts(each)
    ]
    if given and not found:
        raise UsageError(f"{given[0]}: no scores there; name what score wrote")
    for folder in sorted(found, key=_natural):
        facts = tables.read_metadata(tables.parts(folder)[0])
        fits = facts.get("kind") == "scores" and _same_tokens(folders.first, folder)
        if fits:
            folders.scores[folder.name] = folder
        elif given:
            raise SstokenError(f"{folder}: not the scores of the tokens in {folders.first.path}")
        else:
            folders.notes.append(f"Not shown: {folder.name} in scores/ holds other tokens' scores.")


def _same_tokens(first: OpenedFolder, scores: Path) -> bool:
    """Return whether scores were measured on these tokens; of older versions' scores, that is unknown."""
    parts = tables.parts(scores)
    return bool(
        all(joins.TOKENS in tables.read_metadata(path) for path in parts)
        and joins.folder_fingerprint(scores) == first.fingerprint
        and {path.name for path in tables.parts(first.path)} <= {path.name for path in parts}
    )


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key that puts `base` before `step-9` before `step-10`."""
    pieces = path.name.replace("-", " ").replace("_", " ").split()
    return [(1, int(piece), "") if piece.isdigit() else (0, 0, piece) for piece in pieces]
