"""Attention over packed sequences: the loop against float64 eager attention, and how one of several is chosen."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sstoken.measure.cuda.agreement import first_that_agrees
from sstoken.measure.cuda.flex import block_mask, flex
from sstoken.measure.cuda.varlen import CANDIDATES, choose_among, choose_varlen, loop, varlen_attention
from tests.support import slow_but

LENGTHS = [1, 40, 7, 129, 3]
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
HOW = {
    "plain": {},
    "window": {"window": 8},
    "window of one": {"window": 1},
    "window wider than all": {"window": 500},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "all": {"window": 17, "softcap": 3.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


def random_states(num_kv_heads, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(heads, sum(LENGTHS), 12, generator=generator).to(dtype).transpose(0, 1)
        for heads in (4, num_kv_heads, num_kv_heads)
    ]


def eager(query, key, value, scaling, window=None, softcap=None, sinks=None):
    """From the definition, in float64."""
    query, key, value = (states.double().transpose(0, 1) for states in (query, key, value))
    key, value = (s.repeat_interleave(query.shape[0] // s.shape[0], 0) for s in (key, value))
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    behind = torch.arange(sum(LENGTHS))[:, None] - torch.arange(sum(LENGTHS))
    seen = (sequence[:, None] == sequence) & (behind >= 0) & (behind < (window or 10**9))
    scores = query @ key.transpose(1, 2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    return (scores.softmax(-1)[..., : sum(LENGTHS)] @ value).transpose(0, 1)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_the_loop_is_exact(how, num_kv_heads, monkeypatch):
    monkeypatch.setattr("sstoken.measure.cuda.varlen.BLOCK_ELEMENTS", 1500)  # several blocks a sequence
    states = random_states(num_kv_heads)
    found = loop(*states, CU_SEQLENS, max(LENGTHS), scaling=0.4, **HOW[how])
    assert (found - eager(*states, 0.4, **HOW[how])).abs().max() < 2e-6


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("how", slow_but(("all",), HOW))
def test_flex_is_exact(how):
    states = random_states(2)
    options = {"window": None, "softcap": None, "sinks": None} | HOW[how]
    found = flex(flex_attention, *states, CU_SEQLENS, 0.4, **options)
    assert (found - eager(*states, 0.4, **HOW[how])).abs().max() < 2e-6


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize("lengths", [[700], [100, 28, 128, 1, 400, 127], [129, 255, 256], [3]])
def test_blocks_of_flex_are_those_of_the_whole_mask(lengths, window):
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    found, total = block_mask(offsets, sum(lengths), window), sum(lengths)
    expected = create_block_mask(found.mask_mod, None, None, total, total, device="cpu")
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert torch.equal(whole_blocks(found), whole_blocks(expected))


def whole_blocks(mask):
    count, indices = mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0]
    whole = torch.zeros(indices.shape, dtype=torch.bool)
    for row, number in enumerate(count.tolist()):
        whole[row, indices[row, :number].long()] = True
    return whole


def test_on_a_cpu_the_loop_is_chosen_and_the_reasons_are_said():
    choice = choose_varlen(torch.device("cpu"), torch.float32, 4, 2, 12)
    assert choice.name == "loop"
    assert all(name in choice.reason for name in CANDIDATES)
    states = random_states(2)
    found = varlen_attention(*states, CU_SEQLENS, max(LENGTHS), scaling=0.4)
    assert torch.equal(found, loop(*states, CU_SEQLENS, max(LENGTHS), scaling=0.4))


def leaks(*states, scaling, window, softcap, sinks):
    """Right for one sequence: forgets where sequences start."""
    one = torch.tensor([0, states[0].shape[0]])
    return loop(*states[:3], one, 0, scaling=scaling, window=window, softcap=softcap, sinks=sinks)


def one_too_many(*states, scaling, window, softcap, sinks):
    """A window that is one token too wide."""
    wider = None if window is None else window + 1
    return loop(*states, scaling=scaling, window=wider, softcap=softcap, sinks=sinks)


def knows_no_sinks(*states, scaling, window, softcap, sinks):
    return loop(*states, scaling=scaling, window=window, softcap=softcap)


def breaks(*states, **how):
    raise RuntimeError("no kernel image is available\nfor execution")


def choose(candidates, dtype=torch.float32, **how):
    how = {"window": False, "softcap": None, "sinks": False} | how
    return choose_among(candidates, torch.device("cpu"), dtype, 4, 2, 16, **how)


def test_a_candidate_that_errs_or_disagrees_is_passed_over():
    choice = choose({"broken": breaks, "leaky": leaks, "right": loop, "late": loop})
    assert choice.name == "right"
    assert choice.call is loop
    assert "broken: no kernel image is available" in choice.reason
    assert "leaky: differs from loop" in choice.reason
    assert choose({"broken": breaks}).name == "loop"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_small_mistakes_show_in_every_dtype(dtype):
    assert choose({"wide": one_too_many}, dtype, window=True).name == "loop"
    assert choose({"wide": one_too_many}, dtype).name == "wide"
    assert choose({"sinkless": knows_no_sinks}, dtype, sinks=True).name == "loop"
    assert choose({"right": loop}, dtype, window=True, sinks=True, softcap=20.0).name == "right"


def test_nan_and_another_shape_are_no_agreement():
    trials = [((torch.ones(3),), {})]
    candidates = {"nan": lambda x: x * float("nan"), "shape": lambda x: x[:2]}
    choice = first_that_agrees(candidates, ("same", lambda x: x), trials)
    assert choice.name == "same"
    assert "nan: differs" in choice.reason
    assert "shape: gives the shape [2], not [3]" in choice.reason
