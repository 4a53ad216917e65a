"""Tiny models and tokenizers for tests of every layer; seeded, so that each call makes the same one."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 128
"""Size of the vocabulary of `word_tokenizer` and `tiny_llama`."""


def word_tokenizer(first: str = "w", *, pad: bool = False) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer with the entries `</s>` and `w1` to `w127`."""
    words = ["</s>", *(f"{first}{i}" for i in range(1, VOCABULARY))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    if pad:
        tokenizer.pad_token = "</s>"
    return tokenizer


def byte_tokenizer(
    special: Iterable[str] = (), text: Iterable[str] = (), size: int = 600, **settings: object
) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer; without `text` to learn merges from, every byte is a token.

    Args:
        special: special tokens, which get the first ids.
        text: learn merges from this, up to a vocabulary of `size`.
        settings: of the tokenizer, such as `eos_token` and `chat_template`.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def save_tokenizer(folder: Path, first: str = "w", *, pad: bool = False) -> PreTrainedTokenizerFast:
    """Save a `word_tokenizer`."""
    tokenizer = word_tokenizer(first, pad=pad)
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """Make a random Llama of two layers.

    Args:
        changes: settings of its `LlamaConfig` that differ.
    """
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def save_model(folder: Path, vocabulary: int = VOCABULARY, positions: int = 64) -> Path:
    """Save a `tiny_llama` with a `word_tokenizer`."""
    tiny_llama(vocab_size=vocabulary, max_position_embeddings=positions).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def random_model(architecture: str, seed: int = 0, **settings: object) -> PreTrainedModel:
    """Make a random model with random biases and sinks too, ready for inference.

    Args:
        architecture: its `model_type`.
        seed: of the weights.
        settings: of its configuration.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()
