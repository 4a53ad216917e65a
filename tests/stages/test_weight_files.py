"""Which weight files count, and what is said of a folder without any."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sstoken.errors import SstokenError
from sstoken.stages.checkpoints import adapter_base, check_loadable, identity, load_tokenizer, stamp
from sstoken.stages.folders import hash_file
from sstoken.stages.loading import load_model
from sstoken.stages.weight_files import weight_files
from tests.factories import save_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def model(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "model"))


def sharded(folder: Path) -> Path:
    """Beside what is there: the same architecture with other weights, as shards with their index."""
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    other.save_pretrained(folder.with_name("sharded"), max_shard_size="20KB")
    for file in folder.with_name("sharded").glob("model*"):
        shutil.copy(file, folder)
    return folder


def touch(place: str, content: bytes = b"x"):
    def make(folder: Path) -> None:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)

    return make


def test_a_newer_single_file_goes_before_old_shards(model):
    sharded(model)
    assert [f.name for f in weight_files(model)] == ["model.safetensors"]
    loaded = load_model(str(model))[0].state_dict()
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.equal(loaded[name], tensor)


def test_an_index_whose_shards_are_gone_does_not_matter(model):
    sharded(model)
    for shard in model.glob("model-0*"):
        shard.unlink()
    check_loadable(str(model))
    load_model(str(model))


def test_only_what_is_loaded_is_part_of_the_identity(model):
    sharded(model)
    before = identity(str(model), hash_file)
    for shard in model.glob("model-0*"):
        shard.write_bytes(b"another run's")
    touch("model.fp16.safetensors")(model)
    assert identity(str(model), hash_file) == before
    save_file({"a": torch.ones(1)}, model / "model.safetensors")
    assert identity(str(model), hash_file) != before


def test_new_weights_of_the_same_size_and_time_are_noticed(model):
    file = model / "model.safetensors"
    before, times = stamp(str(model)), file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as opened:  # in place: the same inode
        opened.write(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert stamp(str(model)) != before


def test_an_adapters_stamp_and_identity_cover_its_base(model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, adapter / "adapter_model.safetensors")
    seen, content = stamp(str(adapter)), identity(str(adapter), hash_file)
    moved = Path(shutil.move(model, tmp_path / "moved"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../moved"}))
    assert identity(str(adapter), hash_file) == content, "where the base lies does not matter"
    touch("model.safetensors", (moved / "model.safetensors").read_bytes() + b"")(moved)
    assert stamp(str(adapter)) != seen
    (moved / "config.json").write_text((moved / "config.json").read_text() + "\n")
    assert identity(str(adapter), hash_file) != content


WITHOUT_WEIGHTS = {
    "DeepSpeed": (("zero_to_fp32.py", "global_step5/zero_pp_rank_0_model_states.pt"), "python .*zero_to_fp32.py"),
    "DeepSpeed, no script": (("global_step5/mp_rank_00_model_states.pt", "latest"), "zero_to_fp32.py on the folder"),
    "inside DeepSpeed's": (("mp_rank_00_model_states.pt",), "zero_to_fp32.py on the folder"),
    "FSDP": (("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"), "accelerate merge-weights .*fsdp_0 "),
    "inside FSDP's": (("__0_0.distcp", ".metadata"), "accelerate merge-weights"),
    "Megatron": (("latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt"), "Megatron"),
    "GGUF": (("model-Q4_K_M.gguf",), "weights are GGUF .*gguf_file="),
    "pickled": (("pytorch_model.bin", "optimizer.pt", "training_args.bin"), r"pickled \(pytorch_model.bin\)"),
    "Meta's": (("consolidated.00.pth",), r"pickled \(consolidated.00.pth\)"),
    "TensorFlow": (("tf_model.h5",), "tf_model.h5, not PyTorch's"),
    "trainer's state": (("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"), "a trainer's state"),
    "DeepSpeed, universal": (("global_step5_universal/zero/a/fp32.pt", "latest"), "zero_to_fp32.py on the folder"),
    "Megatron, distributed": (("latest_checkpointed_iteration.txt", "iter_0000010/__0_0.distcp"), "Megatron"),
    "NeMo": (("weights/__0_0.distcp", "context/model.yaml"), "NeMo"),
    "torchtitan": (("step-100/__0_0.distcp", "step-100/.metadata"), "torch's sharded checkpoints"),
    "ONNX": (("onnx/model.onnx",), "onnx/model.onnx, not PyTorch's"),
    "trainer's output": (
        ("checkpoint-10/config.json", "checkpoint-9/config.json", "checkpoint-10/model.safetensors"),
        "name one of them, such as .*checkpoint-10$",
    ),
    "history": (("history.json", "step-4/config.json"), "name one of them, such as .*step-4"),
    "shards without index": (("model-00001-of-00002.safetensors",), "without model.safetensors.index.json"),
    "adapter without config": (("adapter_model.safetensors",), "without adapter_config.json"),
    "another name": (("consolidated.safetensors",), "transformers does not load consolidated.safetensors"),
    "Git LFS": (("model.safetensors",), "Git LFS pointer; run git lfs pull"),
    "nothing": ((), r"no \*.safetensors file|a tokenizer and no model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WITHOUT_WEIGHTS)
@pytest.mark.parametrize("configured", [True, False])
def test_a_folder_without_weights_gets_the_line_that_helps(kind, configured, model):
    places, words = WITHOUT_WEIGHTS[kind]
    (model / "model.safetensors").unlink()
    if not configured:
        (model / "config.json").unlink()
    for place in places:
        touch(place, b"version https://git-lfs.github.com/spec/v1\n")(model)
    with pytest.raises(SstokenError, match=words) as refused:
        check_loadable(str(model))
    assert "\n" not in str(refused.value)


def test_placeholders_of_sharded_training_are_no_weights(model):
    names = list(load_file(model / "model.safetensors"))
    save_file({name: torch.zeros(0) for name in names}, model / "model.safetensors")
    with pytest.raises(SstokenError, match="holds empty tensors; gather the weights"):
        check_loadable(str(model))
    touch("zero_to_fp32.py")(model)
    with pytest.raises(SstokenError, match=r"run zero_to_fp32.py"):
        check_loadable(str(model))


def test_a_cut_file_is_refused_before_any_work(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SstokenError, match="bytes where its header says"):
        check_loadable(str(model))


def test_more_bytes_than_the_header_says_are_refused_too(model):
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"rest")
    with pytest.raises(SstokenError, match="bytes where its header says"):
        check_loadable(str(model))


def test_a_link_to_nothing_is_called_one(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(model / "gone")
    with pytest.raises(SstokenError, match=r"model.safetensors: a link to a file that is gone"):
        check_loadable(str(model))
    stamp(str(model))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"metadata": {}, "weight_map": {"a": 3}}, "names no weight file"),
        ({"metadata": {}, "weight_map": ["a"]}, "names no weight file"),
        ({"metadata": {}}, "names no weight file"),
        ({"weight_map": {"a": "config.json"}}, 'has no "metadata"'),
    ],
)
def test_an_index_that_cannot_be_used_gets_a_line(index, words, model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SstokenError, match=words):
        check_loadable(str(model))


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_pointer_in_place_of_a_configuration_is_called_one(name, model):
    touch(name, b"version https://git-lfs.github.com/spec/v1\n")(model)
    with pytest.raises(SstokenError, match=f"{name}: a Git LFS pointer; run git lfs pull"):
        check_loadable(str(model))


def test_an_adapter_without_a_tokenizer_is_nothing_to_encode_with(model, tmp_path):
    with pytest.raises(SstokenError, match="an adapter without a tokenizer; name its base"):
        load_tokenizer(str(adapter_of(tmp_path / "adapter", str(model))))


def test_a_tokenizer_alone_is_no_model(model):
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (model / name).unlink()
    with pytest.raises(SstokenError, match="a tokenizer and no model"):
        check_loadable(str(model))


def adapter_of(folder: Path, base: str) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_of_an_adapter_is_refused(model, tmp_path):
    adapter_of(tmp_path / "first", str(model))
    second = adapter_of(tmp_path / "second", "../first")
    for use in (check_loadable, stamp, lambda ref: identity(ref, hash_file)):
        with pytest.raises(SstokenError, match=r"names another adapter, .*merge that one into its base"):
            use(str(second))


@pytest.mark.parametrize("base", [".", "../a", "../b"])
def test_adapters_that_name_themselves_or_each_other_are_refused(base, tmp_path):
    adapter_of(tmp_path / "b", "../a")
    words = "names another adapter" if base == "../b" else "names its own folder; move the adapter's files"
    with pytest.raises(SstokenError, match=words):
        check_loadable(str(adapter_of(tmp_path / "a", base)))


def test_a_relative_base_is_a_model_wherever_the_command_runs(model, tmp_path, monkeypatch):
    """A folder of that name in the working directory is not taken for the base, unless it is a model."""
    adapter = adapter_of(tmp_path / "adapter", "../model")
    elsewhere = tmp_path / "a" / "b"
    elsewhere.mkdir(parents=True)
    (elsewhere.parent / "model").mkdir()
    monkeypatch.chdir(elsewhere)
    assert adapter_base(str(adapter)) == str(adapter / "../model")
    shutil.copytree(model, elsewhere.parent / "model", dirs_exist_ok=True)
    with pytest.raises(SstokenError, match="and another in the adapter's folder"):
        adapter_base(str(adapter))


def test_an_adapter_inside_its_bases_folder_is_refused(model):
    with pytest.raises(SstokenError, match="names its own folder"):
        check_loadable(str(adapter_of(model, str(model))))


@pytest.mark.parametrize("base_path", ["/home/someone/models/llama", "../gone", "gone"])
def test_an_adapter_whose_base_is_elsewhere_names_the_field(base_path, tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": base_path}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        SstokenError, match=r"adapter_config.json: base_model_name_or_path names a base .* set it to"
    ):
        check_loadable(str(tmp_path))
