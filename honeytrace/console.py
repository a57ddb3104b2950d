"""What all commands share: how they take files, refuse bad input, show results and say where they stand."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from honeytrace.progress import Stages

_WIDTH = 88
"""Columns of a table where no terminal says how many there are."""

FILE = click.Path(path_type=Path, dir_okay=False)
DIRECTORY = click.Path(path_type=Path, file_okay=False)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


class Refused(click.ClickException):
    """Bad input: one line on standard error, exit code 2."""

    exit_code = 2


@contextmanager
def refusing() -> Iterator[None]:
    """Errors that name a bad input become one line and exit code 2; bugs keep their traceback, code 3."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise click.exceptions.Exit(130) from None
    except BrokenPipeError:
        # Whoever read our output has left; that is no error, and no verdict either. Python's own last flush
        # would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise click.exceptions.Exit(141) from None
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        raise Refused(f"{error.filename}: {error.strerror}" if named else _one_line(error)) from error
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise Refused(_one_line(error)) from error
    except Exception as error:
        traceback.print_exc()
        raise click.exceptions.Exit(3) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_place(output: Path) -> None:
    """Before minutes of work, and not after them."""
    if not output.parent.is_dir():
        raise Refused(f"no directory {output.parent} to write {output.name} to")


def one_of(value: str, *choices: str) -> Any:
    """click has checked it; the type checker cannot know."""
    assert value in choices
    return value


def stages() -> Stages:
    from rich.console import Console

    from honeytrace.progress import Stages

    return Stages(Console(stderr=True))


def output_console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def show(as_json: bool, fields: dict[str, Any], text: Callable[[], object]) -> None:
    if as_json:
        click.echo(json.dumps(fields, indent=2, allow_nan=False))
    else:
        text()
