"""Stage `observed`: turn losses recorded during in-loop training into scores, without another pass over the data."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sstoken.errors import SstokenError
from sstoken.in_loop.observation import example_key
from sstoken.stages import joins, tables
from sstoken.stages.scores_file import summarize_scores, write_scores
from sstoken.stages.stage import BY_CONTENT, Context, Stage
from sstoken.stages.training.observed_losses import PATTERN, Seen, SeenExamples


class Observed(Stage):
    """Reads `tokens` and what `ObservedLosses` recorded; writes row-aligned shards as `score` does.

    A token's loss is the one measured when training last saw its example.
    """

    name: ClassVar[str] = "observed"
    folder: ClassVar[str] = "scores"

    recorded: Annotated[str, BY_CONTENT]
    """The folder given to `ObservedLosses`."""
    attention: bool = True
    """Write prompt attention, too; training measures it unless gamma is 1."""

    def check(self) -> None:
        """Refuse a folder without recorded losses."""
        with SeenExamples(Path(self.recorded)):
            pass

    def sources(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        """Identify the recorded files."""
        return {path.name: digest(path) for path in sorted(Path(self.recorded).glob(PATTERN))}

    def run(self, context: Context) -> dict[str, Any]:
        """Write the shards that do not exist yet."""
        token_parts = tables.parts(context.inputs["tokens"])
        with (
            SeenExamples(Path(self.recorded)) as seen,
            context.progress("shards", len(token_parts)) as progress,
        ):
            for part in token_parts:
                if not tables.is_sound(context.out / part.name):
                    self._write_shard(part, seen, context.out / part.name, context.fingerprint)
                progress.advance()
        return summarize_scores(context.out, self._checkpoint)

    @property
    def _checkpoint(self) -> str:
        return f"observed in training ({Path(self.recorded).name})"

    def _write_shard(self, part: Path, seen: SeenExamples, out: Path, run: str) -> None:
        table = tables.read_table(part)
        example_ids = table["example_id"].to_pylist()
        rows: list[Seen] = []
        missing: list[str] = []
        for example_id, ids, mask in zip(
            example_ids, tables.rows(table["input_ids"]), tables.rows(table["response_mask"]), strict=True
        ):
            empty = np.full(ids.size, np.nan, np.float32)
            found = seen.last(example_key(ids, mask)) if mask.any() else Seen(0, empty, empty)
            if found is None:
                missing.append(example_id)
            elif self.attention and found.attention is None:
                raise SstokenError(
                    f"{self.recorded}: no attention was measured (gamma was 1); set attention=False, and use another "
                    "checkpoint's attention"
                )
            else:
                rows.append(found)
        if missing:
            raise SstokenError(
                f"{part}: {len(missing)} of {len(example_ids)} examples were not trained on in full (first: "
                f"{missing[0]!r}); train at least one epoch on all of them, with a max_length that cuts none"
            )
        offsets = tables.flatten(table["input_ids"])[1]
        response = tables.flatten(table["response_mask"])[0].astype(bool)
        signals = {"loss": _flat([row.loss for row in rows])[response]}
        if self.attention:
            signals["attention"] = _flat([row.attention for row in rows])[response]
        provenance = {
            "checkpoint": self._checkpoint,
            "layer": None,
            "dtype": "as trained",
            joins.TOKENS: joins.measured_fingerprint(part, table),
            joins.RUN: run,
        }
        write_scores(out, example_ids, offsets, response, signals, provenance)


def _flat(rows: list[Any]) -> NDArray[np.float32]:
    return np.concatenate([np.zeros(0, np.float32), *rows])
