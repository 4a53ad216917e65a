"""Upload a prepared folder to the Hub in one commit; files that are already there are not sent again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.hub.provenance import CARD, PROVENANCE, read_provenance
from sstoken.stages.hub.remote import asking, tree
from sstoken.stages.manifest import FileEntry
from sstoken.stages.stage import ProgressBar

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

MAIN = "main"
_OWNED_BY_ANYBODY = (".gitattributes", ".gitignore", CARD)
"""A repository that holds only these counts as empty."""
_BATCH_FILES = 16
"""Files uploaded per step of the progress bar."""


@dataclass(frozen=True)
class Upload:
    """The outcome of a publication."""

    url: str
    """URL of the dataset's page."""
    commit: str
    """The commit that holds the files."""
    changed: list[str]
    """Files that this commit wrote; empty: everything was already there, and no commit was made."""
    removed: list[str]
    """Files of an earlier publication that this commit removed."""


def upload(
    api: "HfApi",
    folder: Path,
    files: Sequence[FileEntry],
    repo: str,
    branch: str,
    private: bool,
    title: str,
    progress: ProgressBar,
) -> Upload:
    """Make the branch hold exactly these files of the folder, in one commit with this title.

    Creates the repository if needed, and the branch, which starts at `main`. `private` makes a new repository private,
    and refuses an existing public one.

    Raises:
        UsageError: the repository holds something else, or is public.
        SstokenError: the Hub refused or failed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard

    with asking(repo):
        head, exists = _head(api, repo, branch, private)
        there = tree(api, repo, head)
        removed = _superseded(api, repo, head, there, files)
        if not exists:
            api.create_branch(repo, branch=branch, revision=head, repo_type="dataset", exist_ok=True)
        changed = [file for file in files if not _same(there.get(file.path), folder, file)]
        url = f"{api.endpoint}/datasets/{repo}"
        if not changed and not removed:
            return Upload(url, head, [], [])
        DatasetCard.load(folder / CARD).validate()  # fail before the upload rather than after it
        additions = [CommitOperationAdd(file.path, folder / file.path) for file in changed]
        with progress("files", len(additions)) as bar:
            for start in range(0, len(additions), _BATCH_FILES):
                batch = additions[start : start + _BATCH_FILES]  # the Hub keeps what a killed upload sent
                api.preupload_lfs_files(repo, batch, repo_type="dataset", revision=branch, free_memory=False)
                bar.advance(len(batch))
        info = api.create_commit(
            repo,
            [*additions, *map(CommitOperationDelete, removed)],
            commit_message=title,
            repo_type="dataset",
            revision=branch,
            parent_commit=head,
        )
        if info.oid == head:
            raise SstokenError(f"{repo}: the Hub made no commit; try again")
    return Upload(url, str(info.oid), [file.path for file in changed], removed)


def _head(api: "HfApi", repo: str, branch: str, private: bool) -> tuple[str, bool]:
    """Return the commit at the branch's head (or where it would start), and whether the branch exists."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.dataset_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)
        info = api.dataset_info(repo)
    if private and not info.private:
        raise UsageError(
            f"{repo}: exists and is public; make it private in its settings, or leave --private out"
        )
    exists = branch == MAIN
    if not exists:
        exists = branch in {b.name for b in api.list_repo_refs(repo, repo_type="dataset").branches}
        if exists:
            info = api.dataset_info(repo, revision=branch)
    assert info.sha is not None
    return info.sha, exists


def _superseded(
    api: "HfApi", repo: str, commit: str, there: dict[str, "RepoFile"], files: Sequence[FileEntry]
) -> list[str]:
    """Return files of an earlier publication that this one lacks; refuse files that no publication wrote."""
    ours: set[str] = set()
    if PROVENANCE in there:
        path = api.hf_hub_download(repo, PROVENANCE, repo_type="dataset", revision=commit)
        ours = {file.path for file in read_provenance(Path(path)).files} | {PROVENANCE}
    others = sorted(set(there) - ours - set(_OWNED_BY_ANYBODY))
    if others and not ours:
        raise UsageError(
            f"{repo}: holds {others[0]} ({len(others)} such files), which `publish` did not write; choose another "
            "repository, or remove them from it"
        )
    folders = {file.path.partition("/")[0] for file in files}
    if mixed := [path for path in others if path.partition("/")[0] in folders]:
        raise UsageError(
            f"{repo}: {mixed[0]} is not from an earlier publication; remove it from the repository"
        )
    return sorted((ours & set(there)) - {file.path for file in files})


def _same(there: "RepoFile | None", folder: Path, file: FileEntry) -> bool:
    from huggingface_hub.utils.sha import git_hash

    if there is None or there.size != file.bytes:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == file.sha256)
    return bool(there.blob_id == git_hash((folder / file.path).read_bytes()))  # small: large files are in LFS
