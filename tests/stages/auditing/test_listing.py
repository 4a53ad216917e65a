"""docs/audit.md lists every check."""

from sstoken.stages.auditing.findings import KINDS
from sstoken.stages.auditing.listing import page
from tests.support import ROOT


def test_the_page_is_current() -> None:
    written = (ROOT / "docs/audit.md").read_text()
    assert written == page(), "write it again: python -m sstoken.stages.auditing.listing > docs/audit.md"


def test_every_kind_is_on_it() -> None:
    for name in KINDS:
        assert page().count(f"| `{name}` |") == 1
