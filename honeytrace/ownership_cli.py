"""The commands and options of ownership: commit, check-evidence, and what `verify` takes beyond a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import honeytrace
from honeytrace.console import DIRECTORY, FILE, json_option, refusing, show

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from honeytrace.ownership.verdict import Verdict

# Everything heavy is imported where it is used, as in cli.py.

_OPTIONS = (
    click.option("--url", help="The suspect's API, http or https, instead of --model."),
    click.option("--format", "form", help="file.py:factory that gives (encode, decode).  [default: JSON]"),
    click.option("--header", "headers", multiple=True, help='Sent with each request: "Name: value".'),
    click.option("--header-file", type=FILE, help="Headers from a file, one a line."),
    click.option("--top-k", type=int, help="The API gives its best answers only: number of classes."),
    click.option("--batch-size", type=int, default=32, show_default=True, help="Inputs in a request."),
    click.option("--per-second", type=float, help="Most requests a second.  [default: no limit]"),
    click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds for a request."),
    click.option("--tries", type=int, default=5, show_default=True, help="How often a request is sent."),
    click.option("--journal", type=FILE, help="Keep answers there and go on from it.  [default with --url: "
                 "WATERMARK.journal]"),
    click.option("--evidence", type=DIRECTORY, help="Write a bundle for others to check; it opens the key."),
    click.option("--commitment", type=FILE, help="The commitment that was deposited, for the bundle."),
    click.option("--beacon", type=FILE, help="The beacon record of commit --beacon, for the bundle."),
    click.option("--describe", default="", help="What was asked, in words, for the bundle."),
    click.option("--sign", type=FILE, help="Ed25519 private key (PEM) to sign the bundle with."),
    click.option("--plan", is_flag=True, help="Ask nothing: say what can be expected, and at which cost."),
)  # fmt: skip


def asking(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the options of `verify` that this module serves."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def add_to(group: click.Group) -> None:
    """Hang the commands of this module into the command line."""
    group.add_command(commit)
    group.add_command(check_evidence)


def show_plan(watermark_file: Path, graded_only: bool, alpha: float, rule: Any, triggers: int | None) -> Any:
    """Rows of the plan: (fields for JSON, text)."""
    from honeytrace.ownership.planning import plan_rows, table, to_dicts

    watermark = honeytrace.Watermark.load(watermark_file)
    if graded_only:
        watermark = watermark.without_flips()
    asked = watermark.questions_per_group if triggers is None else triggers
    rows = plan_rows(watermark.groups, alpha=alpha, rule=rule, triggers=asked)
    return {"alpha": alpha, "rule": rule, "rows": to_dicts(rows)}, table(rows)


def run(
    options: dict[str, Any],
    *,
    model: str | None,
    weights: Path | None,
    watermark_file: Path,
    key_file: Path,
    graded_only: bool,
    stage: Any,
    **settings: Any,
) -> Verdict:
    """`verify` with the options of this module; writes the evidence where it is wanted."""
    from honeytrace.ownership.evidence import collect
    from honeytrace.ownership.journal import Journal

    _check(options, model, graded_only)
    watermark = honeytrace.Watermark.load(watermark_file)
    if graded_only:
        watermark = watermark.without_flips()
    key = honeytrace.SecretKey.load(key_file)
    suspect = _suspect(options, model, weights)
    journal = options["journal"]
    if journal is None and options["url"] is not None:
        journal = watermark_file.with_name(watermark_file.name + ".journal")
    kept = None
    if journal is not None:
        kept = Journal(suspect, journal, name=options["url"] or f"{model} {weights}")
        suspect = kept
        settings["batch_size"] = options["batch_size"]
    signer = None if options["sign"] is None else _signer(options["sign"])
    commitment, beacon = _deposited(options)
    try:
        with stage("asking the suspect") as progress:
            if options["evidence"] is None:
                return honeytrace.verify(suspect, watermark, key, progress=progress, **settings)
            evidence = collect(
                suspect,
                watermark,
                key,
                commitment=commitment,
                beacon=beacon,
                description=options["describe"],
                progress=progress,
                **settings,
            )
        evidence.write(options["evidence"], signer=signer)
        return evidence.verdict
    except KeyboardInterrupt:
        if kept is not None:
            click.echo(f"answers so far are in {journal}; run the same command again to go on", err=True)
        raise
    finally:
        if kept is not None:
            kept.close()


def _check(options: dict[str, Any], model: str | None, graded_only: bool) -> None:
    """Before any question: those cannot be taken back."""
    if (model is None) == (options["url"] is None):
        raise click.UsageError("give --model or --url, one of them")
    if options["evidence"] is not None:
        if graded_only:
            raise click.UsageError("--evidence needs the watermark that was committed to, whole")
        if options["evidence"].exists():
            raise click.UsageError(f"{options['evidence']} exists; evidence is not overwritten")
    else:
        for name in ("commitment", "beacon", "describe", "sign"):
            if options[name]:
                raise click.UsageError(f"--{name} needs --evidence")


def _suspect(options: dict[str, Any], model: str | None, weights: Path | None) -> Any:
    from honeytrace import userfiles
    from honeytrace.ownership.http_suspect import HttpSuspect, json_request, json_response

    if options["url"] is None:
        assert model is not None
        return userfiles.make_model(model) if weights is None else userfiles.make_module(model, weights)
    encode, decode = json_request, json_response
    if options["form"] is not None:
        encode, decode = userfiles.make_model(options["form"])
    lines = list(options["headers"])
    if options["header_file"] is not None:
        lines += options["header_file"].read_text(encoding="utf-8").splitlines()
    headers = {}
    for line in filter(str.strip, lines):
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise click.UsageError("a header is written Name: value")  # never what it holds
        headers[name.strip()] = value.strip()
    return HttpSuspect(
        options["url"],
        encode=encode,
        decode=decode,
        headers=headers,
        batch_size=options["batch_size"],
        per_second=options["per_second"],
        timeout=options["timeout"],
        tries=options["tries"],
        top_k_classes=options["top_k"],
    )


def _deposited(options: dict[str, Any]) -> tuple[Any, Any]:
    from honeytrace.ownership.commitment import Beacon, Commitment

    commitment = None if options["commitment"] is None else Commitment.load(options["commitment"])
    beacon = None if options["beacon"] is None else Beacon.load(options["beacon"])
    return commitment, beacon


def _signer(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = path.read_bytes()
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError):
        raise ValueError(f"{path} is no unencrypted private key in PEM form") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path} is no Ed25519 key")
    return key


@click.command()
@click.option("--watermark", "watermark_file", type=FILE, required=True, help="File written by protect.")
@click.option("--key", "key_file", type=FILE, required=True, help="Key file.")
@click.option("--model", help="The protected model: package.module:factory or file.py:factory.")
@click.option("--weights", type=FILE, help="Its weights, safetensors.")
@click.option("--alpha", type=float, help="False-claim probability of the verification.  [default: 0.001]")
@click.option("--rule", type=click.Choice(["exact", "e-process"]), help="Its test.  [default: exact]")
@click.option("--output", type=FILE, help="[default: commitment.json, or with --beacon bound.honeytrace]")
@click.option("--beacon", help="The public random value; binds the watermark to it.")
@click.option("--source", default="", help="Where the value can be looked up, and when it was published.")
@click.option("--commitment", type=FILE, help="With --beacon: the commitment deposited before.")
@click.option("--record", type=FILE, help="With --beacon: where to write it.  [default: beacon.json]")
@json_option
def commit(
    watermark_file: Path,
    key_file: Path,
    model: str | None,
    weights: Path | None,
    alpha: float | None,
    rule: Any,
    output: Path | None,
    beacon: str | None,
    source: str,
    commitment: Path | None,
    record: Path | None,
    as_json: bool,
) -> None:
    """Commit to key and watermark; later, with --beacon, bind them to a public random value.

    First without --beacon: writes a commitment that reveals nothing; deposit it with somebody whose date
    counts. Then, when the value has become known: with --beacon. Serve the bound watermark only.
    """
    with refusing():
        from honeytrace import userfiles
        from honeytrace.ownership.commitment import Commitment, bind

        watermark = honeytrace.Watermark.load(watermark_file)
        key = honeytrace.SecretKey.load(key_file)
        if beacon is None:
            if model is None or commitment is not None or record is not None or source:
                raise click.UsageError("committing needs --model; --commitment, --record, --source: --beacon")
            place = output or Path("commitment.json")
            made = Commitment.make(
                watermark,
                key,
                userfiles.make_module(model, weights),
                alpha=1e-3 if alpha is None else alpha,
                rule=rule or "exact",
            )
            made.save(place)
            found = {"file": str(place), "digest": made.digest}
            text = f"{place}: deposit this, or its digest {made.digest}, before anything is served"
        else:
            if commitment is None:
                raise click.UsageError("--beacon needs --commitment, the one deposited before")
            if model is not None or alpha is not None or rule is not None:
                raise click.UsageError("--model, --alpha and --rule were committed to; leave them out")
            place, told = output or Path("bound.honeytrace"), record or Path("beacon.json")
            if place.exists():
                raise click.UsageError(f"{place} exists; a bound watermark is not overwritten")
            bound, made_record = bind(watermark, key, Commitment.load(commitment), beacon, source)
            made_record.save(told)
            bound.save(place)
            found = {"file": str(place), "record": str(told), "digest": made_record.commitment}
            text = (
                f"{place}: serve and verify with this watermark from now on; {told} belongs to the evidence"
            )
        show(as_json, found, lambda: click.echo(text))


@click.command("check-evidence")
@click.argument("directory", type=DIRECTORY)
@click.option("--beacon", help="The public random value as you looked it up.")
@click.option("--deposited", type=FILE, multiple=True, help="Each commitment the owner ever deposited.")
@click.option("--signed-by", help="Ed25519 public key, 64 hexadecimal digits, that must have signed.")
@click.option("--model", help="Ask this suspect all questions again: file.py:factory.")
@click.option("--weights", type=FILE, help="Its weights, safetensors.")
@json_option
@click.pass_context
def check_evidence(
    context: click.Context,
    directory: Path,
    beacon: str | None,
    deposited: tuple[Path, ...],
    signed_by: str | None,
    model: str | None,
    weights: Path | None,
    as_json: bool,
) -> None:
    """Derive everything in a bundle again; exit 0 for a claim that stands, 1 for none, 2 for a mismatch."""
    with refusing():
        from honeytrace import userfiles
        from honeytrace.ownership.commitment import Commitment
        from honeytrace.ownership.evidence import check

        suspect = None
        if model is not None:
            suspect = (
                userfiles.make_model(model) if weights is None else userfiles.make_module(model, weights)
            )
        found = check(
            directory,
            beacon=beacon,
            deposited=[Commitment.load(path) for path in deposited],
            signed_by=signed_by,
            suspect=suspect,
        )
        show(as_json, found.to_dict(), lambda: click.echo(str(found)))
    context.exit(2 if found.problems else 0 if found.claim else 1)
