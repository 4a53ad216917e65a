"""`audit` over millions of tokens: seconds and peak memory.

Two datasets: token ids and labels in Parquet, as anybody has them, looked at with the tokenizer and its chat template;
and a masked dataset of ours. The tokens are those of `reporting.py`.

    python benchmarks/auditing.py [--quick] [--json] [--tokens N] [--data FILE --model FOLDER]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.commands import run
from benchmarks.reporting import add_options, write_folders
from benchmarks.rounds import middle
from sstoken import curate
from sstoken.stages import tables


def main() -> None:
    """Parse the options; measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        limit = 1500 if options.quick else None
        curate.encode(data=options.data, model=options.model, out=folder / "gsm8k", limit=limit)
        write_folders(folder, 300_000 if options.quick else options.tokens)
        rows = write_rows(folder)
        figures = {
            "rows": middle(lambda: measure(str(rows), "--tokenizer", options.model)),
            "masked": middle(lambda: measure(str(folder / "masked"))),
        }
    for name, found in figures.items():
        print(
            f"{name}: {found['tokens']:,} tokens, {found['seconds']:.1f} s ({found['cpu_seconds']:.1f} s of "
            f"computing), peak {found['peak_mib']:.0f} MiB"
        )
    if options.json:
        print(json.dumps(figures))


def write_rows(folder: Path) -> Path:
    """Write the tokens of `masked` as `input_ids` and `labels`, all of each response trained."""
    path = folder / "rows.parquet"
    schema = pa.schema([("input_ids", tables.IDS), ("labels", tables.IDS)])
    with pq.ParquetWriter(path, schema) as out:
        for part in tables.parts(folder / "masked"):
            table = tables.read_table(part, ["input_ids", "response_mask"])
            ids, offsets = tables.flatten(table["input_ids"])
            response = tables.flatten(table["response_mask"])[0].astype(bool)
            labels = tables.lists(np.where(response, ids, -100), offsets, tables.IDS)
            out.write_table(pa.table([table["input_ids"], labels], schema=schema))
    return path


def measure(*arguments: str) -> dict[str, Any]:
    """Seconds and peak MiB of `sstoken-curate audit`, and how many tokens it looked at."""
    measured = run("audit", *arguments, "--json")
    said = json.loads("\n".join(measured.lines))
    return {"tokens": said["facts"]["tokens"], "findings": len(said["findings"]), **measured.figures()}


if __name__ == "__main__":
    main()
