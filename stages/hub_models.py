"""Checkpoints on the Hub: resolve a reference to a commit, and download adapters."""

from functools import cache
from pathlib import Path

from sstoken.errors import SstokenError, UsageError, first_line
from sstoken.stages.weight_files import ADAPTER_CONFIG

REMEDY = "name what is on this disk, or check the id, the network (HTTPS_PROXY) and `hf auth login`"


def split_revision(ref: str) -> tuple[str, str | None]:
    """Split `user/name@revision`."""
    name, _, revision = ref.partition("@")
    return name, revision or None


def check_hub_id(ref: str) -> None:
    """Refuse what cannot be a Hub id, for example because it contains a space."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(split_revision(ref)[0])
    except HFValidationError as error:
        raise UsageError(
            f"checkpoint {ref!r}: neither a folder nor a Hub id ({first_line(error)})"
        ) from error


@cache  # ask the Hub once per process
def hub_adapter(ref: str, besides: tuple[str, ...]) -> Path | None:
    """Download an adapter from the Hub and return its folder; None if it is no adapter, or the Hub does not answer.

    `besides` are patterns of other files to download.
    """
    from huggingface_hub import constants, model_info, snapshot_download, try_to_load_from_cache

    name, revision = split_revision(ref)
    try:
        if constants.HF_HUB_OFFLINE:
            cached = try_to_load_from_cache(name, ADAPTER_CONFIG, revision=revision)
            return Path(cached).parent if isinstance(cached, str) else None
        info = model_info(name, revision=revision)
        if ADAPTER_CONFIG not in (file.rfilename for file in info.siblings or ()):
            return None
        wanted = ["adapter_*", *besides]
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=wanted))
    except Exception:  # no answer, missing or private: the next request reports which
        return None


def hub_commit(ref: str) -> str:
    """Return the current commit of a Hub id; offline, that of the cached copy.

    Raises:
        UsageError: not a Hub id.
        SstokenError: the Hub does not answer for it.
    """
    from huggingface_hub import constants, model_info, try_to_load_from_cache

    check_hub_id(ref)
    name, revision = split_revision(ref)
    if constants.HF_HUB_OFFLINE:  # loading will use the cached copy
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name
    try:
        return str(model_info(name, revision=revision).sha)
    except Exception as error:  # offline, missing or private
        raise SstokenError(
            f"{ref}: no such folder{_beside(ref)}, and the Hub does not answer for it ({first_line(error)}); {REMEDY}"
        ) from error


def _beside(ref: str) -> str:
    """Return the folders beside a path that does not exist, for a message: its name may be mistyped."""
    folder = Path(ref).expanduser().parent
    there = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    return f" (in {folder}: {', '.join(there[:10])})" if there and ref.count("/") else ""
