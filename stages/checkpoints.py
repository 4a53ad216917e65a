"""Checkpoints: resolve a reference, check that it is complete, identify it, and load its tokenizer.

A reference is a folder in the Hugging Face format, an adapter's folder, or a Hub id (`user/name`, optionally with
`@revision`). Weights load from safetensors only.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sstoken.errors import SstokenError, UsageError, first_line
from sstoken.stages import folders, plain_json, storage
from sstoken.stages.adapter_kinds import check_kind
from sstoken.stages.hub_models import check_hub_id, hub_adapter, hub_commit, split_revision
from sstoken.stages.storage import expanded
from sstoken.stages.weight_files import ADAPTER_CONFIG, read_json, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACE_OF_BASE = ("base_model_name_or_path", "revision")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",  # the tokens that stop generation
    # used to build a missing tokenizer.json
    "*.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_OTHER_TASKS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForRewardModel",
)
"""Suffixes of class names whose weights load into a causal language model with meaningless output."""
_CODE = "*.py"
"""Code that runs under `trust_remote_code` and decides what is computed."""
_HUB_PAGES = ("https://huggingface.co/", "http://huggingface.co/", "https://hf.co/")


def local_folder(ref: str) -> Path | None:
    """Return the local folder of a checkpoint, or None for a full model on the Hub.

    A folder in an object store and an adapter on the Hub are downloaded into the cache.

    Raises:
        UsageError: `ref` looks like a path, but there is no such folder.
    """
    if not ref:
        raise UsageError("checkpoint is empty; name a folder or a Hub id")
    if ref.startswith(_HUB_PAGES):
        raise UsageError(f"checkpoint {ref!r} is a Hub page; use its id, {'/'.join(ref.split('/')[3:5])!r}")
    if "://" in ref:
        address = storage.address(ref)
        if not address.is_dir():
            raise UsageError(f"checkpoint {ref!r}: no such folder")
        return storage.local(address)
    path = expanded(ref)
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.exists():
        raise UsageError(
            f"checkpoint {ref!r} is a GGUF file, made for llama.cpp; name the checkpoint it was made from, or "
            f"convert it: from_pretrained(folder, gguf_file={path.name!r}), then save_pretrained"
        )
    if path.exists():
        raise UsageError(f"checkpoint {ref!r} is a file; name the folder that holds config.json and weights")
    if ref.startswith((".", "/", "~")) or ref.count("/") != 1 or not all(ref.split("/")):
        raise UsageError(f"checkpoint {ref!r}: no such folder (a Hub id has the form user/name)")
    check_hub_id(ref)
    return hub_adapter(ref, _TOKENIZER_FILES)


def lasting_reference(ref: str, commit: str | None = None) -> str:
    """Return a reference that is valid in any working directory: an absolute path, a URL, or a Hub id at its commit."""
    if "://" in ref:
        return ref
    if (folder := expanded(ref)).is_dir():
        return str(folder.resolve())
    name, revision = split_revision(ref)
    return f"{name}@{commit or revision}" if commit or revision else name


def adapter_base(ref: str) -> str | None:
    """Return the base model of an adapter's folder, or None if `ref` is not an adapter.

    A relative path is resolved against the working directory, as in peft, then against the adapter's folder.

    Raises:
        SstokenError: the adapter names no base, one that does not exist, or another adapter.
    """
    folder = local_folder(ref)
    if folder is None or not (file := folder / ADAPTER_CONFIG).is_file():
        return None
    config = read_json(file)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base or not isinstance(base, str):
        raise SstokenError(f"{file}: no base_model_name_or_path; say which model it adapts")
    found = [p for p in (expanded(base), folder / base) if p.is_dir()]
    models = [p for p in found if (p / "config.json").is_file() or (p / ADAPTER_CONFIG).is_file()]
    if len({p.resolve() for p in models}) > 1:
        raise SstokenError(
            f"{file}: base_model_name_or_path {base!r} is one model in the working directory and another in the "
            "adapter's folder; set it to an absolute path"
        )
    if found:
        place = (models or found)[0]
        if (place / ADAPTER_CONFIG).is_file():
            raise SstokenError(f"{file}: base_model_name_or_path names {_no_base(place, folder)}")
        return str(place)
    try:
        local_folder(base)
    except UsageError:
        raise SstokenError(
            f"{file}: base_model_name_or_path names a base that is not here, {base!r}; set it to the base's folder or "
            "Hub id"
        ) from None
    return f"{base}@{revision}" if revision else base


def _no_base(place: Path, adapter: Path) -> str:
    """Say why an adapter's folder is no base for an adapter, and what to do."""
    if place.resolve() == adapter.resolve():
        return "its own folder; move the adapter's files (adapter_*) into a folder of their own"
    return (
        f"another adapter, {str(place)!r}; merge that one into its base (merge_and_unload, then save_pretrained), and "
        "name the result"
    )


@contextlib.contextmanager
def _named_by(adapter: Path) -> Iterator[None]:
    """Add the adapter's name to an error about its base."""
    try:
        yield
    except SstokenError as error:
        raise SstokenError(
            f"{adapter}: base_model_name_or_path of its {ADAPTER_CONFIG} cannot be used: {error}"
        ) from error


def check_loadable(ref: str) -> None:
    """Refuse a local checkpoint that cannot load, without loading it. Hub ids pass.

    Raises:
        SstokenError: weights or config.json of the checkpoint or of its base are missing or truncated, or the kind of
            adapter or model is not supported.
    """
    folder = local_folder(ref)
    if folder is None:
        return
    base = adapter_base(ref)
    weight_files(folder)
    if base is not None:
        check_kind(ref, read_json(folder / ADAPTER_CONFIG))
        with _named_by(folder):
            check_loadable(base)
    elif not (folder / "config.json").is_file():
        raise SstokenError(f"{folder}: no config.json; name the folder of a Hugging Face checkpoint")
    else:
        _check_task(folder)


