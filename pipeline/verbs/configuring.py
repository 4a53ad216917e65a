"""`init` and `schema`: a configuration to start from, and its schema for editors."""

import json
from typing import Any

import click

from sstoken.pipeline.cli_options import json_option
from sstoken.pipeline.saying import say
from sstoken.pipeline.verbs.command import Place, command, local_place

__all__ = ["init", "schema"]


def init(
    *, data: str, model: str, out: Place = "runs/mine", file: Place = "sstoken.yaml", force: bool = False
) -> dict[str, Any]:
    """Write a commented configuration for your model and data, after a look at both.

    Example:
      sstoken-curate init --data runs/demo/data.jsonl --model runs/demo/base --out runs/mine --file mine.yaml

    Args:
        data: the dataset, as `encode` takes it.
        model: the model to train: a folder or a Hub id.
        out: the run's folder, which the configuration names.
        file: the configuration to write; the schema for editors is written beside it.
        force: overwrite an existing file.

    Returns:
        The metrics of `encode` for the first rows.
    """
    from sstoken.pipeline import new_configuration

    found = new_configuration.look(data, model)
    path = local_place(file)
    text = new_configuration.configuration(
        new_configuration.from_folder(data, path.parent),
        new_configuration.from_folder(model, path.parent),
        str(out),
        found,
    )
    new_configuration.write(path, text, json.dumps(schema(), indent=1) + "\n", force=force)
    return found


@command(
    init,
    click.option("--data", required=True),
    click.option("--model", required=True),
    click.option("--out", default="runs/mine", show_default=True),
    click.option("--file", default="sstoken.yaml", show_default=True),
    click.option("--force", is_flag=True),
    json_option,
)
def _init(data: str, model: str, out: str, file: str, force: bool, as_json: bool) -> None:
    found = init(data=data, model=model, out=out, file=file, force=force)
    if as_json:
        say(json.dumps(found))
        return
    say(local_place(file).read_text(encoding="utf-8"))
    say(f"written: {file}; next: sstoken-curate plan {file}")


def schema() -> dict[str, Any]:
    """Print the JSON schema of configurations, with which editors complete and check them.

    Example:
      sstoken-curate schema > sstoken.schema.json
    """
    from sstoken.pipeline.schema import schema as make

    return make()


@command(schema, click.option("--json", "as_json", is_flag=True, hidden=True))
def _schema(as_json: bool) -> None:
    say(json.dumps(schema(), indent=1))
