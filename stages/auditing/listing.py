"""Writes docs/audit.md from the registry of checks.

python -m sstoken.stages.auditing.listing > docs/audit.md
"""

from sstoken.stages.auditing.checks import (
    answers,
    labels,
    lengths,
    packs,
    parts,
    rows,
    signals,
    special_tokens,
    template,
    turn_ends,
)
from sstoken.stages.auditing.findings import Family

_MODULES = (rows, packs, labels, turn_ends, special_tokens, parts, template, lengths, answers, signals)
"""In the order of the page."""

_NEEDS = {"ids": "", "tokenizer": "a tokenizer", "template": "a chat template", "raw": "raw conversations"}


def page() -> str:
    """Return docs/audit.md."""
    return _PAGE.replace("TABLES", "\n".join(_table(module.FAMILY) for module in _MODULES))


def _table(family: Family) -> str:
    lines = [f"### {family.name.capitalize()}", ""]
    lines += ["| kind | severity | what it counts | what to do | needs |", "|---|---|---|---|---|"]
    lines += [
        f"| `{k.name}` | {k.severity} | {_cell(k.what)} | {_cell(k.remedy)} | {_NEEDS[k.needs]} |"
        for k in family.kinds
    ]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    for given, escaped in (("|", "\\|"), ("{", "&#123;"), ("<", "&lt;")):
        text = text.replace(given, escaped)
    return text


_PAGE = """\
# What would be trained: `audit`

`audit` shows what a trainer would learn from a dataset, and what looks wrong about it. It loads no weights.

```bash
sstoken-curate audit --data rows.jsonl --model Qwen/Qwen3-0.6B    # raw conversations
sstoken-curate audit tokenised/ --tokenizer Qwen/Qwen3-0.6B       # token ids with labels or a mask
sstoken-curate audit runs/masked                                  # a folder of a run: tokens, scores, masked, export
sstoken-curate audit runs/masked --json --fail-on error           # for CI: exit 1 if an error is found
```

From Python, also for a dataset in memory:

```python
from sstoken import curate

result = curate.audit(source=dataset, model="Qwen/Qwen3-0.6B")
assert not result.failed("error"), [finding.kind for finding in result.findings]
```

**Raw conversations** are whatever `encode` reads ([data.md](data.md)); they are encoded as `encode` would, without a
limit on their length. **Tokenised** rows have `input_ids` (or `token_ids`, `tokens`) and `labels`, or a mask:
`loss_mask`, `assistant_masks`, `completion_mask`, `loss_weights` and others; torchtune's `mask`, true where a token
is *not* trained; ms-swift's `token_ids` within a message. They lie in Parquet, Arrow, JSON lines, a folder that
`save_to_disk` wrote, or on the Hub, and may be packed (`position_ids`, `seq_lengths`). An export is read as its
trainer reads it.

Without a tokenizer (`--model`, `--tokenizer`, or one beside the data) only ids and labels are compared. With one,
ends of turns and special tokens are checked too, and with a chat template whose turns each token is in: the template
is rendered with known words, and the marks around them are looked for in the rows.

An *error* trains something unintended, a *warning* probably does, a *note* only counts. Each finding says how many
rows have it, shows the tokens of one row (trained ones within « ») and says what to do.
`--json` prints all of it: `findings` (`kind`, `severity`, `rows`, `what`, `detail`, `example`, `remedy`) and `facts`.

## Every check

TABLES"""


if __name__ == "__main__":
    print(page(), end="")
