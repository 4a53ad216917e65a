"""Every causal architecture of transformers: right values, or a refusal that names it; the documentation says which."""

import pytest
from transformers import AutoModelForCausalLM

from sstoken.measure.architecture import examine
from tests.smollm2 import FOLDER, needs_smollm2
from tests.sstoken.measure import tiny_architectures
from tests.sstoken.measure.tiny_architectures import WRONG, architectures, classify
from tests.support import ROOT

CORE = (
    "bloom", "deepseek_v3", "falcon", "falcon_h1", "gemma2", "gpt_oss", "gptj", "granitemoe", "lfm2", "llama",
    "minimax", "mixtral", "mpt", "qwen3_5_text", "rwkv", "xlnet",
)  # fmt: skip
PAGE = ROOT / "docs" / "architectures.md"


@pytest.fixture(autouse=True)
def silent():
    import transformers

    before = transformers.logging.get_verbosity()
    tiny_architectures.silence()
    yield
    transformers.logging.set_verbosity(before)


def documented():
    rows = [
        line.strip("| \n").split(" | ", 1) for line in PAGE.read_text().splitlines() if line.startswith("| ")
    ]
    return dict(rows[1:])


@pytest.mark.parametrize("kind", CORE)
def test_a_core_architecture_is_as_documented(kind):
    assert classify(kind) == documented()[kind]


def test_nothing_documented_is_wrong():
    assert not [kind for kind, said in documented().items() if said.startswith(WRONG)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(architectures()) - set(CORE)))
def test_an_architecture_is_as_documented(kind):
    assert classify(kind) == documented()[kind]


@pytest.mark.slow
def test_every_architecture_is_documented():
    assert set(documented()) == set(architectures())


@needs_smollm2
def test_a_pretrained_model_in_bfloat16_with_eager_attention_is_measured():
    """Its lowest ids are special tokens that were hardly trained, on which eager attention and sdpa differ by 69 %."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="bfloat16", attn_implementation="eager")
    assert examine(model.eval()).softmax_layers == tuple(range(model.config.num_hidden_layers))
