"""Writes docs/templates.md: which kinds of conversations the chat templates of real models can train on.

python -m tests.stages.encoding.template_table > docs/templates.md
"""

# ruff: noqa: E501 (lines of a page)

import importlib.metadata
import re
from collections.abc import Iterator

from sstoken.errors import SstokenError
from sstoken.stages.encoding.chat import ChatEncoder
from sstoken.stages.encoding.messages import BadRow, Conversation
from tests.stages.encoding import real_templates
from tests.stages.encoding.conversation_kinds import SHOWN

HEAD = """# Chat templates

A chat template is a program, and many leave out what they are given: reasoning of earlier turns, tool calls, a system
prompt. `encode` checks that every text of a row (contents, reasoning, tool calls, tool definitions) appears in the
rendering, and refuses a row that loses something, with the option that helps:

| option | what it does |
|---|---|
| `--turns each` | each assistant turn becomes an example of its own, shown as the model sees it at inference: earlier turns as history, the turn itself in full |
| `--turns last` | only the last assistant turn is trained on, shown in the same way |
| `--chat-template trl:NAME` | a template that an installed TRL ships, such as `trl:qwen3_training`, which keeps all reasoning |
| `--chat-template FILE.jinja` | your own template |
| `--allow-lost KIND` | `reasoning`, `system`, `tools`, `tool_calls` or `content` may be left out; each loss is counted |
| `--on-bad-row skip` | such rows are skipped, counted, and listed in `bad_rows/` |

A response begins after the generation prompt that inference will see and ends with the token that stops generation: the
tokenizer's EOS token or those of `generation_config.json`. Responses without such a token are counted. Messages after the
last answer that is trained on are left out, since they would teach nothing; this is counted too. `encode` checks that the
tokens of a response spell its text, and counts prompts that the tokenizer cannot spell, texts whose blanks at the ends the
template trims, and tool definitions of which it leaves out details, such as defaults. A template that prints calls but
ignores tool definitions gets them as JSON at the end of the system prompt, which is counted. Where a template marks
responses with `{% generation %}`, only what it marks is trained on.

## Templates of real models

These are the templates that the TRL version below ships, tried on one conversation of each kind; the table is written by
`python -m tests.stages.encoding.template_table`. Where a cell names no option, `--allow-lost` or your own template remains.
"""


def outcome(name: str, talk: Conversation) -> str:
    """What one template does with one conversation, for a cell of the table."""
    try:
        ChatEncoder(real_templates.tokenizer(name)).encode(talk)
    except BadRow as error:
        if error.reason == "template refuses":
            return "refused by the template"
        ways = re.findall(r"--(?:turns each|chat-template trl:\w+)", error.detail)
        if error.reason == "lost by the template":
            lost = error.detail.partition(";")[0]
            kinds = list(dict.fromkeys(re.findall(r"\b(reasoning|system|tools|tool_calls|content)\b", lost)))
            return f"loses {', '.join(kinds)}" + (f": `{'` or `'.join(ways)}`" if ways else "")
        return f"{error.reason}" + (f": `{'` or `'.join(ways)}`" if ways else "")
    return "right"


def lines() -> Iterator[str]:
    """The page, line by line; templates with the same outcomes share a row."""
    yield from HEAD.splitlines()
    yield ""
    yield f"TRL {importlib.metadata.version('trl')}."
    yield ""
    yield f"| template | {' | '.join(SHOWN)} |"
    yield "|---" * (len(SHOWN) + 1) + "|"
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in real_templates.names():
        rows.setdefault(tuple(outcome(name, talk) for talk in SHOWN.values()), []).append(name)
    for cells, names in sorted(rows.items(), key=lambda row: row[1]):
        yield f"| {', '.join(names)} | {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        print("\n".join(lines()))
    except SstokenError as error:
        raise SystemExit(str(error)) from error
