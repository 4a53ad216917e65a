"""Flip a bit of any file that a verb reads, then run the verb: it has to stop, or say so, or give the same.

Called as `python -m tests.crash.flips --places 300`; prints the counts, and exits with 1 after a silent one.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.crash.jobs import contents, in_child, succeeded
from tests.crash.warm import Fault, Outcome, call, import_all

_SAYS = re.compile(r"chang|differ|anew|damaged|other settings|not shown", re.IGNORECASE)
OUTSIDE = ("data.jsonl", "base", "run.yaml")
"""What a run reads from outside; for a verb alone, another content is another input."""


@dataclass(frozen=True)
class Reader:
    """A verb, and the state of the folder where it runs."""

    arguments: str
    state: str = "finished"
    """`finished`, or the name of the part of a run in which it was killed."""
    out: str = "new"
    """What it writes; empty: it prints."""
    reads: tuple[str, ...] = ("",)
    """How the names of the files begin that it may read."""

    @property
    def reads_outside(self) -> bool:
        """Whether it knows what the outside was before."""
        return self.arguments.startswith("run ") and self.state != "encode"  # before, nothing was finished

    def may_read(self, name: str) -> bool:
        """Whether a change in that file could change what it does."""
        return name.startswith(self.reads) and (self.reads_outside or not name.startswith(OUTSIDE))


TOKENS, SCORES, HISTORY, MASKED = "out/tokens/", "out/scores/", "out/history/", "out/masked/"
SELECT = f"select --tokens {TOKENS} --scores {SCORES} --history step-0 --current step-4 --out new"
POOLED = f"{SELECT} --pool word --protect end_of_turn"
RANK = f"score --tokens {TOKENS} --ckpt {HISTORY}step-2 --out new --world-size 2 --rank"
READERS = [
    *(Reader("run run.yaml", state, "out") for state in ("encode", "anchor", "trained", "score", "select")),
    Reader("run run.yaml", "finished", "out"),
    Reader(f"score --tokens {TOKENS} --ckpt {HISTORY}step-2 --out new", reads=(TOKENS, HISTORY)),
    Reader(f"anchor --tokens {TOKENS} --model base --max-steps 1 --out new", reads=(TOKENS,)),
    Reader(f"anchor --masked {MASKED} --model base --max-steps 1 --out new", reads=(MASKED,)),
    Reader(SELECT, reads=(TOKENS, SCORES)),
    Reader(f"export {MASKED} --to trl --out new", reads=(MASKED,)),
    Reader(f"export {MASKED} --to jsonl --out new", "export", "new", (MASKED, "new")),
    Reader(f"publish {MASKED} --repo me/it --dry-run --out new", out=""),
    Reader(f"show {MASKED} --rows 100", out="", reads=(MASKED,)),
    Reader(f"compare {MASKED} other", out="", reads=(MASKED, "other/")),
    Reader(POOLED, reads=(TOKENS, SCORES)),
    Reader(POOLED, "pooled", "new", (TOKENS, SCORES, "new")),
    Reader(f"score --tokens {TOKENS} --ckpt adapter/step-2 --out new", reads=(TOKENS, "adapter/")),
    Reader("commit new", "ranks", "new", (TOKENS, "new")),
    Reader(f"{RANK} 1", "ranks", "new.partial", (TOKENS, HISTORY, "new")),
    Reader("audit trl", out="", reads=("trl/",)),
    Reader("export out/masked --to trl --check --out trl", out="trl", reads=(MASKED, "trl/")),
    Reader(f"report {MASKED} --out new/report.html", reads=(MASKED, SCORES)),
    Reader(f"plot rho {MASKED} --out new/rho.svg", reads=(MASKED, SCORES)),
    Reader(f"phases --tokens {TOKENS} --scores {SCORES} --out new", reads=(TOKENS, SCORES)),
]


class Flips:
    """Folders in every state, and what each reader makes of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        start = folder / "start"
        start.mkdir()
        in_child(lambda: _save_inputs(start))
        self._states = {"finished": self._copy(start, "finished")}
        done = self._states["finished"]
        self._must(done, "run run.yaml")
        for arguments in (
            f"select --tokens {TOKENS} --scores {SCORES} --method random --history step-0 --out other",
            f"anchor --tokens {TOKENS} --model base --lora-rank 2 --max-steps 2 --snapshots 1 --out adapter",
            f"export {MASKED} --to trl --out trl",
        ):
            self._must(done, arguments)
        kills = {"encode": "tokens.partial/part-00001.*", "anchor": "history.partial/trainer/*/whole.json"}
        kills |= {"trained": "history.partial/log.jsonl", "score": "scores/*.partial/part-00000.*"}
        kills |= {"select": "masked.partial/part-00000.*"}
        for name, file in kills.items():
            self._states[name] = self._killed(start, name, "run run.yaml", f"out/{file}")
        kill = f"export {MASKED} --to jsonl --out new"
        self._states["export"] = self._killed(done, "export", kill, "new.partial/.counts/*")
        self._states["pooled"] = self._killed(done, "pooled", POOLED, "new.partial/part-00000.*")
        self._states["ranks"] = self._copy(done, "ranks")
        for rank in "01":
            self._must(self._states["ranks"], f"{RANK} {rank}")
        self._expected = {
            reader: self._do(reader, self._copy(self._states[reader.state], "trial")) for reader in READERS
        }
        for reader, (outcome, _) in self._expected.items():
            succeeded(outcome, [reader.arguments])

    def run(self, places: int, seed: int) -> list[dict[str, Any]]:
        """Flip that many bits, one after the other."""
        chance, results = random.Random(seed), []
        for number in range(places):
            reader = READERS[number % len(READERS)]
            place = self._copy(self._states[reader.state], "trial")
            files = sorted(
                path for path in place.rglob("*") if self._is_read(reader, path.relative_to(place))
            )
            path = chance.choice(files)
            content = bytearray(path.read_bytes())
            first = content.find(b"\n") + 1 if path.name == "run.yaml" else 0  # another `out` is another run
            byte, bit = chance.randrange(first, len(content)), chance.randrange(8)
            content[byte] ^= 1 << bit
            path.write_bytes(content)
            outcome, made = self._do(reader, place)
            name = path.relative_to(place).as_posix()
            results.append(
                {
                    "reader": f"{reader.arguments.partition(' ')[0]} ({reader.state})",
                    "file": name,
                    "byte": byte,
                    "bit": bit,
                    "end": self._end(reader, name, outcome, made),
                    "code": outcome.code,
                    "said": (outcome.out + outcome.err)[-300:],
                }
            )
            shutil.rmtree(place)
        return results

    def _is_read(self, reader: Reader, path: Path) -> bool:
        text = path.as_posix()
        if not (
            path.name
            and (self._folder / "trial" / path).is_file()
            and (self._folder / "trial" / path).stat().st_size
        ):
            return False
        if path.name.startswith("child.") or path.name.endswith(".lock"):
            return False
        return reader.may_read(text)

    def _end(self, reader: Reader, name: str, outcome: Outcome, made: Any) -> str:
        if "Traceback" in outcome.err or outcome.code not in (0, 1, 2):
            return "silent"  # as bad
        if outcome.code:
            return "refused"
        usual, expected = self._expected[reader]
        if isinstance(made, dict):  # what was flipped and not made again is as it was flipped
            own = name.removeprefix(f"{reader.out}/")
            made, expected = ({k: v for k, v in found.items() if k != own} for found in (made, expected))
        if made == expected:
            return "same"
        said = {*(outcome.err + outcome.out).splitlines()} - {*(usual.err + usual.out).splitlines()}
        return "said" if any(map(_SAYS.search, said)) else "silent"

    def _do(self, reader: Reader, place: Path) -> tuple[Outcome, Any]:
        outcome = call(reader.arguments.split(), place)
        if outcome.code or not reader.out:
            return outcome, outcome.out
        return outcome, contents(place / reader.out)

    def _copy(self, source: Path, name: str) -> Path:
        target = self._folder / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        return target

    def _must(self, place: Path, arguments: str) -> None:
        succeeded(call(arguments.split(), place), [arguments])

    def _killed(self, source: Path, name: str, arguments: str, pattern: str) -> Path:
        """The folder as a kill left it just after such a file was written."""
        while True:
            place = self._copy(source, name)

            def is_there(place: Path = place) -> bool:
                return any(not path.name.endswith(".tmp") for path in place.glob(pattern))

            if call(arguments.split(), place, Fault(when=is_there)).code is None and is_there():
                return place


def _save_inputs(folder: Path) -> None:
    from tests.factories import save_model
    from tests.pipeline.small_run import save_conversations

    save_model(folder / "base", positions=256)
    save_conversations(folder / "data.jsonl", 14)
    (folder / "run.yaml").write_text(
        "out: out\nencode: {data: data.jsonl, model: base, shard_rows: 5, workers: 1}\n"
        "anchor: {max_steps: 4, snapshots: 2, batch_size: 2, learning_rate: 1.0e-2}\nscore: {batch_tokens: 256}\n"
    )


def main() -> int:
    """Flip the bits; print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sstoken-flips-"))
    try:
        import_all()
        results = Flips(folder).run(asked.places, asked.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    silent = [result for result in results if result["end"] == "silent"]
    summary = {
        "places": len(results),
        "files": len({(r["reader"], r["file"]) for r in results}),
        "by reader": dict(Counter(r["reader"] for r in results)),
        "by end": dict(Counter(r["end"] for r in results)),
        "silent": len(silent),
    }
    print(json.dumps(summary, indent=1))
    for result in silent:
        print(json.dumps(result), file=sys.stderr)
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main())
