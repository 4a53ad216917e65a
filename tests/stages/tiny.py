"""A tiny model, its tokenizer and random tokens, for tests that train."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sstoken.stages import checkpoints, joins, tables

VOCABULARY = 128


def save_tokenizer(folder: Path, first: str = "w", *, pad: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the entries `</s>` and `w1` to `w127`."""
    words = ["</s>", *(f"{first}{i}" for i in range(1, VOCABULARY))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    if pad:
        tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder: Path, vocabulary: int = VOCABULARY, positions: int = 64) -> Path:
    """A random Llama of two layers, with `save_tokenizer`'s tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


RUN = "tiny"
"""The run that `save_tokens` says it is."""


def save_tokens(folder: Path, examples: int = 40, parts: int = 2, longest: int = 24) -> Path:
    """Random examples over `parts` shards; the last has no response token."""
    folder.mkdir(parents=True)
    fingerprint = checkpoints.tokenizer_fingerprint(save_tokenizer(folder / "tokenizer"))
    facts = {"fingerprint": fingerprint, "name": "tiny"}
    random = np.random.default_rng(0)
    rows = []
    for i in range(examples):
        length = int(random.integers(6, longest + 1))
        start = length if i == examples - 1 else length // 3
        ids = random.integers(1, VOCABULARY, length).tolist()
        rows.append(
            {"example_id": str(i), "input_ids": ids, "response_mask": [j >= start for j in range(length)]}
        )
    for part, chunk in enumerate(np.array_split(np.arange(examples), parts)):
        table = pa.Table.from_pylist([rows[i] for i in chunk], schema=tables.TOKENS)
        about = {
            "kind": "tokens",
            "tokenizer": facts,
            joins.TOKENS: joins.tokens_fingerprint(table),
            joins.RUN: RUN,
        }
        tables.write_part(folder / tables.part_name(part), table, about)
    return folder
