"""The table of trainers, printed at the end of `make test-trainers`."""

from collections import defaultdict

import pytest

COLUMNS = ("version", "loads", "labels", "packing", "trains")
_table: defaultdict[str, dict[str, str]] = defaultdict(dict)


@pytest.fixture(scope="session")
def table() -> dict[str, dict[str, str]]:
    """What was seen of each trainer; a cell that stays empty failed or was not run."""
    return _table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print it."""
    if not _table:
        return
    terminalreporter.section("what was run")
    lines = [("trainer", *COLUMNS)]
    lines += [(name, *(cells.get(column) or "-" for column in COLUMNS)) for name, cells in _table.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
