"""The command line. It reads, calls the library and prints; whatever it does, the library does without it.

Standard output holds the result (with --json one JSON object and nothing else), standard error the progress.
Exit codes: 0 claim or success; 1 no claim (demo: a verdict that was not expected); 2 usage or bad input;
3 an error of Honeytrace itself; 130 interrupted. An error never looks like a verdict.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import honeytrace
from honeytrace import ownership_cli

if TYPE_CHECKING:
    from rich.console import Console

    from honeytrace.progress import Stages

# Everything heavy (torch, rich) is imported where it is used, so that --help and usage errors come at once.

_WIDTH = 88
"""Columns of a table where no terminal says how many there are."""

_FILE = click.Path(path_type=Path, dir_okay=False)
_DIRECTORY = click.Path(path_type=Path, file_okay=False)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


class Refused(click.ClickException):
    """Bad input: one line on standard error, exit code 2."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(honeytrace.__version__, prog_name="honeytrace")
def main() -> None:
    """A watermark against model extraction: protect a classifier, and prove that a copy was made of it.

    Exit codes: 0 claim or success, 1 no claim, 2 usage or bad input, 3 internal error.
    """


@main.command()
@click.option("--data", type=click.Choice(["digits", "fashion"]), default="digits", show_default=True)
@click.option("--directory", type=_DIRECTORY, help="Where the four files of Fashion-MNIST lie.")
@click.option("--alpha", type=float, default=1e-3, show_default=True, help="False-claim probability.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of data, trainings and queries.")
@click.option("--key", "key_file", type=_FILE, help="Key file.  [default: a fresh key]")
@click.option(
    "--cache",
    type=_DIRECTORY,
    help="Keep trained models there; a killed run resumes.  [default for fashion: $HONEYTRACE_CACHE or "
    "~/.cache/honeytrace; digits: none]",
)
@click.option("--threads", type=int, default=1, show_default=True, help="Threads of PyTorch.")
@_json
@click.pass_context
def demo(
    context: click.Context,
    data: str,
    directory: Path | None,
    alpha: float,
    seed: int,
    key_file: Path | None,
    cache: Path | None,
    threads: int,
    as_json: bool,
) -> None:
    """Train, protect, steal and prove, on real data; exit 0 when every verdict is the expected one."""
    with _refusing():
        from honeytrace import cache as cache_module
        from honeytrace import demo as road
        from honeytrace.demo_report import report

        if cache is None and data == "fashion":
            cache = cache_module.default_directory()
        key = None if key_file is None else _load_key(key_file)
        name: road.DataName = "fashion" if data == "fashion" else "digits"
        with _stages() as stage:
            result = road.run(
                name,
                directory=directory,
                alpha=alpha,
                seed=seed,
                key=key,
                cache=cache,
                threads=threads,
                stage=stage,
            )
        _show(as_json, result.to_dict(), lambda: report(result, _output()))
    context.exit(0 if result.as_expected else 1)


@main.command()
@click.argument("file", type=_FILE)
@_json
def key(file: Path, as_json: bool) -> None:
    """Make a secret key and write it to FILE (mode 0600; an existing file is not overwritten)."""
    with _refusing():
        fresh = honeytrace.SecretKey.generate()
        fresh.save(file)
        found = {"file": str(file), "identifier": fresh.identifier}
        _show(
            as_json,
            found,
            lambda: click.echo(f"{file}: secret key {fresh.identifier}. Keep a copy; show nobody."),
        )


