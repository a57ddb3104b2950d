"""The command line. It reads, calls the library and prints; whatever it does, the library does without it.

Standard output holds the result (with --json one JSON object and nothing else), standard error the progress.
Exit codes: 0 claim or success; 1 no claim (demo: a verdict that was not expected); 2 usage or bad input;
3 an error of Honeytrace itself; 130 interrupted. An error never looks like a verdict.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import honeytrace
from honeytrace import ownership_cli, serving_cli
from honeytrace.console import (
    DIRECTORY,
    FILE,
    Refused,
    check_place,
    json_option,
    one_of,
    output_console,
    refusing,
    show,
    stages,
)

if TYPE_CHECKING:
    from honeytrace.evaluation import Engine

# Everything heavy (torch, rich) is imported where it is used, so that --help and usage errors come at once.


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(honeytrace.__version__, prog_name="honeytrace")
def main() -> None:
    """A watermark against model extraction: protect a classifier, and prove that a copy was made of it.

    Exit codes: 0 claim or success, 1 no claim, 2 usage or bad input, 3 internal error.
    """


@main.command()
@click.option("--data", type=click.Choice(["digits", "fashion"]), default="digits", show_default=True)
@click.option("--directory", type=DIRECTORY, help="Where the four files of Fashion-MNIST lie.")
@click.option("--alpha", type=float, default=1e-3, show_default=True, help="False-claim probability.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of data, trainings and queries.")
@click.option("--key", "key_file", type=FILE, help="Key file.  [default: a fresh key]")
@click.option(
    "--cache",
    type=DIRECTORY,
    help="Keep trained models there; a killed run resumes.  [default for fashion: $HONEYTRACE_CACHE or "
    "~/.cache/honeytrace; digits: none]",
)
@click.option("--threads", type=int, default=1, show_default=True, help="Threads of PyTorch.")
@json_option
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
    with refusing():
        from honeytrace import cache as cache_module
        from honeytrace import demo as road
        from honeytrace.demo_report import report

        if cache is None and data == "fashion":
            cache = cache_module.default_directory()
        key = None if key_file is None else _load_key(key_file)
        with stages() as stage:
            result = road.run(
                one_of(data, "digits", "fashion"),
                directory=directory,
                alpha=alpha,
                seed=seed,
                key=key,
                cache=cache,
                threads=threads,
                stage=stage,
            )
        show(as_json, result.to_dict(), lambda: report(result, output_console()))
    context.exit(0 if result.as_expected else 1)


@main.command()
@click.argument("file", type=FILE)
@json_option
def key(file: Path, as_json: bool) -> None:
    """Make a secret key and write it to FILE (mode 0600; an existing file is not overwritten)."""
    with refusing():
        fresh = honeytrace.SecretKey.generate()
        fresh.save(file)
        found = {"file": str(file), "identifier": fresh.identifier}
        show(
            as_json,
            found,
            lambda: click.echo(f"{file}: secret key {fresh.identifier}. Keep a copy; show nobody."),
        )


@main.command()
@click.option("--model", required=True, help="package.module:factory or file.py:factory.")
@click.option("--weights", type=FILE, help="The model's weights, safetensors.")
@click.option("--data", "data_file", type=FILE, required=True, help=".npz with inputs and labels.")
@click.option("--validation", type=FILE, help=".npz the model was not trained on, to measure accuracy.")
@click.option("--triggers", type=FILE, help=".npz nobody has seen, to make triggers of.")
@click.option("--reference", help="Unmarked model to compare suspects with.  [default: the model]")
@click.option("--reference-weights", type=FILE, help="Its weights, safetensors.")
@click.option(
    "--after-removals",
    is_flag=True,
    help="Compare suspects also with what removals (trained here, on the data) make of the reference.",
)
@click.option("--key", "key_file", type=FILE, required=True, help="Key file.")
@click.option("--output", type=FILE, default=Path("model.honeytrace"), show_default=True)
@click.option("--max-accuracy-drop", type=float, default=0.005, show_default=True, help="Share of answers.")
@click.option("--flips/--no-flips", default=True, show_default=True, help="Marks for label-only attackers.")
@json_option
def protect(
    model: str,
    weights: Path | None,
    data_file: Path,
    validation: Path | None,
    triggers: Path | None,
    reference: str | None,
    reference_weights: Path | None,
    after_removals: bool,
    key_file: Path,
    output: Path,
    max_accuracy_drop: float,
    flips: bool,
    as_json: bool,
) -> None:
    """Calibrate a watermark for a trained model and write it to a file, as secret as the key."""
    with refusing():
        from honeytrace import removal, userfiles
        from honeytrace.data import Split

        if reference is None and reference_weights is not None:
            raise click.UsageError("--reference-weights needs --reference")
        if reference is None and after_removals:
            raise click.UsageError("--after-removals needs --reference: an unmarked copy of the model")
        check_place(output)
        owner_key = _load_key(key_file)
        classifier = userfiles.make_module(model, weights)
        compared = None if reference is None else userfiles.make_module(reference, reference_weights)
        labelled = {
            name: None if file is None else userfiles.load_labelled(file)
            for name, file in (("validation", validation), ("trigger_data", triggers))
        }
        data = userfiles.load_labelled(data_file)
        references = None if compared is None else [compared]
        with stages() as stage:
            if references is not None and after_removals:
                with stage("taking removals to the reference") as progress:
                    references += removal.after_removals(
                        references[0], Split(*data), seed=0, progress=progress
                    )
            with stage("calibrating the watermark") as progress:
                watermark = honeytrace.Watermark.calibrate(
                    classifier,
                    data,
                    key=owner_key,
                    max_accuracy_drop=max_accuracy_drop,
                    flips=flips,
                    reference=references,
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
        show(as_json, found, lambda: click.echo(f"{watermark.summary}\nwritten to {output}; keep it secret"))


@main.command()
@click.option("--model", required=True, help="The bare model: package.module:factory or file.py:factory.")
@click.option("--weights", type=FILE, help="Its weights, safetensors.")
@click.option("--watermark", "watermark_file", type=FILE, required=True, help="File written by protect.")
@click.option("--data", "data_file", type=FILE, required=True, help=".npz with inputs and labels.")
@json_option
def measure(model: str, weights: Path | None, watermark_file: Path, data_file: Path, as_json: bool) -> None:
    """Measure what a watermark costs a model on labelled data: accuracy before and after, answers touched."""
    with refusing():
        from honeytrace import userfiles

        watermark = honeytrace.Watermark.load(watermark_file)
        with stages() as stage, stage("asking the model") as progress:
            cost = watermark.measure(
                userfiles.make_module(model, weights), userfiles.load_labelled(data_file), progress=progress
            )
        show(as_json, cost.to_dict(), lambda: click.echo(str(cost)))


@main.command()
@click.option(
    "--model", required=True, help="The model that is asked: package.module:factory or file.py:factory."
)
@click.option("--weights", type=FILE, help="Its weights, safetensors.")
@click.option("--watermark", "watermark_file", type=FILE, help="Protect the model first.  [default: bare]")
@click.option("--pool", type=FILE, required=True, help=".npz with inputs to ask about.")
@click.option(
    "--surrogate", required=True, help="The copy's architecture: package.module:factory or file.py:factory."
)
@click.option("--labels", type=click.Choice(["soft", "top1"]), default="soft", show_default=True)
@click.option("--budget", type=int, help="Number of queries.  [default: the whole pool]")
@click.option("--epochs", type=int, default=6, show_default=True)
@click.option("--drop-worst", type=float, default=0.0, show_default=True, help="Share of queries left out.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", type=FILE, default=Path("copy.safetensors"), show_default=True)
@json_option
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
    with refusing():
        from honeytrace import extraction, userfiles

        check_place(output)
        asked = userfiles.make_module(model, weights)
        if watermark_file is not None:
            asked = honeytrace.Watermark.load(watermark_file).protect(asked)
        inputs = userfiles.load_inputs(pool)
        with stages() as stage, stage("extracting a copy") as progress:
            found = extraction.outliers(
                extraction.api(asked),
                inputs,
                extraction.Recipe(lambda: userfiles.make_module(surrogate, None), epochs),
                seed=seed,
                budget=budget,
                labels="soft" if labels == "soft" else "top1",
                share=drop_worst,
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
        show(as_json, facts, lambda: click.echo(text))


@main.command()
@click.option(
    "--model",
    help="The suspect: package.module:factory or file.py:factory. The factory may also give any callable "
    "from inputs to scores or labels, such as a client of somebody's API.",
)
@click.option("--weights", type=FILE, help="Its weights, safetensors.")
@click.option("--watermark", "watermark_file", type=FILE, required=True, help="File written by protect.")
@click.option("--key", "key_file", type=FILE, required=True, help="Key file.")
@click.option("--alpha", type=float, default=1e-3, show_default=True, help="False-claim probability.")
@click.option("--answers", type=click.Choice(["auto", "scores", "labels"]), default="auto", show_default=True)
@click.option("--rule", type=click.Choice(["exact", "e-process"]), default="exact", show_default=True)
@click.option("--triggers", type=int, help="Asked in each group, by scores.  [default: the watermark's]")
@click.option("--graded-only", is_flag=True, help="Verify the graded mark alone, as served without flips.")
@ownership_cli.asking
@json_option
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
    with refusing():
        chosen = one_of(rule, "exact", "e-process")
        if options["plan"]:
            fields, text = ownership_cli.show_plan(watermark_file, graded_only, alpha, chosen, triggers)
            show(as_json, fields, lambda: click.echo(text))
            return
        with stages() as stage:
            verdict = ownership_cli.run(
                options,
                model=model,
                weights=weights,
                watermark_file=watermark_file,
                key_file=key_file,
                graded_only=graded_only,
                stage=stage,
                alpha=alpha,
                answers=one_of(answers, "auto", "scores", "labels"),
                rule=chosen,
                triggers=triggers,
            )
        show(as_json, verdict.to_dict(), lambda: click.echo(str(verdict)))
    context.exit(0 if verdict.claim else 1)


@main.command()
@click.argument("plan", default="digits-small", metavar="PLAN")
@click.option(
    "--directory", type=DIRECTORY, default=Path("evaluation"), show_default=True, help="Of results."
)
@click.option("--rows", help="Only these rows: names or parts of names, comma-separated.")
@click.option("--columns", help="Only columns and removals, likewise.")
@click.option("--seeds", help="Only these seeds, comma-separated.")
@click.option("--engine", type=click.Choice(["process", "ray"]), default="process", show_default=True)
@click.option("--address", help="With --engine ray: of a running cluster.  [default: start Ray here]")
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Cells at once; with --address, on each GPU.  [default: one here; with Ray one a core or GPU]",
)
@click.option("--device", default="cpu", show_default=True, help="Where models train and answer: cpu, cuda.")
@click.option("--adopt", type=FILE, help="A cells.jsonl of an earlier run: its cells are not run again.")
@click.option("--report-only", is_flag=True, help="Run nothing; report what is there.")
@json_option
@click.pass_context
def evaluate(
    context: click.Context,
    plan: str,
    directory: Path,
    rows: str | None,
    columns: str | None,
    seeds: str | None,
    engine: str,
    address: str | None,
    workers: int | None,
    device: str,
    adopt: Path | None,
    report_only: bool,
    as_json: bool,
) -> None:
    """Run every defence against every attack and removal of PLAN, and report.

    PLAN is digits-small, digits, fashion or a TOML file. What is in the directory already is not run again:
    a run that was killed goes on where it stopped. Exit 0 when no cell failed.
    """
    with refusing():
        from honeytrace import evaluation

        if engine == "process" and address is not None:
            raise click.UsageError("--address needs --engine ray")
        # With Ray a cell has what Ray shows it; elsewhere there may be a GPU where there is none here.
        _check_device(device, engine, address)
        whole = evaluation.Plan.load(plan)
        wanted = None if seeds is None else tuple(int(seed) for seed in seeds.split(","))
        narrow = rows is not None or columns is not None or wanted is not None
        part = whole.narrowed(rows, columns, wanted) if narrow else whole
        store = evaluation.Store(directory)
        if adopt is not None:
            click.echo(f"{store.adopt(adopt)} cells taken over from {adopt}", err=True)
        failed = []
        if not report_only:
            results = evaluation.evaluate(
                part,
                directory,
                engine=_engine(engine, address, workers, device),
                run=partial(evaluation.run_cell, device=device),
                say=lambda text: click.echo(text, err=True),
            )
            failed = [result for result in results if result["status"] == "failed"]
        written = evaluation.write_report(whole, [*store.all(whole.cells()), *failed], directory)
        names = [str(path) for path in written]
        show(as_json, {"files": names, "failed": len(failed)}, lambda: click.echo("\n".join(names)))
    context.exit(1 if failed else 0)


def _check_device(name: str, engine: str, address: str | None) -> None:
    import torch

    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise Refused(f"--device must be cpu or cuda, got {name!r}")
    if engine == "ray" and device.index is not None:
        raise Refused(f"--device {name}: Ray chooses the GPU, say cuda")
    if device.type == "cuda" and address is None and not torch.cuda.is_available():
        raise Refused(f"--device {name}: there is no GPU that torch can use")


def _engine(name: str, address: str | None, workers: int | None, device: str) -> Engine:
    import torch

    from honeytrace import evaluation

    if name == "ray":
        if torch.device(device).type == "cpu":
            return evaluation.on_ray(address, workers)
        gpus = torch.cuda.device_count() if address is None else 1
        return evaluation.on_ray(address, workers, gpu_share=1 / math.ceil((workers or 1) / gpus))
    return evaluation.in_process if workers is None else evaluation.in_processes(workers)


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """What this installation runs on, and why."""
    with refusing():
        found = honeytrace.doctor.doctor()
        show(as_json, found, lambda: _print_tree(found))


def _load_key(file: Path) -> honeytrace.SecretKey:
    """For commands that begin with a key: who has none yet is told how to make one."""
    try:
        return honeytrace.SecretKey.load(file)
    except FileNotFoundError:
        raise Refused(f"no key at {file}; make one with: honeytrace key {file}") from None


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
serving_cli.add_to(main)

if __name__ == "__main__":
    main()
