"""Call the Hub: every refusal or failure becomes a one-line error that never contains a token."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sstoken.errors import SstokenError, UsageError, first_line, in_one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

_SECRET = re.compile(r"hf_\w+|(?i:bearer)\s+\S+")
_BRANCH = re.compile(r"(?!.*(\.\.|//|@\{|/\.|\.lock(/|$)))[\w][\w./+-]*(?<![./])", re.ASCII)
_REFUSALS = {
    401: "the Hub does not accept the token (401); log in again with `hf auth login`, or set HF_TOKEN",
    402: "the account's storage is used up (402); free some, or publish under another account",
    403: "the token has no right to do this (403); use one that may write to it",
    409: "the repository is being changed by someone else (409); try again",
    412: "someone else changed the repository in the meantime (412); try again",
    413: "the Hub does not accept files this large (413)",
    429: "the Hub rate-limits you (429, too many requests); try again later",
}


def connect(*, write: bool = False) -> "HfApi":
    """Return the client, with the token saved by `hf auth login` or in HF_TOKEN; to `write`, it needs one."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise SstokenError("HF_HUB_OFFLINE is set, so the Hub is not contacted; unset it first")
    if write and not get_token():
        raise SstokenError("no token for the Hub; log in with `hf auth login`, or set HF_TOKEN")
    return HfApi(library_name="sstoken")


def check_repo(repo: str) -> None:
    """Refuse a dataset name that is not user/name, with a UsageError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"repo {repo!r}: {first_line(error).partition(': ')[2]}") from error
    if repo.count("/") != 1:
        raise UsageError(f"repo {repo!r}: legal is user/name")


def check_branch(branch: str) -> None:
    """Refuse a branch name that breaks git's rules, with a UsageError."""
    if not _BRANCH.fullmatch(branch) or branch.startswith("refs/"):
        raise UsageError(f"branch {branch!r}: legal are letters, digits and . _ / - within, such as rho-0.4")


def tree(api: "HfApi", repo: str, commit: str) -> dict[str, "RepoFile"]:
    """Return the files of a dataset's commit by path."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


@contextmanager
def asking(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP client raise into a SstokenError: what happened and what to do."""
    from huggingface_hub import get_token

    try:
        yield
    except SstokenError:
        raise
    except Exception as error:  # huggingface_hub, httpx and the upload threads raise many types
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise  # a local disk error
        said = explain(error).replace(get_token() or "***", "***")
        raise SstokenError(f"{repo}: {_SECRET.sub('***', said)}") from error


def explain(error: BaseException) -> str:
    """Return the reason and the remedy."""
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # from an upload thread
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RevisionNotFoundError):
        return "has no such branch, tag or commit; see its page for those there are"
    if isinstance(error, RepositoryNotFoundError):
        return "no such dataset on the Hub, or a private one that your token may not see"
    said = in_one_line(getattr(error, "server_message", None) or "", 200)
    if status in _REFUSALS:
        return f"{_REFUSALS[status]}{f': {said}' if status in (403, 413) and said else ''}"
    if status is not None and status >= 500:
        return f"the Hub failed ({status}); what was uploaded is kept, try again"
    if status is not None:
        return f"the Hub refused ({status}): {said}"
    if isinstance(error, json.JSONDecodeError):
        return f"{constants.ENDPOINT} does not answer like a Hub (no JSON); check HF_ENDPOINT and the proxy settings"
    if isinstance(error, ValueError):
        return in_one_line(error, 300)
    reason = first_line(error)
    return (
        f"the Hub does not answer at {constants.ENDPOINT} ({reason}); try again, what was transferred is kept"
    )
