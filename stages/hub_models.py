"""Checkpoints on the Hub: which commit a reference means, and whether it is an adapter."""

from functools import cache
from pathlib import Path

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.weight_files import ADAPTER_CONFIG


def split_revision(ref: str) -> tuple[str, str | None]:
    """`user/name@revision` as its two parts."""
    name, _, revision = ref.partition("@")
    return name, revision or None


@cache  # asked of the Hub once a process
def hub_adapter(ref: str, besides: tuple[str, ...]) -> Path | None:
    """The folder of an adapter on the Hub, downloaded; None where there is none, or the Hub does not answer.

    `besides`: patterns of other files to download.
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
    except Exception:  # no answer, missing, private: what is asked for next says which
        return None


def hub_commit(ref: str) -> str:
    """The commit that a Hub id means now; without a network, that of the copy in the cache.

    Raises:
        UsageError: it is no Hub id.
        SstokenError: the Hub does not answer for it.
    """
    from huggingface_hub import constants, model_info, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name, revision = split_revision(ref)
    if constants.HF_HUB_OFFLINE:  # what loads then is what the cache holds
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name
    try:
        return str(model_info(name, revision=revision).sha)
    except HFValidationError as error:
        raise UsageError(
            f"checkpoint {ref!r}: neither a folder nor a Hub id ({first_line(error)})"
        ) from error
    except Exception as error:  # offline, missing, private: all mean the same to the user
        raise SstokenError(
            f"{ref}: no such folder, and the Hub does not answer for it ({first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    """The kind and first line of an error, for a one-line message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
