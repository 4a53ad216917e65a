"""`sstoken-curate publish` and `pull`."""

import json
from typing import Any

import click

from sstoken.pipeline.cli_options import force_option, given, json_option, out_option, stage_options
from sstoken.stages.hub.publication import Publication
from sstoken.stages.hub.repository import CARD
from sstoken.stages.hub.upload import MAIN


@click.command()
@click.argument("masked")
@stage_options(Publication, skip=("origin",))
@click.option("--private", is_flag=True, help="Only you may see it.")
@click.option(
    "--branch", default=MAIN, show_default=True, help="Branch to commit to; made where it is missing."
)
@click.option("--dry-run", is_flag=True, help="Show the files and the card; publish nothing.")
@click.option("--out", help="Where the files are prepared.  [default: MASKED.publish]")
@json_option
def publish(
    masked: str, private: bool, branch: str, dry_run: bool, out: str | None, as_json: bool, **fields: Any
) -> None:
    """Publish a masked dataset on the Hugging Face Hub, in one commit.

    What is there already is not sent again: a killed upload goes on where it stopped.

    \b
    Example:
      sstoken-curate publish runs/demo/masked-sstoken --repo user/name --dry-run
    """
    from sstoken.pipeline import api

    done = api.publish(
        masked=masked, private=private, branch=branch, dry_run=dry_run, out=out, **given(fields)
    )
    card = (done.folder / CARD).read_text(encoding="utf-8") if dry_run else None
    if as_json:
        facts: dict[str, Any] = {
            "repo": fields["repo"],
            "branch": branch,
            "folder": str(done.folder),
            "files": [file.model_dump() for file in done.files],
        }
        facts |= {"card": card} if done.upload is None else vars(done.upload)
        click.echo(json.dumps(facts))
    elif done.upload is None:
        for file in done.files:
            click.echo(f"{file.bytes:>13,}  {file.path}")
        total = sum(file.bytes for file in done.files)
        click.echo(f"{total:>13,}  bytes in {len(done.files)} files; nothing was published\n\n{card}")
        click.echo(f"prepared in {done.folder}")
    elif not done.upload.changed and not done.upload.removed:
        click.echo(f"{done.upload.url}: all {len(done.files)} files are there already, no commit was made")
    else:
        changes = f"{len(done.upload.changed)} files written, {len(done.upload.removed)} removed"
        click.echo(f"{done.upload.url}: {changes}, in commit {done.upload.commit}")


@click.command()
@click.argument("repo", metavar="USER/NAME")
@click.option("--revision", help="Branch, tag or commit.  [default: main]")
@out_option
@force_option
@json_option
def pull(repo: str, revision: str | None, out: str, force: bool, as_json: bool) -> None:
    """Fetch a published masked dataset into a folder that `show`, `export` and `verify` take, and check it.

    \b
    Example:
      sstoken-curate pull user/name --out runs/pulled
    """
    from sstoken.pipeline import api
    from sstoken.pipeline.printing import print_result

    result = api.pull(repo=repo, out=out, revision=revision, force=force)
    if as_json:
        click.echo(json.dumps({"folder": str(result.folder), "skipped": result.skipped, **result.metrics}))
    else:
        print_result("pull", result)
