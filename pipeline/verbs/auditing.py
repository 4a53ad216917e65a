"""The verb `audit`: shows what would be trained, for any dataset."""

import json
from typing import Annotated, Any, Literal

import click
from pydantic import Field

from sstoken.errors import UsageError
from sstoken.pipeline.audit_screen import print_audit
from sstoken.pipeline.cli_options import Option
from sstoken.pipeline.saying import say
from sstoken.pipeline.verbs.command import Place, verb
from sstoken.stages.auditing.findings import AuditResult
from sstoken.stages.encoding.layouts import Format, Preference
from sstoken.stages.encoding.messages import Losable, TrainedTurns
from sstoken.stages.stage import Settings

__all__ = ["AuditResult", "audit"]


class AuditCall(Settings):
    """Show what would be trained, for raw conversations, a tokenised dataset, or a folder of a run.

    No weights are loaded. docs/audit.md lists every check.

    Example:
      sstoken-curate audit runs/demo/masked-sstoken
    """

    source: Annotated[Any, Option(argument=True, value="[DATA]")] = None
    """What to audit: files, a pattern, a folder, or a Hub dataset; in Python also a dataset, a table or a list of
    rows."""
    data: str | None = None
    """Same as DATA, as an option."""
    model: str | None = None
    """Model whose tokenizer, chat template and stop tokens are used; required for raw conversations."""
    tokenizer: str | None = None
    """Tokenizer of a tokenised dataset.  [default: one found beside it]"""
    tokens: Place | None = None
    """Tokens folder to which a scores folder belongs.  [default: one found beside it]"""
    split: str | None = None
    """Split of a Hub dataset or of a saved DatasetDict."""
    format: Format = "auto"
    """How raw rows hold conversations; `auto` looks at the first row's columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column names that differ from the format's: `{question: prompt_text}`."""
    ignore_columns: tuple[str, ...] = ()
    """Columns, or keys of messages, to leave out of raw rows."""
    preference: Preference = "stop"
    """What preference data does: `stop` makes its rows findings, `take` takes the wanted answers."""
    chat_template: str | None = None
    """A Jinja file to use instead of the tokenizer's chat template, or `trl:NAME` for one that an installed TRL has."""
    turns: TrainedTurns = "all"
    """Which turns of raw conversations are trained, as in `encode`."""
    allow_lost: tuple[Losable, ...] = ()
    """What the chat template may leave out: reasoning, system, tools, tool_calls or content."""
    keep_special_tokens: bool = False
    """Accept raw rows whose text contains special tokens."""
    shifted_labels: Annotated[bool, Option(flag="--shifted-labels")] = False
    """Labels are already shifted by one: label i is what position i predicts (NeMo, Megatron)."""
    max_length: Annotated[int | None, Field(ge=2)] = None
    """Length at which training will truncate, in tokens.  [default for raw conversations: as encode]"""
    limit: Annotated[int | None, Field(ge=1)] = None
    """Look at the first LIMIT rows only."""
    trust_remote_code: bool = False
    """Run Python code that comes with the tokenizer."""
    fail_on: Literal["error", "warning", "never"] = "never"
    """Exit with 1 if there is a finding of this severity or above; for CI."""

    def do(self) -> AuditResult:
        """Audit."""
        from sstoken.stages.auditing.run import audit as run

        if (self.source is None) == (self.data is None):
            given = "nothing was" if self.source is None else "both DATA and --data were"
            raise UsageError(f"audit: {given} given; name one dataset, as DATA or --data")
        options = {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name not in ("source", "data", "fail_on")
        }
        return run(self.data if self.source is None else self.source, **options)


def _show(values: dict[str, Any], as_json: bool) -> None:
    result = audit(**values)
    if as_json:
        say(json.dumps(result.to_dict()))
    else:
        print_audit(result)
    on = values.get("fail_on", "never")
    if on != "never" and result.failed(on):
        raise click.exceptions.Exit(1)


audit = verb(AuditCall, _show)
