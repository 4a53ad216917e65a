"""`publish` and `pull` as functions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError
from sstoken.pipeline.config import validated
from sstoken.pipeline.progress import progress_bar
from sstoken.pipeline.runner import Job, Result, execute
from sstoken.stages import manifest as manifests
from sstoken.stages.hub.provenance import find_origin
from sstoken.stages.hub.publication import Publication
from sstoken.stages.hub.pull import Pull
from sstoken.stages.hub.remote import asking, check_branch, check_repo, connect
from sstoken.stages.hub.upload import MAIN, Upload, upload
from sstoken.stages.manifest import Digests, FileEntry


@dataclass(frozen=True)
class Published:
    """What `publish` did, or would do."""

    folder: Path
    """What is uploaded."""
    files: list[FileEntry]
    metrics: dict[str, Any]
    upload: Upload | None
    """None: a dry run."""


def publish(
    *,
    masked: str | Path,
    repo: str,
    private: bool = False,
    branch: str = MAIN,
    dry_run: bool = False,
    out: str | Path | None = None,
    **fields: Any,
) -> Published:
    """Publish a masked dataset on the Hugging Face Hub, in one commit.

    What is there already is not sent again, and a dataset that is there as a whole makes no commit.

    Args:
        masked: a finished masked folder.
        repo: user/name. Made where it is missing.
        private: only you may see it.
        branch: made where it is missing.
        dry_run: prepare the files and ask the Hub for nothing but the source's licence.
        out: where the files are prepared. Default: MASKED.publish; it can be removed at any time.
        fields: those of `sstoken.stages.hub.publication.Publication`.
    """
    check_repo(repo)
    check_branch(branch)
    validated(Publication, {"repo": repo, **fields}, "publish")
    if not dry_run:
        connect(write=True)  # refuse before any work
    place = Path(masked).expanduser()
    place = place if place.name not in ("", "..") else place.resolve()
    folder = place.with_name(place.name + ".publish") if out is None else Path(out).expanduser()
    origin = find_origin(place, manifests.finished(place, "masked"))
    if "license" not in fields and (license := _source_license(origin, dry_run)):
        origin["license"] = license
    stage = validated(Publication, {"repo": repo, "origin": origin, **fields}, "publish")
    result = execute(Job(stage, {"masked": place}, folder, seed=0), Digests(), replace=True)
    files = manifests.finished(folder, "publish").files
    done = None
    if not dry_run:
        title = f"Token-masked dataset, sstoken run {_run_fingerprint(folder)}"
        done = upload(connect(write=True), folder, files, repo, branch, private, title, progress_bar)
    return Published(folder, files, result.metrics, done)


def pull(*, repo: str, out: str | Path, revision: str | None = None, force: bool = False) -> Result:
    """A published masked dataset back into a masked folder, its provenance and checksums checked.

    Args:
        repo: user/name.
        out: the folder; `show`, `export` and `verify` take it as they take what `select` wrote.
        revision: a branch, tag or commit. Default: main.
        force: pull again what is finished.
    """
    check_repo(repo)
    with asking(repo):
        commit = connect().dataset_info(repo, revision=revision).sha
    stage = validated(Pull, {"repo": repo, "commit": commit}, "pull")
    return execute(Job(stage, {}, Path(out).expanduser(), seed=0), Digests(), force=force)


def _source_license(origin: dict[str, Any], dry_run: bool) -> str | list[str] | None:
    """What the Hub says of the source dataset's licence. A dry run goes on without an answer."""
    from huggingface_hub.errors import RepositoryNotFoundError

    source = (origin.get("data") or {}).get("hub")
    if source is None:
        return None
    try:
        with asking(source):
            try:
                card = connect().dataset_info(source).card_data
            except RepositoryNotFoundError:
                return None
    except SstokenError:
        if dry_run:
            return None
        raise
    found: str | list[str] | None = card.license if card is not None else None
    return found


def _run_fingerprint(folder: Path) -> str:
    from sstoken.stages.hub.provenance import PROVENANCE, read_provenance

    return str(read_provenance(folder / PROVENANCE).masked["fingerprint"])