@main.command()
@click.option("--model", required=True, help="package.module:factory or file.py:factory.")
@click.option("--weights", type=_FILE, help="The model's weights, safetensors.")
@click.option("--data", "data_file", type=_FILE, required=True, help=".npz with inputs and labels.")
@click.option("--validation", type=_FILE, help=".npz the model was not trained on, to measure accuracy.")
@click.option("--triggers", type=_FILE, help=".npz nobody has seen, to make triggers of.")
@click.option("--reference", help="Unmarked model to compare suspects with.  [default: the model]")
@click.option("--reference-weights", type=_FILE, help="Its weights, safetensors.")
@click.option("--key", "key_file", type=_FILE, required=True, help="Key file.")
@click.option("--output", type=_FILE, default=Path("model.honeytrace"), show_default=True)
@click.option("--max-accuracy-drop", type=float, default=0.005, show_default=True, help="Share of answers.")
@click.option("--flips/--no-flips", default=True, show_default=True, help="Marks for label-only attackers.")
@_json
def protect(
    model: str,
    weights: Path | None,
    data_file: Path,
    validation: Path | None,
    triggers: Path | None,
    reference: str | None,
    reference_weights: Path | None,
    key_file: Path,
    output: Path,
    max_accuracy_drop: float,
    flips: bool,
    as_json: bool,
) -> None:
    """Calibrate a watermark for a trained model and write it to a file, as secret as the key."""
    with _refusing():
        from honeytrace import userfiles

        if reference is None and reference_weights is not None:
            raise click.UsageError("--reference-weights needs --reference")
        _check_place(output)
        owner_key = _load_key(key_file)
        classifier = userfiles.make_module(model, weights)
        compared = None if reference is None else userfiles.make_module(reference, reference_weights)
        labelled = {
            name: None if file is None else userfiles.load_labelled(file)
            for name, file in (("validation", validation), ("trigger_data", triggers))
        }
        with _stages() as stage, stage("calibrating the watermark") as progress:
            watermark = honeytrace.Watermark.calibrate(
                classifier,
                userfiles.load_labelled(data_file),
                key=owner_key,
                max_accuracy_drop=max_accuracy_drop,
                flips=flips,
                reference=compared,
                progress=progress,
                **labelled,
            )
        watermark.save(output)
        found = {
            "file": str(output),
            "key_identifier": owner_key.identifier,
            "summary": watermark.summary.to_dict(),
            "warnings": watermark.summary.warnings(),
        }
        _show(as_json, found, lambda: click.echo(f"{watermark.summary}\nwritten to {output}; keep it secret"))


@main.command()
@click.option(
    "--model", required=True, help="The model that is asked: package.module:factory or file.py:factory."
)
@click.option("--weights", type=_FILE, help="Its weights, safetensors.")
@click.option("--watermark", "watermark_file", type=_FILE, help="Protect the model first.  [default: bare]")
@click.option("--pool", type=_FILE, required=True, help=".npz with inputs to ask about.")
@click.option(
    "--surrogate", required=True, help="The copy's architecture: package.module:factory or file.py:factory."
)
@click.option("--labels", type=click.Choice(["soft", "top1"]), default="soft", show_default=True)
@click.option("--budget", type=int, help="Number of queries.  [default: the whole pool]")
@click.option("--epochs", type=int, default=6, show_default=True)
@click.option("--drop-worst", type=float, default=0.0, show_default=True, help="Share of queries left out.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", type=_FILE, default=Path("copy.safetensors"), show_default=True)
@_json
def extract(
    model: str,
    weights: Path | None,
    watermark_file: Path | None,
    pool: Path,
    surrogate: str,
    labels: str,
    budget: int | None,
    epochs: int,
    drop_worst: float,
    seed: int,
    output: Path,
    as_json: bool,
) -> None:
    """Attack your own model: ask it about a pool of inputs and train a copy on the answers."""
    with _refusing():
        from honeytrace import extraction, userfiles

        _check_place(output)
        asked = userfiles.make_module(model, weights)
        if watermark_file is not None:
            asked = honeytrace.Watermark.load(watermark_file).protect(asked)
        inputs = userfiles.load_inputs(pool)
        with _stages() as stage, stage("extracting a copy") as progress:
            found = extraction.random_queries(
                extraction.api(asked),
                inputs,
                surrogate=lambda: userfiles.make_module(surrogate, None),
                epochs=epochs,
                seed=seed,
                labels="soft" if labels == "soft" else "top1",
                budget=budget,
                drop_worst=drop_worst,
                progress=progress,
            )
        userfiles.save_weights(found.surrogate, output)
        fidelity = extraction.fidelity(found.surrogate, asked, inputs)
        facts = {
            "file": str(output),
            "queries": len(found.queries),
            "kept": len(found.kept),
            "labels": labels,
            "protected": watermark_file is not None,
            "fidelity_on_pool": fidelity,
        }
        text = f"{output}: {len(found.queries)} queries; agrees with the model on {fidelity:.1%} of the pool"
        _show(as_json, facts, lambda: click.echo(text))