def _check_task(folder: Path) -> None:
    """Refuse a model whose config.json says it was trained for something other than predicting tokens."""
    named = read_json(folder / "config.json").get("architectures") or []
    if named and all(str(name).endswith(_OTHER_TASKS) for name in named):
        raise SstokenError(
            f"{folder}: its config.json says {named[0]}, which predicts no tokens; name a causal language model"
        )


def identity(ref: str, digest: Callable[[Path], str], also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what identifies a checkpoint's content: the digests of its weights and settings, or its Hub commit.

    `also` are patterns of further files to include.
    """
    folder = local_folder(ref)
    if folder is None:
        return {"hub": split_revision(ref)[0], "commit": hub_commit(ref)}
    base = adapter_base(ref)
    settings = _matching(folder, ("config.json", _CODE, *also))
    facts: dict[str, Any] = {"files": {f.name: digest(f) for f in (*weight_files(folder), *settings)}}
    if base is not None:
        config = read_json(folder / ADAPTER_CONFIG)
        facts["adapter"] = {k: v for k, v in config.items() if k not in _PLACE_OF_BASE}
        with _named_by(folder):
            facts["base"] = identity(base, digest)
    return facts


def tokenizer_identity(ref: str, digest: Callable[[Path], str]) -> dict[str, Any]:
    """Return what identifies the tokenization of `ref`: the digests of its tokenizer files, or its Hub commit."""
    folder = local_folder(ref)
    if folder is None:
        return {"hub": split_revision(ref)[0], "commit": hub_commit(ref)}
    files = _matching(folder, (*_TOKENIZER_FILES, _CODE))
    return {f.relative_to(folder).as_posix(): digest(f) for f in files}


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [f for pattern in patterns for f in sorted(folder.glob(pattern)) if f.is_file()]


def check_content(ref: str) -> None:
    """Refuse a snapshot that was damaged after `anchor` wrote it, or whose base was; other checkpoints pass."""
    folder = local_folder(ref)
    if folder is None:
        return
    for file in folders.listed_in(folder) or ():
        folders.check_file(file)
    if (base := adapter_base(ref)) is not None:
        check_content(base)


def load_tokenizer(ref: str, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a checkpoint for encoding.

    Raises:
        SstokenError: it is missing, does not load, has no EOS token, or is not a fast one (response masks need
            character offsets).
    """
    tokenizer = _any_tokenizer(ref, trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise SstokenError(f"{ref}: its tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    if not tokenizer.is_fast:
        raise SstokenError(f"{ref}: its tokenizer has no fast version (tokenizer.json); convert it first")
    return tokenizer


def _any_tokenizer(ref: str, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    name, revision = place(ref)
    if (folder := local_folder(ref)) is not None:
        for file in _matching(folder, (*_TOKENIZER_FILES, "config.json", _CODE)):
            folders.check_file(file)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and its own types
        reason = first_line(error)
        if folder is not None and not (folder / "tokenizer.json").is_file():
            reason = "no tokenizer.json there"
            if (folder / ADAPTER_CONFIG).is_file():
                raise SstokenError(f"{ref}: an adapter without a tokenizer; name its base") from error
        raise SstokenError(
            f"{ref}: its tokenizer does not load ({reason}); name a folder that tokenizer.save_pretrained(folder) wrote"
        ) from error
    return tokenizer


def stop_tokens(ref: str, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the tokens that stop generation: those of generation_config.json, else the EOS token."""
    from transformers import GenerationConfig

    name, revision = place(ref)
    try:
        ids = GenerationConfig.from_pretrained(name, revision=revision).eos_token_id
    except Exception:  # a folder with a tokenizer alone, or a Hub repository without the file
        ids = None
    ids = tokenizer.eos_token_id if ids is None else ids
    return [
        str(token)
        for token in tokenizer.convert_ids_to_tokens([ids] if isinstance(ids, int) else list(ids))
        if token
    ]


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash a vocabulary: 16 hexadecimal digits, equal for tokenizers that map every id to the same token."""
    return plain_json.digest(sorted(tokenizer.get_vocab().items()))[:16]


def own_tokenizer(ref: str, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer that ships with a checkpoint, or with its base if it is an adapter without one; else None.

    It is for comparing vocabularies: unlike that of `load_tokenizer`, it may lack what encoding needs.
    """
    folder = local_folder(ref)
    if folder is not None and not _matching(folder, ("tokenizer_config.json", "tokenizer.json")):
        base = adapter_base(ref)
        return None if base is None else own_tokenizer(base, trust_remote_code=trust_remote_code)
    return _any_tokenizer(ref, trust_remote_code)


def stamp(ref: str) -> tuple[Any, ...]:
    """Return a cache key that changes when the files of a local checkpoint or of its base change."""
    folder = local_folder(ref)
    if folder is None:
        return ()
    own = tuple(
        (str(folder.resolve()), file.name, *storage.stamp(file))
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".json", ".jinja", ".py") and file.is_file()
    )
    base = adapter_base(ref)
    return own if base is None else own + stamp(base)


def place(ref: str) -> tuple[str, str | None]:
    """Return the arguments for `from_pretrained`: a folder, or a Hub id and its revision."""
    folder = local_folder(ref)
    return split_revision(ref) if folder is None else (str(folder), None)
