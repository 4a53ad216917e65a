"""The model that is trained: loaded, with its lower layers frozen and their output kept where only the upper train."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.data import SHARED
from benchmarks.quality.tokens import Encoded

BASES = {
    "smollm2": Path(__file__).parents[2] / ".models" / "smollm2",
    "small": SHARED / "models" / "base",
}
"""smollm2: SmolLM2-135M-Instruct (`make smollm2`). small: 2.75 M parameters, pretrained on 48 MB of English."""


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load_tokenizer(base: str) -> Any:
    """The tokenizer of a base model, with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASES[base])


class Student:
    """A causal model, either trained whole or by LoRA in its upper layers.

    Args:
        base: one of `BASES`, or a folder.
        upper_layers: train LoRA of rank 16 in so many of the last layers, the rest frozen; None: all weights.
        seed: of LoRA's first weights.
        attention: `eager` where attention is to be measured.
        below: what the frozen layers gave, by a sequence's bytes, to be shared by students of the same base and split.
    """

    def __init__(
        self,
        base: str | Path,
        upper_layers: int | None,
        seed: int,
        attention: str = "sdpa",
        below: dict[bytes, Tensor] | None = None,
    ) -> None:
        from transformers import AutoModelForCausalLM

        dtype = torch.float32 if upper_layers is None else torch.bfloat16
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            BASES.get(str(base), base), dtype=dtype, attn_implementation=attention
        ).to(device)
        self.device = device
        self._lower: Any = None
        self._kept = {} if below is None else below
        if upper_layers is not None:
            self._split(upper_layers, seed)
        self.model.eval()

    def _split(self, upper_layers: int, seed: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        num_layers = len(self.model.model.layers)
        upper = list(range(num_layers - upper_layers, num_layers))
        config = LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules=list(LINEAR), layers_to_transform=upper
        )
        torch.manual_seed(seed)
        self.model.requires_grad_(False)
        self.model = inject_adapter_in_model(config, self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                parameter.data = parameter.data.float()
        layers = self.model.model.layers
        self._lower, self._upper = copy.copy(self.model.model), copy.copy(self.model.model)
        for part, chosen in ((self._lower, layers[: upper[0]]), (self._upper, layers[upper[0] :])):
            part._modules = dict(part._modules)  # a copy's own table, with the same modules in it
            part.layers = nn.ModuleList(chosen)
        self._lower.norm = nn.Identity()

    def hidden(self, batch: Sequence[Encoded]) -> Tensor:
        """[B, T, D]: the last hidden states, of sequences padded on the right."""
        width = max(len(e.ids) for e in batch)
        if self._lower is None:
            ids = np.zeros((len(batch), width), dtype=np.int64)
            for row, example in zip(ids, batch, strict=True):
                row[: len(example.ids)] = example.ids
            return self.model.model(torch.from_numpy(ids).to(self.device), use_cache=False).last_hidden_state
        below = torch.stack(
            [nn.functional.pad(s, (0, 0, 0, width - len(s))) for s in map(self._below, batch)]
        )
        return self._upper(inputs_embeds=below, use_cache=False).last_hidden_state

    @torch.no_grad()
    def attend(self, example: Encoded) -> tuple[Tensor, Tensor]:
        """The last hidden states [1, T, D] and the last layer's attention [H, T, T]. Needs eager attention."""
        if self._lower is None:
            ids = torch.from_numpy(example.ids)[None].to(self.device)
            found = self.model.model(ids, output_attentions=True, use_cache=False)
        else:
            below = self._below(example)[None]
            found = self._upper(inputs_embeds=below, output_attentions=True, use_cache=False)
        return found.last_hidden_state, found.attentions[-1][0]

    @torch.no_grad()
    def attend_everywhere(self, example: Encoded) -> list[Tensor]:
        """Every layer's attention, [H, T, T] each. Needs eager attention."""
        ids = torch.from_numpy(example.ids)[None].to(self.device)
        parts = [self.model.model] if self._lower is None else [self._lower, self._upper]
        found, given = [], {"input_ids": ids}
        for part in parts:
            out = part(**given, output_attentions=True, use_cache=False)
            found += [weights[0] for weights in out.attentions]
            given = {"inputs_embeds": out.last_hidden_state}
        return found

    @torch.no_grad()
    def _below(self, example: Encoded) -> Tensor:
        """[T, D]: what the frozen layers give, computed once for each example."""
        key = example.ids.tobytes()
        if key not in self._kept:
            ids = torch.from_numpy(example.ids)[None].to(self.device)
            self._kept[key] = self._lower(ids, use_cache=False).last_hidden_state[0]
        return self._kept[key]

    def response_logits(
        self, batch: Sequence[Encoded], chosen: Any = None, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[N, V] float32 logits that predict response tokens, one example after the other, and [N] the tokens.

        Args:
            batch: the examples.
            chosen: of each example a mask of its response tokens; those alone.
            hidden: the last hidden states, where they are known.
        """
        hidden = self.hidden(batch) if hidden is None else hidden
        rows, targets = [], []
        for b, example in enumerate(batch):
            at = np.arange(example.start - 1, len(example.ids) - 1)
            at = at if chosen is None else at[chosen[b]]
            rows.append(hidden[b, torch.from_numpy(at).to(self.device)])
            targets.append(torch.from_numpy(example.ids[at + 1]))
        return self.model.lm_head(torch.cat(rows)).float(), torch.cat(targets).to(self.device)
