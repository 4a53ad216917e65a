"""docs/audit.md lists every check."""

from sstoken.stages.auditing.findings import KINDS
from sstoken.stages.auditing.listing import page
from tests.support import ROOT

WRITTEN = (ROOT / "docs/audit.md").read_text()


def test_the_page_is_current() -> None:
    assert page(WRITTEN) == WRITTEN, "write it again: python -m sstoken.stages.auditing.listing"


def test_every_kind_is_on_it() -> None:
    for name in KINDS:
        assert WRITTEN.count(f"| `{name}` |") == 1
