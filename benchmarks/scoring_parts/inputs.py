"""What both sides read: random Llamas, and finished tokens folders whose lengths are those of real data."""

import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

SHARED = Path(__file__).parents[3] / "shared"
VOCABULARY = 32_000
MODELS = {"6x256": (6, 256, 8), "8x512": (8, 512, 8), "tiny": (2, 64, 4)}
"""Layers, hidden size, heads."""
SHARD_ROWS = 1000
"""As `encode` cuts them."""


def make_inputs(work: Path, model: str, rows: int, lengths: str, copies: int = 1) -> None:
    """A checkpoint `work/model` and its tokens `work/tokens`: `rows` real lengths, `copies` times over."""
    make_model(work / "model", model)
    write_tokens(work / "tokens", list(real_examples(rows, lengths)) * copies)


def make_model(folder: Path, model: str, vocabulary: int = VOCABULARY, seed: int = 0) -> None:
    """A random Llama in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, heads = MODELS[model]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def real_examples(rows: int, lengths: str) -> list[tuple[int, int]]:
    """Prompt and response lengths of real data where it is at hand (from the start again if need be), else like them.

    `short` are those of GSM8K, `mixed` those of GSM8K and roleplay in turns, `long` joins GSM8K to 2k-4k.
    """
    if lengths == "mixed":
        of_each = zip(_gsm8k(-(-rows // 2)), _roleplay(-(-rows // 2)), strict=True)
        return [pair for both in of_each for pair in both][:rows]
    if lengths == "short":
        return _gsm8k(rows)
    random = np.random.default_rng(0)
    pairs = _gsm8k(rows * 16)
    joined, at = [], 0
    for _ in range(rows):
        target, prompt, response = int(random.integers(2000, 4000)), 0, 0
        while prompt + response < target:
            prompt, response = prompt + pairs[at % len(pairs)][0], response + pairs[at % len(pairs)][1]
            at += 1
        joined.append((min(prompt, 2000), min(response, 2000)))
    return joined


def _gsm8k(count: int) -> list[tuple[int, int]]:
    data = SHARED / "data" / "gsm8k" / "train.jsonl"
    if not data.is_file():
        return _like(count, prompt=80, response=120)
    rows = [json.loads(line) for line in data.read_text().splitlines()[:count]]
    lengths = _lengths_of([(row["question"], row["answer"]) for row in rows])
    return list(islice(cycle(lengths), count))


def _roleplay(count: int) -> list[tuple[int, int]]:
    data = SHARED / "data" / "roleplay.json"
    if not data.is_file():
        return _like(count, prompt=40, response=240)
    rows = json.loads(data.read_text())[:count]
    lengths = _lengths_of([(row["instruction"] + row["input"], row["response"]) for row in rows])
    return list(islice(cycle(lengths), count))


def _lengths_of(texts: list[tuple[str, str]]) -> list[tuple[int, int]]:
    """In tokens, with 8 of a chat template before and one after."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "base")
    return [(len(tokenizer(p)["input_ids"]) + 8, len(tokenizer(r)["input_ids"]) + 1) for p, r in texts]


def _like(count: int, prompt: int, response: int) -> list[tuple[int, int]]:
    random = np.random.default_rng(0)
    means = [prompt / 4, response / 4]
    return [(int(p), int(r)) for p, r in random.gamma(4, [means] * count).clip(8, 600)]


def write_tokens(folder: Path, examples: list[tuple[int, int]], vocabulary: int = VOCABULARY) -> None:
    """A folder as `encode` leaves it: random ids, a prompt and a response of the given lengths each."""
    from sstoken.stages import joins, tables
    from sstoken.stages.manifest import Manifest, list_files, write_manifest

    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for part, first in enumerate(range(0, len(examples), SHARD_ROWS)):
        shard = examples[first : first + SHARD_ROWS]
        table = pa.table(
            [
                [f"{first + i}" for i in range(len(shard))],
                [random.integers(0, vocabulary, p + r) for p, r in shard],
                [np.arange(p + r) >= p for p, r in shard],
            ],
            schema=tables.TOKENS,
        )
        facts = {"kind": "tokens", "tokenizer": {"fingerprint": "none", "name": "none"}, "stats": {}}
        about = {joins.RUN: "benchmark", joins.TOKENS: joins.tokens_fingerprint(table)}
        tables.write_part(folder / tables.part_name(part), table, facts | about)
    manifest = Manifest(
        stage="encode", fingerprint="benchmark", settings={}, seed=0, inputs={}, sources={}, version="0",
        seconds=0, metrics={}, files=list_files(folder),
    )  # fmt: skip
    write_manifest(folder, manifest)


def read_rows(tokens: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """All rows of a tokens folder, as Python lists."""
    import pyarrow.parquet as pq

    parts = sorted(tokens.glob("*.parquet"))
    return pa.concat_tables([pq.read_table(part, columns=columns) for part in parts]).to_pylist()
