"""docs/data.md: each row becomes the conversation that the page shows."""

import json
import re

import click
import pytest

from sstoken.pipeline.cli import cli
from sstoken.stages.encode import Encode
from sstoken.stages.encoding.conversations import to_conversation
from sstoken.stages.encoding.layouts import OPTIONAL, REQUIRED
from sstoken.stages.encoding.messages import BadRow
from tests.support import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()
BLOCK = re.compile(r"(?:^With `(--[^`]+)`[^\n]*:\n\n)?```(json|text)\n(.*?)```", re.DOTALL | re.MULTILINE)


def examples():
    row = None
    for options, kind, text in BLOCK.findall(PAGE):
        if kind == "json":
            row = json.loads(text)
        else:
            yield pytest.param(row, options, text.rstrip("\n"), id=f"{list(row)} {options}")


def converted(row, options):
    """By the command line's own reading of the options."""
    required = ["--data", "d", "--model", "m", "--out", "o"]
    command = cli.get_command(click.Context(cli), "encode")
    given = command.make_context("encode", [*required, *options.split()]).params
    fields = {
        name: value for name, value in given.items() if name in Encode.model_fields and value is not None
    }
    stage = Encode(**fields)
    return to_conversation(row, stage._layout_of(row))


def shown(row, options):
    try:
        found = converted(row, options)
    except BadRow as error:
        return str(error)
    lines = [f"tools: {json.dumps(found.tools)}"] if found.tools else []
    for index, message in enumerate(found.messages):
        who = message["role"]
        if "reasoning_content" in message:
            lines.append(f"{who} reasons: {message['reasoning_content']}")
        name = f"{who}, not trained on" if index in found.untrained else who
        indent = "\n" + " " * (len(name) + 2)
        lines.append(f"{name}: {message['content'].replace(chr(10), indent)}")
        for call in message.get("tool_calls", []):
            lines.append(
                f"{who} calls: {call['function']['name']} {json.dumps(call['function']['arguments'])}"
            )
    if found.unused:
        lines.append(f"left out: {', '.join(found.unused)}")
    return "\n".join(lines)


@pytest.mark.parametrize(("row", "options", "expected"), examples())
def test_rows_become_what_the_page_shows(row, options, expected) -> None:
    assert shown(row, options) == expected


def test_the_page_names_every_layout_and_role() -> None:
    table = {
        cells[1].strip(" `"): set(re.findall(r"`(\w+)`", cells[2] + cells[3]))
        for line in PAGE.splitlines()
        if (cells := line.split("|"))[0] == "" and len(cells) == 5
    }
    for layout, roles in REQUIRED.items():
        assert set(roles) | set(OPTIONAL[layout]) <= table[layout]
