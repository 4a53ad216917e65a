"""`init`, `schema`, `completion`: a configuration to start from, its schema for editors, completion in the shell."""

import json
from typing import Any

import click

from sstoken.errors import UsageError
from sstoken.pipeline.cli_options import json_option
from sstoken.pipeline.saying import say
from sstoken.pipeline.verbs.command import Place, command, local_place

__all__ = ["completion", "init", "schema"]


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

    path = local_place(file)
    if path.exists() and not force:
        raise UsageError(f"{path}: exists already; name another with --file, or overwrite it with --force")
    found = new_configuration.look(data, model)
    text = new_configuration.configuration(
        new_configuration.from_folder(data, path.parent),
        new_configuration.from_folder(model, path.parent),
        str(out),
        found,
    )
    new_configuration.write(path, text, json.dumps(schema(), indent=1) + "\n")
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


SHELLS = ("bash", "zsh", "fish")


def completion(shell: str) -> str:
    """Print the script by which the shell (bash, zsh or fish) completes verbs, options, methods, targets and signals.

    Evaluate it in the shell's startup file, or save it among the shell's completions, which starts faster.

    Example:
      sstoken-curate completion bash > sstoken-curate.bash

    Args:
        shell: `bash`, `zsh` or `fish`.

    Raises:
        UsageError: another shell.
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell) if shell in SHELLS else None
    if made is None:
        raise UsageError(f"no completion for {shell!r}; legal: {', '.join(SHELLS)}")
    # The script depends on the program's name alone: it asks the program itself for what fits.
    program = click.Command("sstoken-curate")
    return made(program, {}, "sstoken-curate", "_SSTOKEN_CURATE_COMPLETE").source()


@command(completion, click.argument("shell", type=click.Choice(SHELLS)))
def _completion(shell: str) -> None:
    say(completion(shell))
