"""The chat templates of real models, as an installed TRL ships them, each with a tokenizer that knows its tokens."""

import re
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from sstoken.stages.encoding.templates import trl_templates
from tests.factories import byte_tokenizer

_SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<[｜|][^<>]{1,40}[｜|]>|</?(?:start_of_turn|end_of_turn|end_of_utterance|bos|eos|s)>"
    r"|<\|(?:turn|channel|tool_call|tool_response|tool)>|<(?:turn|channel|tool_call|tool_response|tool)\|>"
)
_ENDS = {
    "llama3": "<|eot_id|>",
    "qwen": "<|im_end|>",
    "gemma4": "<turn|>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "gptoss": "<|return|>",
    "glm4moe": "<|endoftext|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "lfm": "<|im_end|>",
    "nemotron": "<|im_end|>",
    "smol": "<end_of_utterance>",
    "idefics": "<end_of_utterance>",
}
"""The EOS token of each family, by the beginning of its templates' names."""


def names(training: bool = False) -> list[str]:
    """The originals, or the variants for training."""
    folder = trl_templates()
    stems = sorted(path.stem for path in folder.glob("*.jinja")) if folder else []
    return [name for name in stems if name.endswith("_training") == training]


def source(name: str) -> str:
    """The Jinja text of a template."""
    folder = trl_templates()
    assert folder is not None
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens of a template."""
    end = next((token for start, token in _ENDS.items() if name.startswith(start)), "</s>")
    special = sorted(set(_SPECIAL.findall(source(name))) | {end, "<s>"})
    return byte_tokenizer(special, bos_token="<s>", eos_token=end, chat_template=source(name))


def write_model(name: str, folder: Path) -> Path:
    """The tokenizer as a folder that the command line takes."""
    tokenizer(name).save_pretrained(folder)
    return folder
