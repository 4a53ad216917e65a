"""Find the weight files of a checkpoint as transformers and peft do, and say why a folder has none."""

import struct
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError
from sstoken.stages import plain_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000
"""Bytes; safetensors allows no larger header."""
_TRAINER_STATE = (
    "optimizer.*",
    "optimizer_*",
    "scheduler.*",
    "rng_state*",
    "random_states_*",
    "scaler.pt",
    "trainer_state.json",
)
_NO_WEIGHTS = (*_TRAINER_STATE, "training_args.bin", "*_states.pt")
_EXPORT = "export it to the Hugging Face format and name that folder"
_OTHER_FORMATS = (
    (
        ("latest_checkpointed_iteration.txt", "iter_*/mp_rank_*", "mp_rank_*"),
        f"a Megatron checkpoint ({{file}}); {_EXPORT}",
    ),
    (("*.nemo", "weights/*.distcp", "context/model.yaml"), f"a NeMo checkpoint ({{file}}); {_EXPORT}"),
    (
        ("*.distcp", "*model*/*.distcp"),
        "FSDP shards ({file}) and no full weights; merge them: accelerate merge-weights {place} {folder}",
    ),
    (
        ("*/*.distcp",),
        "torch's sharded checkpoints ({file}) and no full weights; convert one to the Hugging Face format with the "
        "trainer that wrote it, and name that folder",
    ),
    (
        ("*.gguf",),
        "weights are GGUF ({file}), made for llama.cpp; name the checkpoint it was made from, or convert it: "
        "from_pretrained(folder, gguf_file={file!r}), then save_pretrained",
    ),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt"),
        "weights are pickled ({file}), which can run code when loaded; convert them with "
        "model.save_pretrained(folder), which writes safetensors",
    ),
    (
        ("*.h5", "*.msgpack", "*.npz", "*.onnx", "onnx/*.onnx", "_CHECKPOINT_METADATA"),
        "weights are {file}, not PyTorch's; convert them to safetensors with save_pretrained",
    ),
)
"""Formats that are not loaded: patterns of their files, and the error, in order of precedence."""


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers or peft would load.

    As there, `model.safetensors` takes precedence over a shard index, whose shards may belong to an older model.

    Raises:
        SstokenError: there are none (the error says what the folder holds instead and what to do), or one is missing
            or truncated.
    """
    files = _adapter_files(folder) if (folder / ADAPTER_CONFIG).is_file() else _model_files(folder)
    for file in files:
        _check_file(folder, file)
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        SstokenError: the file is unreadable or holds something else.
    """
    try:
        text = path.read_text()
        if text.startswith("version https://git-lfs"):
            raise SstokenError(f"{path}: a Git LFS pointer; run git lfs pull")
        value = plain_json.parse(text)
    except (OSError, ValueError) as error:
        raise SstokenError(f"{path}: not readable as JSON ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise SstokenError(f"{path}: holds a JSON {type(value).__name__}, not an object; copy the file again")
    return value


def _adapter_files(folder: Path) -> list[Path]:
    if (folder / ADAPTER_WEIGHTS).is_file():
        return [folder / ADAPTER_WEIGHTS]
    if (folder / "adapter_model.bin").is_file():
        raise SstokenError(
            f"{folder}: weights are pickled (adapter_model.bin), which can run code when loaded; convert them with "
            f"PeftModel.save_pretrained(folder), which writes {ADAPTER_WEIGHTS}"
        )
    if (folder / _WEIGHTS).is_file() or (folder / _INDEX).is_file():
        raise SstokenError(
            f"{folder}: {ADAPTER_CONFIG} beside the weights of a full model and no {ADAPTER_WEIGHTS}; remove "
            f"{ADAPTER_CONFIG} if the adapter was merged, else copy the adapter again"
        )
    raise _without_weights(
        folder, f"no *.safetensors file; copy or download the adapter ({ADAPTER_WEIGHTS}) again"
    )


def _model_files(folder: Path) -> list[Path]:
    config = folder / "config.json"
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    if named is not None:  # transformers' own setting takes precedence
        if not isinstance(named, str) or not (folder / named).is_file():
            raise SstokenError(
                f"{folder}: config.json names weights {named!r}, which are not there; copy them again"
            )
        return _shards(folder / named) if named.endswith(".index.json") else [folder / named]
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        return _shards(folder / _INDEX)
    for name in (_WEIGHTS, _INDEX):
        if (folder / name).is_symlink():
            raise SstokenError(f"{folder / name}: a link to a file that is gone; copy or download it again")
    others = sorted(p.name for p in folder.glob("*.safetensors") if p.is_file())
    if (folder / ADAPTER_WEIGHTS).is_file():
        raise SstokenError(
            f"{folder}: {ADAPTER_WEIGHTS} without {ADAPTER_CONFIG}; copy or download the adapter again"
        )
    if any(name.startswith("model-0") for name in others):
        raise SstokenError(f"{folder}: shards ({others[0]}) without {_INDEX}; copy or download that file")
    if others:
        raise SstokenError(
            f"{folder}: transformers does not load {others[0]}; name it {_WEIGHTS}, or add {_INDEX} for shards"
        )
    raise _without_weights(folder, "no *.safetensors file; not a checkpoint, or an incomplete one")


def _shards(index: Path) -> list[Path]:
    """Return the files named by a shard index."""
    held = read_json(index)
    names = held.get("weight_map")
    named = list(names.values()) if isinstance(names, dict) else []
    if not named or not all(isinstance(name, str) for name in named):
        raise SstokenError(f"{index}: names no weight file; copy or download the checkpoint again")
    shards = sorted(set(named))
    missing = [s for s in shards if not (index.parent / s).is_file() or not (index.parent / s).stat().st_size]
    if missing:
        raise SstokenError(
            f"{index.parent}: {len(missing)} of {len(shards)} weight files missing (first: {missing[0]}); copy or "
            "download the checkpoint again"
        )
    if not isinstance(held.get("metadata"), dict):
        raise SstokenError(
            f'{index}: has no "metadata", without which transformers does not load it; add {{}}'
        )
    return [index.parent / shard for shard in shards]


def _check_file(folder: Path, file: Path) -> None:
    """Refuse a safetensors file that is truncated or holds the empty placeholders of sharded training."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LARGEST_HEADER
        try:
            if length >= min(_LARGEST_HEADER, size):
                raise ValueError
            header = plain_json.parse_object(opened.read(length))
            tensors = [v for k, v in header.items() if k != "__metadata__"]
            end = 8 + length + max((t["data_offsets"][1] for t in tensors), default=0)
            empty = [t for t in tensors if 0 in t["shape"]]
        except (ValueError, TypeError, LookupError, AttributeError):
            pointer = start.startswith(b"version ")
            incomplete = "not a complete safetensors file; copy it again"
            what = "a Git LFS pointer; run git lfs pull" if pointer else incomplete
            raise SstokenError(f"{file}: {what}") from None
    if size != end:
        raise SstokenError(f"{file}: {size:,} bytes where its header says {end:,}; copy or download it again")
    # ZeRO-3 leaves small tensors whole, and quantizers write a few empty ones.
    if 2 * len(empty) > len(tensors):
        raise _without_weights(
            folder, f"{file.name} holds empty tensors; gather the weights of sharded training"
        )


def _without_weights(folder: Path, otherwise: str) -> SstokenError:
    """Return the error for a folder without loadable weights: what it holds, and what to do instead."""

    def names(*patterns: str) -> list[str]:
        found = {path for pattern in patterns for path in folder.glob(pattern)}
        return sorted(path.relative_to(folder).as_posix() for path in found)

    def error(reason: str) -> SstokenError:
        return SstokenError(f"{folder}: {reason}")

    if names("zero_to_fp32.py", "global_step*/", "zero_pp_rank_*", "*_model_states.pt"):
        script = folder / "zero_to_fp32.py"
        if not script.is_file():
            return error(
                "a DeepSpeed checkpoint with no gathered weights; run DeepSpeed's zero_to_fp32.py on the folder that "
                "holds `latest` (--safe_serialization), and name its output"
            )
        return error(
            "a DeepSpeed checkpoint with no gathered weights; run zero_to_fp32.py: "
            f"python {script} {folder} {folder} --safe_serialization"
        )
    for patterns, reason in _OTHER_FORMATS:
        if found := [name for name in names(*patterns) if name not in names(*_NO_WEIGHTS)]:
            return error(reason.format(file=found[0], place=(folder / found[0]).parent, folder=folder))
    if found := names(
        "history.json",
        "step-*/config.json",
        "checkpoint-*/config.json",
        "*/adapter_config.json",
        "*/model*.safetensors",
    ):
        inside = sorted({Path(n).parent.name for n in found if "/" in n}, key=_by_number)
        place = folder / (inside[-1] if inside else "step-<K>")
        return error(f"a folder of checkpoints, no checkpoint itself; name one of them, such as {place}")
    if found := names(*_TRAINER_STATE):
        return error(
            f"a trainer's state ({found[0]}) and no weights; name a checkpoint that was saved with its model "
            "(model.safetensors)"
        )
    if names("tokenizer.json", "tokenizer_config.json") and not names("config.json", "*.safetensors"):
        return error("a tokenizer and no model; name the model's folder")
    return error(otherwise)


def _by_number(name: str) -> tuple[int, str]:
    """Sort key that puts `checkpoint-1000` after `checkpoint-500`."""
    return int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdigit() else -1, name
