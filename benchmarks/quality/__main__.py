"""Does a mask make a better model? Studies of `studies/`: noise found, models trained on masks, what they can then do.

    python benchmarks/quality --quick
    python benchmarks/quality noisy-gsm8k --out runs/quality
    python benchmarks/quality --json

Without names, the studies of the small table (two cores, under 90 minutes); `full-gsm8k` is for a GPU. A cell (a method
and a seed) that has been run is not run again. The real model: `make smollm2`; the data: `../shared`.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # not this folder, whose names are those of other modules
SMALL_TABLE = (
    "found-gsm8k",
    "found-weak-base",
    "noisy-gsm8k",
    "weak-base",
    "noisy-families",
    "clean-families",
    "clean-weak",
    "variance",
    "equal-tokens",
)


def main() -> None:
    """Run the studies; write their tables, figures and Parquet files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", help="names in studies/, or paths; default: the small table")
    parser.add_argument("--quick", action="store_true", help="under a minute: the study `quick`")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on the last line")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quality", help="cells are kept there")
    parser.add_argument("--results", type=Path, help="where the results go (default: --out)")
    parser.add_argument(
        "--report-only",
        action="store_true",
        help="run nothing: report the cells there are, or without any the Parquet table in --results",
    )
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    options = parser.parse_args()

    # Before torch is imported: threads that wait actively slow down a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from benchmarks.quality.page import write_summary
    from benchmarks.quality.report import note_run, write_report
    from benchmarks.quality.settings import read_study
    from benchmarks.quality.study import Cells

    torch.set_num_threads(options.threads)
    began, cpu_began, num_run = time.monotonic(), time.process_time(), 0
    figures = {}
    for name in ["quick"] if options.quick else options.studies or SMALL_TABLE:
        study = read_study(name)
        cells = Cells(study, options.out / study.name, lambda line: print(line, flush=True))
        if not options.report_only:
            cells.run()
        num_run += cells.num_run
        command = "python benchmarks/quality " + ("--quick" if options.quick else study.name)
        figures[study.name] = write_report(cells, options.results or options.out, command)
    figures["seconds"] = round(time.monotonic() - began)
    if num_run and not options.quick:
        seconds = figures["seconds"], round(time.process_time() - cpu_began)
        command = " ".join(["python benchmarks/quality", *options.studies])
        note_run(options.results or options.out, command, num_run, seconds, options.threads)
    write_summary(options.results or options.out)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