@main.command()
@click.option(
    "--model",
    help="The suspect: package.module:factory or file.py:factory. The factory may also give any callable "
    "from inputs to scores or labels, such as a client of somebody's API.",
)
@click.option("--weights", type=_FILE, help="Its weights, safetensors.")
@click.option("--watermark", "watermark_file", type=_FILE, required=True, help="File written by protect.")
@click.option("--key", "key_file", type=_FILE, required=True, help="Key file.")
@click.option("--alpha", type=float, default=1e-3, show_default=True, help="False-claim probability.")
@click.option("--answers", type=click.Choice(["auto", "scores", "labels"]), default="auto", show_default=True)
@click.option("--rule", type=click.Choice(["exact", "e-process"]), default="exact", show_default=True)
@click.option("--triggers", type=int, help="Asked in each group, by scores.  [default: the watermark's]")
@click.option("--graded-only", is_flag=True, help="Verify the graded mark alone, as served without flips.")
@ownership_cli.asking
@_json
@click.pass_context
def verify(
    context: click.Context,
    /,
    model: str | None,
    weights: Path | None,
    watermark_file: Path,
    key_file: Path,
    alpha: float,
    answers: str,
    rule: str,
    triggers: int | None,
    graded_only: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask a suspect about the triggers and decide; exit 0 for a claim, 1 for none."""
    with _refusing():
        chosen = _one_of(rule, "exact", "e-process")
        if options["plan"]:
            fields, text = ownership_cli.show_plan(watermark_file, graded_only, alpha, chosen, triggers)
            _show(as_json, fields, lambda: click.echo(text))
            return
        with _stages() as stage:
            verdict = ownership_cli.run(
                options,
                model=model,
                weights=weights,
                watermark_file=watermark_file,
                key_file=key_file,
                graded_only=graded_only,
                stage=stage,
                alpha=alpha,
                answers=_one_of(answers, "auto", "scores", "labels"),
                rule=chosen,
                triggers=triggers,
            )
        _show(as_json, verdict.to_dict(), lambda: click.echo(str(verdict)))
    context.exit(0 if verdict.claim else 1)


@main.command()
@_json
def doctor(as_json: bool) -> None:
    """What this installation runs on, and why."""
    with _refusing():
        found = honeytrace.doctor.doctor()
        _show(as_json, found, lambda: _print_tree(found))


@contextmanager
def _refusing() -> Iterator[None]:
    """Errors that name a bad input become one line and exit code 2; bugs keep their traceback, code 3."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise click.exceptions.Exit(130) from None
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


def _load_key(file: Path) -> honeytrace.SecretKey:
    return honeytrace.SecretKey.load(file)


def _check_place(output: Path) -> None:
    """Before minutes of work, and not after them."""
    if not output.parent.is_dir():
        raise Refused(f"no directory {output.parent} to write {output.name} to")


def _one_of(value: str, *choices: str) -> Any:
    """click has checked it; the type checker cannot know."""
    assert value in choices
    return value


def _stages() -> Stages:
    from rich.console import Console

    from honeytrace.progress import Stages

    return Stages(Console(stderr=True))


def _output() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def _show(as_json: bool, fields: dict[str, Any], text: Callable[[], object]) -> None:
    if as_json:
        click.echo(json.dumps(fields, indent=2, allow_nan=False))
    else:
        text()


def _print_tree(fields: dict[str, Any], indent: str = "") -> None:
    for name, value in fields.items():
        if isinstance(value, dict):
            click.echo(f"{indent}{name}:")
            _print_tree(value, indent + "  ")
        elif isinstance(value, list):
            click.echo(f"{indent}{name}: {', '.join(map(str, value)) or '-'}")
        else:
            click.echo(f"{indent}{name}: {'-' if value is None else value}")


ownership_cli.add_to(main)

if __name__ == "__main__":
    main()
