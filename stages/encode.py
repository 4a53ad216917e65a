"""Stage `encode`: turn conversations in any common layout into token ids with a response mask.

Each shard of `shard_rows` input rows is read and encoded on its own, so the result does not depend on the number of
workers, and a run that resumes keeps the shards that are complete.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from sstoken.errors import NothingLeftError, SstokenError
from sstoken.stages import checkpoints, plain_json
from sstoken.stages.encoding import sources
from sstoken.stages.encoding.chat import EncoderOptions
from sstoken.stages.encoding.conversations import to_conversation
from sstoken.stages.encoding.layouts import Format, Layout, NoLayout, Preference, check_columns, detect_layout
from sstoken.stages.encoding.messages import (
    MAX_CHARS,
    BadRow,
    Losable,
    NeedsDecision,
    PassedOver,
    TrainedTurns,
)
from sstoken.stages.encoding.ranges import cut
from sstoken.stages.encoding.shards import (
    BAD_ROWS,
    EncodingSettings,
    Shard,
    encode_shard,
    keeps_bad_rows,
    save_tokenizer,
    stopped,
)
from sstoken.stages.encoding.templates import read_template, template_file
from sstoken.stages.encoding.token_stats import Stats, merge, metrics, no_stats
from sstoken.stages.sharded import ShardedStage, Work
from sstoken.stages.stage import BY_CONTENT, SPEED_ONLY, Context, Task
from sstoken.stages.tables import part_name, parts, read_metadata

_ROWS_TRIED = 100
"""Leading bad rows to read, at most, in search of a good one before any work starts."""


class Encode(ShardedStage):
    """Turn a dataset of conversations into token ids and response masks."""

    name: ClassVar[str] = "encode"
    folder: ClassVar[str] = "tokens"
    unit: ClassVar[str] = "rows"
    every_core: ClassVar[bool] = True

    data: Annotated[str, BY_CONTENT]
    """JSONL, JSON, Parquet or CSV (a file, a pattern, an s3:// or gs:// address), a folder written by
    save_to_disk, or a Hub dataset `user/name[:config][@revision]`."""
    model: Annotated[str, BY_CONTENT]
    """Checkpoint whose tokenizer and chat template are used: a folder, or a Hub id `user/name[@revision]`."""
    split: str | None = None
    """Split of a Hub dataset (default `train`) or of a saved DatasetDict."""
    format: Format = "auto"
    """How rows hold conversations; `auto` decides by the first row's columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column names that differ from the format's: `{question: prompt_text}`."""
    ignore_columns: tuple[str, ...] = ()
    """Columns, or keys of messages, to ignore although they look like part of the conversation."""
    preference: Preference = "stop"
    """What to do with preference data (DPO's chosen and rejected, KTO's labels): `stop` the run, or `take` the
    preferred answers as demonstrations."""
    max_length: Annotated[int | None, Field(ge=2)] = None
    """Longest example in tokens, at least 2; a longer one is cut at its end. Default: the tokenizer's own limit, or
    4096 if it declares none."""
    chat_template: Annotated[str | None, BY_CONTENT] = None
    """A Jinja file to use instead of the tokenizer's chat template, or `trl:NAME` for one of the installed TRL."""
    turns: TrainedTurns = "all"
    """Which assistant turns are trained: `all` in one example, the `last`, or `each` in an example of its own, shown as
    the model would see it at inference."""
    allow_lost: tuple[Losable, ...] = ()
    """What the chat template may drop from a row: reasoning, system, tools, tool_calls or content. A row that loses
    anything else is a bad row."""
    keep_special_tokens: bool = False
    """Take rows whose text contains special tokens, such as data to which a chat template was already applied."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do with a row that cannot be used: `stop` the run, or `skip` it, count it and list it in bad_rows/."""
    max_chars: Annotated[int, Field(ge=1)] = MAX_CHARS
    """Longest conversation in characters; a longer one is a bad row."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """Read only this many rows, from the first."""
    shard_rows: Annotated[int, Field(ge=1)] = 1000
    """Input rows per output shard: the unit of parallel work, and the most that a crash costs a worker."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint's tokenizer."""
    workers: Annotated[int | None, Field(ge=1), SPEED_ONLY] = None
    """Processes. Default: one per core; a single shard is encoded in the main process."""

    def check(self) -> None:
        """See `Stage.check`."""
        sources.locate(self.data, self.split)
        check_columns(self.format, self.columns)
        checkpoints.local_folder(self.model)
        self._template()

    def sources(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        """See `Stage.sources`."""
        return {
            "data": sources.data_identity(self.data, self.split, digest),
            "tokenizer": checkpoints.tokenizer_identity(self.model, digest),
            "chat_template": digest(template_file(self.chat_template)) if self.chat_template else None,
        }

    def work(self, context: Context) -> Work:
        """Write the tokenizer and return one task per `part-*.parquet` (schema `TOKENS`).

        Raises:
            SstokenError: the source or tokenizer fails to load, or none of the first rows can be used.
        """
        self.check()
        settings = EncodingSettings(
            model=self.model,
            trust_remote_code=self.trust_remote_code,
            options=EncoderOptions(
                self.max_length, self._template(), self.turns, self.allow_lost, self.keep_special_tokens
            ),
            layout=self._layout(),
            max_chars=self.max_chars,
            skip=self.on_bad_row == "skip",
            out=context.out,
            fingerprint=context.fingerprint,
        )
        save_tokenizer(settings)
        return Work(partial(encode_shard, settings), self._tasks(context.out), self.limit)

    def is_done(self, output: Path) -> bool:
        """See `ShardedStage.is_done`."""
        return super().is_done(output) and keeps_bad_rows(output)

    def finish(self, context: Context) -> dict[str, Any]:
        """Add up the shards' counts; refuse a result without examples."""
        total = no_stats()
        read_as: dict[str, Any] = {}
        for path in parts(context.out):
            about = read_metadata(path)
            total = merge(total, about["stats"])
            read_as = read_as or about.get("first_row", {})  # older shards have none
        if not total["examples"]:
            what = "raise --max-length" if total["dropped"] else _first_bad(context.out)
            raise NothingLeftError(
                f"{sources.shown(self.data)}: no example left of {total['rows']} rows ({_why(total)}); {what}"
            )
        return metrics(total) | {"read_as": read_as}

    def _template(self) -> str | None:
        return None if self.chat_template is None else read_template(self.chat_template)

    def _layout(self) -> Layout:
        """Return the dataset's layout, detected on its first row that parses.

        Reads on to the first row that makes a conversation: if it needs a decision by the user, so do others, and
        the run stops before any shard is written.
        """
        layout: Layout | None = None
        bad: Counter[str] = Counter()
        for row in islice(sources.open_rows(self.data, self.split), self.limit):
            try:
                layout = layout or self._layout_of(row.checked())
                to_conversation(row.checked(), layout, self.max_chars)
                return layout
            except (NeedsDecision, NoLayout) as error:
                raise SstokenError(f"{row.where}: {error}") from error
            except BadRow as problem:
                if self.on_bad_row == "stop" and not isinstance(problem, PassedOver):
                    raise stopped(row, problem) from problem
                bad[problem.reason] += 1
            if layout and bad.total() >= _ROWS_TRIED:
                return layout
        if layout:
            return layout
        raise SstokenError(f"{sources.shown(self.data)}: no row can be used ({_why({'bad_rows': bad})})")

    def _layout_of(self, row: Any) -> Layout:
        ignored = frozenset(self.ignore_columns)
        return detect_layout(row, self.format, self.columns, ignored, self.preference)

    def _tasks(self, out: Path) -> Iterator[Task[Shard]]:
        for index, ranges in enumerate(cut(self.data, self.split, self.shard_rows, self.limit)):
            yield Task(out / part_name(index), sum(rows.num_rows for rows in ranges), Shard(index, ranges))


def _first_bad(out: Path) -> str:
    """Say what is wrong with the first row that was skipped."""
    for path in sorted((out / BAD_ROWS).glob("*.jsonl")):
        bad = plain_json.parse(path.read_bytes().partition(b"\n")[0])
        return f"the first is row {bad['row']} of {bad['file']}: {bad['reason']} ({bad['detail']})"
    return "none can be trained on"


def _why(stats: Stats) -> str:
    counts = {"no response token within the maximal length": stats.get("dropped", 0)} | dict(
        stats["bad_rows"] | stats.get("passed_over", {})
    )
    return ", ".join(f"{n} x {reason}" for reason, n in counts.items() if n) or "none were read"
