"""docs/promises.md names tests that are there."""

import re

from tests.support import ROOT


def test_each_promise_names_its_test():
    lines = (ROOT / "docs/promises.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) > 5
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)`", row)
        assert named, row
        for path in named:
            assert re.search(r"^(?:async )?def test_\w+", (ROOT / path).read_text(), re.MULTILINE), (
                path,
                row,
            )
