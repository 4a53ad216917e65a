"""How fast conversations become tokens with a response mask, beside `apply_chat_template`, and what the checks cost.

Every side encodes the same rows, in turns within a round; figures are medians over rounds, in rows a second of one
process. `transformers` is `apply_chat_template(return_assistant_tokens_mask=True)`, which checks nothing and needs a
template with `{% generation %}` markers: Qwen3's variant for training, as an installed TRL ships it. Last, how much
faster the whole stage is with two processes than with one, for a JSONL and a Parquet file.
"""

import argparse
import json
import pickle
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.rounds import ROUNDS, at_least, middle
from sstoken.pipeline import api
from sstoken.stages.encoding.chat import ChatEncoder, EncoderOptions
from sstoken.stages.encoding.messages import Conversation, Message
from sstoken.stages.encoding.ranges import cut
from tests.stages.encoding import real_templates

TEMPLATE = "qwen3_training"
WORDS = [
    f"{a}{b}{c}" for a in ("re", "con", "in", "de") for b in ("vo", "ta", "mi") for c in ("lve", "rk", "nt")
]
Rows = list[Conversation]


def rows(kind: str, count: int) -> Rows:
    """Conversations of one kind, 40 words a question and 80 an answer."""
    draw = random.Random(kind)

    def text(length: int) -> str:
        return " ".join(draw.choices(WORDS, k=length)) + "."

    made = []
    for _ in range(count):
        answer: Message = {"role": "assistant", "content": text(80)}
        messages: list[Message] = [{"role": "user", "content": text(40)}]
        if kind == "reasoning":
            answer["reasoning_content"] = text(80)
        if kind == "tools":
            call = {"type": "function", "function": {"name": "look_up", "arguments": {"query": text(8)}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": "look_up", "content": text(20)})
        made.append(Conversation([*messages, answer], tools() if kind == "tools" else None))
    return made


def tools() -> list[dict[str, Any]]:
    """One tool."""
    query = {"type": "string", "description": "Words to look for."}
    parameters = {"type": "object", "properties": {"query": query}}
    function = {"name": "look_up", "description": "Looks things up.", "parameters": parameters}
    return [{"type": "function", "function": function}]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One that knows the words, four or five characters a token as usual."""
    made = real_templates.tokenizer(TEMPLATE)
    talk = [" ".join(str(m["content"]) for m in row.messages) for row in rows("plain", 50)]
    template = made.chat_template
    made = made.train_new_from_iterator([*talk, *map(str, tools()), template], 1000, show_progress=False)
    made.chat_template = template
    return made


@cache
def encoder() -> ChatEncoder:
    """What `encode` has in each process."""
    return ChatEncoder(tokenizer(), EncoderOptions(1 << 20))


def by_transformers(given: Rows) -> None:
    """What a trainer calls."""
    for row in given:
        tokenizer().apply_chat_template(
            row.messages, tools=row.tools, return_dict=True, return_assistant_tokens_mask=True
        )


def by_encoder(given: Rows) -> None:
    """What `encode` runs, its layout and files aside."""
    for row in given:
        encoder().encode(row)


def without_token_check(given: Rows) -> None:
    """The same, without the check that the response tokens spell the responses."""

    def unchecked(*_: object) -> tuple[str, ...]:
        return ()

    with mock.patch.object(ChatEncoder, "_check_tokens", unchecked):
        by_encoder(given)


def rates(sides: dict[str, Callable[[Rows], None]], given: Rows) -> dict[str, float]:
    """Rows a second of CPU time, which other programs disturb less; the sides take turns every 50 rows."""
    seconds = dict.fromkeys(sides, 0.0)
    names = list(sides)
    for start in range(0, len(given), 50):
        names.append(names.pop(0))  # no side is always the first
        for name in names:
            before = time.process_time()
            sides[name](given[start : start + 50])
            seconds[name] += time.process_time() - before
    return {name: len(given) / taken for name, taken in seconds.items()}


def driver_share(data: str, seconds: float) -> float:
    """What share of one worker's time the driver needs to cut a file into shards and to hand them out."""

    def once() -> dict[str, float]:
        before = time.process_time()
        for shard in cut(data, None, 100):
            pickle.dumps(shard)
        return {"share": (time.process_time() - before) / seconds}

    return float(middle(once)["share"])


def by_workers(kind: str, count: int, rounds: int) -> tuple[float, float]:
    """How much faster two processes encode a file than one, from the file to the tokens (the best of each); and the
    driver's share of the CPU time that one process needs, which bounds how many workers it can feed.
    """
    given = [{"messages": row.messages} for row in rows("plain", count)]
    with TemporaryDirectory() as folder:
        data = Path(folder) / f"data.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(given), data, row_group_size=1000)
        else:
            data.write_text("".join(json.dumps(row) + "\n" for row in given))
        tokenizer().save_pretrained(f"{folder}/model")
        seconds: dict[int, list[float]] = {1: [], 2: []}
        used: list[float] = []
        for _ in range(rounds):
            for workers, taken in seconds.items():
                out = f"{folder}/out"
                call = {"data": str(data), "model": f"{folder}/model", "out": out, "force": True}
                api.encode(**call, shard_rows=100, limit=400, workers=workers)  # processes start, and load it
                before, cpu = time.perf_counter(), time.process_time()
                api.encode(**call, shard_rows=100, workers=workers)
                taken.append(time.perf_counter() - before)
                if workers == 1:
                    used.append(time.process_time() - cpu)
        return min(seconds[1]) / min(seconds[2]), driver_share(str(data), min(used))


def of_the_stage(quick: bool) -> dict[str, float]:
    """The figures of the whole stage, for both kinds of file."""
    found: dict[str, float] = {}
    for kind in ("jsonl", "parquet"):
        speedup, share = by_workers(kind, 4000 if quick else 40_000, ROUNDS)
        found |= {f"{kind}_two_workers_to_one": round(speedup, 2), f"{kind}_driver_share": round(share, 4)}
    return found


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="200 rows of each kind and not 2,000")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, at least 3")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    given = parser.parse_args()
    sides = {"transformers": by_transformers, "encoder": by_encoder, "unchecked": without_token_check}
    found: dict[str, float] = {}
    for kind in ("plain", "reasoning", "tools"):
        data = rows(kind, 200 if given.quick else 2000)
        for side in sides.values():
            side(data[:5])
        rounds = [rates(sides, data) for _ in range(at_least(given.rounds))]
        for name in ("transformers", "encoder"):
            found[f"{kind}_{name}_rows_per_second"] = round(statistics.median(r[name] for r in rounds))
        found[f"{kind}_ratio"] = round(statistics.median(r["encoder"] / r["transformers"] for r in rounds), 2)
        share = statistics.median(1 - r["encoder"] / r["unchecked"] for r in rounds)
        found[f"{kind}_share_of_token_check"] = round(share, 3)
    found |= of_the_stage(given.quick)
    for name, value in found.items():
        print(f"{name}: {value}")
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
