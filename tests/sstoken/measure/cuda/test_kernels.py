"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter takes the bits of bfloat16 for integers in a product, so that 16-bit types are tested by float16 there.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from sstoken.measure.cuda.choices import (
    choose_prompt_attention,
    choose_token_losses,
    plain_token_losses,
    prompt_attention_by_kernel,
)
from sstoken.measure.cuda.prompt_attention import packed_prompt_attention
from sstoken.measure.cuda.token_loss import fused_token_losses
from sstoken.measure.prompt_attention import prompt_attention
from tests.support import ROOT, slow_but

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
LENGTHS = [1, 70, 130, 5, 64]
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(DEVICE)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)
HOW = {
    "plain": {},
    "window": {"window": 16},
    "window of one": {"window": 1},
    "wide window": {"window": 70},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": SINKS},
    "all": {"window": 67, "softcap": 5.0, "sinks": SINKS},
}


def random_states(dtype, num_kv_heads, head_size):
    generator = torch.Generator().manual_seed(1)
    states = [
        2 * torch.randn(heads, sum(LENGTHS), head_size, generator=generator) for heads in (4, num_kv_heads)
    ]
    mask = torch.rand(sum(LENGTHS), generator=generator) < 0.5
    mask[20:60] = False  # a block of rows with nothing to measure
    mask[100:170] = True
    return *(s.to(DEVICE, dtype).transpose(0, 1) for s in states), mask.to(DEVICE)


def mass_from_the_definition(query, key, response_mask, scaling, softcap=None, sinks=None, window=None):
    """In float64, all weights at once."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).to(DEVICE)
    position = torch.arange(sum(LENGTHS), device=DEVICE)
    behind = position[:, None] - position
    seen = (sequence[:, None] == sequence) & (behind >= 0) & (behind < (window or 10**9))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : sum(LENGTHS)]
    return (weights * ~response_mask).sum(-1).mean(0) * response_mask


@pytest.mark.parametrize("how", slow_but(("plain", "all"), HOW))
@pytest.mark.parametrize(
    ("dtype", "num_kv_heads", "head_size"), [*((dtype, 2, 12) for dtype in DTYPES), (DTYPES[-1], 4, 128)]
)
def test_prompt_attention_is_exact(how, dtype, num_kv_heads, head_size):
    query, key, mask = random_states(dtype, num_kv_heads, head_size)
    found = packed_prompt_attention(
        query, key, mask, CU_SEQLENS, max(LENGTHS), scaling=head_size**-0.5, **HOW[how]
    )
    expected = mass_from_the_definition(query, key, mask, head_size**-0.5, **HOW[how])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=3e-6, rtol=0)
    assert not found[~mask].any()


@pytest.mark.parametrize("padded", [True, False])
def test_a_batch_by_the_kernel_is_a_batch_by_torch(padded):
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(3, heads, 50, 16, generator=generator).to(DEVICE) for heads in (4, 2))
    mask = (torch.rand(3, 50, generator=generator) < 0.4).to(DEVICE)
    mask[1, 30:] = False
    segments = None if padded else [(0, 0, 20), (0, 20, 50), (1, 0, 30), (2, 0, 50)]
    how = {"scaling": 0.3, "window": 20, "sinks": SINKS}
    found = prompt_attention_by_kernel(query, key, mask, None, segments, **how)
    torch.testing.assert_close(found, prompt_attention(query, key, mask, None, segments, **how))
    with pytest.raises(NotImplementedError, match="no mask"):
        prompt_attention_by_kernel(query, key, mask, torch.ones(3, 1, 50, 50, dtype=torch.bool), **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.5, 4.0), (True, 2.0, None)]
)
def test_losses_are_exact(dtype, bias, scale, softcap, monkeypatch):
    monkeypatch.setattr("sstoken.measure.cuda.token_loss._ROWS", 20)
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 24, generator=generator).to(DEVICE, dtype) for n in (45, 3001))
    biases = torch.randn(3001, generator=generator).to(DEVICE, dtype) if bias else None
    targets = torch.randint(3001, (45,), generator=generator).to(DEVICE)
    targets[:2] = torch.tensor([0, 3000])
    if biases is not None and softcap is None:  # the first tile has no possible token
        biases[:1500] = -torch.inf
        targets.clamp_min_(1500)
    # Several tiles of rows and of columns; 3001 is no multiple of anything.
    found = fused_token_losses(hidden, targets, weight, biases, scale, softcap, tile_elements=20 * 1000)
    logits = hidden.double() @ weight.double().T * scale
    if biases is not None:
        logits += biases.double() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_losses_of_nothing_and_of_nan():
    hidden, weight = torch.ones(2, 8, device=DEVICE), torch.ones(30, 8, device=DEVICE)
    targets = torch.tensor([3, 4], device=DEVICE)
    assert fused_token_losses(hidden[:0], targets[:0], weight).shape == (0,)
    hidden[1, 0] = float("nan")
    assert fused_token_losses(hidden, targets, weight).isnan().tolist() == [False, True]


def test_the_kernels_are_chosen_where_they_work():
    choice = choose_prompt_attention(DEVICE, torch.float16, 4, 2, 16, window=True, softcap=5.0, sinks=True)
    assert (choice.name, choice.call) == ("triton", prompt_attention_by_kernel)
    choice = choose_token_losses(DEVICE, torch.float16, 24, bias=True, scale=0.5, softcap=4.0)
    assert (choice.name, choice.call) == ("triton", fused_token_losses)


@pytest.mark.skipif(GPU, reason="a fault of the interpreter alone")
def test_a_kernel_that_gives_wrong_numbers_is_not_chosen():
    choice = choose_prompt_attention(DEVICE, torch.bfloat16, 4, 2, 16)
    assert (choice.name, choice.call) == ("torch", prompt_attention)
    assert "triton: differs from torch" in choice.reason


def test_losses_fall_back_to_plain_torch(monkeypatch):
    def broken():
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr("sstoken.measure.cuda.token_loss._compiled", broken)
    choice = choose_token_losses(DEVICE, torch.float32, 40)
    assert (choice.name, choice.call) == ("torch", plain_token_losses)
    assert choice.reason == "triton: No module named 'triton'"


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.sstoken.measure.cuda.compiling"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 5
    for kernel in kernels:
        assert kernel["machine_code"] > 0
        assert kernel["shared_bytes"] <= 64 * 1024, kernel  # what the smallest supported GPU has
        # Without tensor cores a 16-bit product would crawl; with them an fp32 product would be tf32.
        assert kernel["tensor_cores"] == (kernel["kernel"] in ("mass bf16", "mass fp16")), kernel
