"""`publish` and `pull`: a masked dataset to a repository on the Hugging Face Hub, and back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sstoken.errors import SstokenError
from sstoken.pipeline.cli_options import Option
from sstoken.pipeline.config import validated
from sstoken.pipeline.job import Job, Result
from sstoken.pipeline.progress import progress_bar
from sstoken.pipeline.runner import execute
from sstoken.pipeline.saying import say
from sstoken.pipeline.sections import stage_of
from sstoken.pipeline.verbs.command import Internal, Output, Place, place, verb
from sstoken.stages import manifest as manifests
from sstoken.stages import storage
from sstoken.stages.hub.provenance import CARD, PROVENANCE, find_origin, read_provenance
from sstoken.stages.hub.publication import Publication
from sstoken.stages.hub.pull import Pull
from sstoken.stages.hub.remote import asking, check_branch, check_repo, connect
from sstoken.stages.hub.upload import MAIN, Upload, upload
from sstoken.stages.manifest import Digests, FileEntry

__all__ = ["Published", "publish", "pull"]


@dataclass(frozen=True)
class Published:
    """What `publish` did, or would do."""

    folder: Path
    """What is uploaded."""
    files: list[FileEntry]
    metrics: dict[str, Any]
    upload: Upload | None
    """None: a dry run."""


class PublishCall(Publication):
    """Publish a masked dataset on the Hugging Face Hub, in one commit.

    Files that the repository already has are not sent again: a killed upload resumes where it stopped, and an unchanged
    dataset makes no commit.

    Example:
      sstoken-curate publish runs/demo/masked-sstoken --repo user/name --dry-run
    """

    origin: Annotated[dict[str, Any], Internal] = Field(default_factory=dict)
    """Where the data and the checkpoints come from.  [default: found in the run's folder]"""
    masked: Annotated[Place, Option(argument=True)]
    """A finished masked folder."""
    private: Annotated[bool, Option(flag="--private")] = False
    """Make a new repository private."""
    branch: str = MAIN
    """Branch to commit to; created if it does not exist."""
    dry_run: Annotated[bool, Option(flag="--dry-run")] = False
    """Publish nothing, and show the files and the card. The Hub is asked for the source's licence alone; it checks the
    card on publishing."""
    out: Place | None = None
    """Where the files are prepared.  [default: MASKED.publish]"""

    def do(self) -> Published:
        check_repo(self.repo)
        check_branch(self.branch)
        if not self.dry_run:
            connect(write=True)  # refuse before any work
        masked = place(self.masked)
        masked = masked if masked.name not in ("", "..") else masked.resolve()
        folder = masked.with_name(masked.name + ".publish") if self.out is None else place(self.out)
        origin = self.origin or find_origin(masked, manifests.finished(masked, "masked"))
        if self.license is None and (license := _source_license(origin, self.dry_run)):
            origin["license"] = license
        fields = stage_of(self, Publication).model_dump()
        stage = validated(Publication, fields | {"origin": origin}, "publish")
        result = execute(
            Job(stage, {"masked": storage.local(masked)}, folder, seed=0), Digests(), replace=True
        )
        files = manifests.finished(folder, "publish").files
        done = None
        if not self.dry_run:
            folder = storage.local(folder)
            run = read_provenance(folder / PROVENANCE).masked["fingerprint"]
            title = f"Token-masked dataset, sstoken run {run}"
            hub = connect(write=True)
            done = upload(hub, folder, files, self.repo, self.branch, self.private, title, progress_bar)
        return Published(folder, files, result.metrics, done)


def _show_publication(values: dict[str, Any], as_json: bool) -> None:
    done = publish(**values)
    card = (done.folder / CARD).read_text(encoding="utf-8") if done.upload is None else None
    if as_json:
        facts: dict[str, Any] = {
            "repo": values["repo"],
            "branch": values.get("branch", MAIN),
            "folder": str(done.folder),
            "files": [file.model_dump() for file in done.files],
        }
        facts |= {"card": card} if done.upload is None else vars(done.upload)
        say(json.dumps(facts))
    elif done.upload is None:
        for file in done.files:
            say(f"{file.bytes:>13,}  {file.path}")
        total = sum(file.bytes for file in done.files)
        say(f"{total:>13,}  bytes in {len(done.files)} files; nothing was published\n\n{card}")
        say(f"prepared in {done.folder}")
    elif not done.upload.changed and not done.upload.removed:
        say(f"{done.upload.url}: all {len(done.files)} files are there already, no commit was made")
    else:
        changes = f"{len(done.upload.changed)} files written, {len(done.upload.removed)} removed"
        say(f"{done.upload.url}: {changes}, in commit {done.upload.commit}")


publish = verb(PublishCall, _show_publication)


class PullCall(Output):
    """Fetch a published masked dataset, and check it; `show`, `export` and `verify` take the folder.

    Example:
      sstoken-curate pull user/name --out runs/pulled
    """

    repo: Annotated[str, Option(argument=True, value="USER/NAME")]
    """The dataset's name on the Hub: user/name."""
    revision: str | None = None
    """Branch, tag or commit.  [default: main]"""

    def do(self) -> Result:
        check_repo(self.repo)
        with asking(self.repo):
            commit = connect().dataset_info(self.repo, revision=self.revision).sha
        stage = validated(Pull, {"repo": self.repo, "commit": commit}, "pull")
        return execute(Job(stage, {}, place(self.out), seed=0), Digests(), force=self.force)


pull = verb(PullCall)


def _source_license(origin: dict[str, Any], dry_run: bool) -> str | list[str] | None:
    """The source dataset's licence according to the Hub; a dry run goes on without an answer."""
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
