"""`sstoken-curate`: the command line. Verbs are imported on use, so that `--help` answers at once."""

import difflib
import os
import sys
import traceback
import warnings
from importlib import import_module
from pathlib import Path

import click

from sstoken.errors import SstokenError
from sstoken.pipeline import stopping
from sstoken.pipeline.saying import is_verbose, printable, set_verbosity
from sstoken.pipeline.stopping import stopping_safely
from sstoken.pipeline.verbs import index, verbs
from sstoken.stages.processes import end_process
from sstoken.stages.shard_border import GOES_ON
from sstoken.version import __version__

VERBS = verbs()
_DASHES = ("\u2010", "\u2011", "\u2012", "\u2013", "\u2014", "\u2212")


class _Verbs(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        import_module(index()[name].module)
        from sstoken.pipeline.verbs.command import COMMANDS

        return COMMANDS[name]

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = arguments[0]
        if name not in VERBS and not name.startswith("-"):
            near = difflib.get_close_matches(name.lower(), [*VERBS, "help"], n=1)
            meant = "--help" if near == ["help"] else repr(near[0]) if near else ""
            hint = f"did you mean {meant}?" if near else f"legal: {', '.join(VERBS)}"
            raise click.UsageError(f"no verb {name!r}; {hint}", context)
        return super().resolve_command(context, arguments)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="sstoken-curate")
@click.option(
    "--quiet",
    "level",
    flag_value="quiet",
    help="No progress and no summaries: only errors, notes and warnings.",
)
@click.option(
    "--verbose", "level", flag_value="verbose", help="Also what libraries say, and the traceback of an error."
)
def cli(level: str | None) -> None:
    """Turn an instruction-tuning dataset into a token-masked one.

    \b
    Example:
      sstoken-curate demo
    """
    set_verbosity(level or "normal")
    if is_verbose():
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        warnings.simplefilter("default")


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit code 0: done, 1: failed, 2: wrong usage, 130: interrupted, 143: terminated."""
    set_up_libraries()
    try:
        with stopping_safely():
            status = cli.main(arguments, prog_name="sstoken-curate", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        status = 2
    except click.ClickException as error:
        verb = (
            error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "sstoken-curate"
        )
        status = _fail(f"{error.format_message()}{_typed(arguments)} (see {verb} --help)", error.exit_code)
    except SstokenError as error:
        told = _full_disk(error) or error
        status = _fail(str(told), told.exit_code)
    except (KeyboardInterrupt, click.Abort):
        status = _fail(f"{stopping.reason()}; {GOES_ON}", stopping.code())
    except OSError as error:
        status = _fail(_refused(error), 1)
    except Exception as error:  # libraries in Rust and C++ raise their own types for errors of the system
        if "(os error " in str(error):
            status = _fail(str(_full_disk(error) or f"{error}; {GOES_ON}"), 1)
        elif "out of memory" in str(error).lower() or isinstance(error, MemoryError):
            status = _fail("out of memory; make the batch smaller (--batch-tokens, --batch-size)", 1)
        else:
            raise
    end_process(status if isinstance(status, int) else 0)


def _typed(arguments: list[str] | None) -> str:
    """Return a hint about a typing mistake in a command line that click refuses, such as another dash."""
    given = sys.argv[1:] if arguments is None else arguments
    if dashed := [a for a in given if a.startswith(_DASHES) or a[:2] in {f"-{dash}" for dash in _DASHES}]:
        return f" {dashed[0]!r} begins with a typographic dash; type --"
    if "=" in given:
        return " Write NAME=VALUE without spaces around =."
    return ""


def _refused(error: OSError) -> str:
    """Say what the system refused, and for which file; for a full disk, also how full it is."""
    if (told := _full_disk(error)) is not None:
        return str(told)
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}; {GOES_ON}"


def _full_disk(error: Exception) -> SstokenError | None:
    """Return the error that names the full disk, if a full disk caused `error`."""
    from sstoken.pipeline.disk import full_disk

    return full_disk(error, Path.cwd())


def _fail(message: str, status: int) -> int:
    if is_verbose() and sys.exc_info()[0] is not None:
        traceback.print_exc()
    click.echo("error: " + printable(" ".join(map(_shortened, message.split()))), err=True)
    return status


_LONGEST_WORD = 500
"""Characters of one word of an error, such as a path; names from data can be longer."""


def _shortened(word: str) -> str:
    half = _LONGEST_WORD // 2
    return word if len(word) <= _LONGEST_WORD else f"{word[:half]}...{word[-half:]}"


def set_up_libraries() -> None:
    """Silence other libraries' notices, warnings and progress bars, and limit their memory. What the user set stays.

    Call it before they are imported. Worker processes inherit it.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP threads spin while waiting; if the machine does anything else, that is ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Arrow's own allocators take 27 MB to write a 1 MB file, and share none of it with the rest of the process.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
