"""The demo's figures as text that people read."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from honeytrace.demo import DemoResult, Latency, SuspectResult


def report(result: DemoResult, console: Console) -> None:
    """Print everything a run found."""
    console.print(str(result.summary), markup=False, soft_wrap=True)
    console.print()
    console.print(_accuracy(result), markup=False)
    console.print()
    console.print(_suspects(result))
    console.print(_latency(result.latency, result.threads))
    for note in result.notes:
        console.print(f"Note: {note}", markup=False)
    wrong = [f"{s.name} of the {s.made_from}" for s in result.suspects if not s.as_expected]
    if wrong:
        console.print(f"NOT as expected: {'; '.join(wrong)}.", style="bold red", markup=False)
    else:
        console.print("Every verdict is the expected one.", style="bold")
    console.print(
        f"{result.seconds:.0f} s, seed {result.seed}, key {result.key_identifier[:8]}...", markup=False
    )


def _accuracy(result: DemoResult) -> str:
    def against(accuracy: float) -> str:
        return f"{accuracy:.2%} ({100 * (accuracy - result.accuracy_bare):+.2f} points)"

    return (
        "Accuracy on the test images\n"
        f"  bare model         {result.accuracy_bare:.2%}\n"
        f"  graded mark alone  {against(result.accuracy_graded)}\n"
        f"  all marks          {against(result.accuracy_protected)}"
    )


def _suspects(result: DemoResult) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"Suspects, at false-claim probability {result.alpha:g}",
        title_justify="left",
        caption=(
            "hits: share of the flip groups' triggers answered with the target's label. "
            "target: mean probability of the target on all triggers "
            f"(owner's reference: {result.reference_probability:.4f}). "
            "labels, queries: p-value and questions when the suspect shows labels only."
        ),
        caption_justify="left",
    )
    table.add_column("suspect\n  made from", no_wrap=True)
    for name in (
        "accuracy\nfidelity",
        "hits\ntarget",
        "p-value\ne-value",
        "queries\nof all",
        "labels\nqueries",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict\n", no_wrap=True)
    for suspect in result.suspects:
        table.add_row(*_suspect_row(suspect))
    return table


def _suspect_row(suspect: SuspectResult) -> tuple[str, ...]:
    verdict = suspect.by_scores
    said = "[bold]CLAIM[/bold]" if verdict.claim else "no claim"
    expectation = "expected" if suspect.as_expected else "[bold red]UNEXPECTED[/bold red]"
    if suspect.expected is None:
        expectation = "no promise"
    hits = "-" if suspect.success_rate is None else f"{suspect.success_rate:.1%}"
    return (
        f"{suspect.name}\n  [dim]{suspect.made_from}[/dim]",
        f"{suspect.accuracy:.2%}\n{suspect.fidelity:.2%}",
        f"{hits}\n{suspect.target_probability:.4f}",
        f"{verdict.p_value:.2g}\n{verdict.e_value:.3g}",
        f"{verdict.queries}\n{verdict.queries_total}",
        f"{suspect.by_labels.p_value:.2g}\n{suspect.by_labels.queries}",
        f"{said}\n[dim]{expectation}[/dim]",
    )


def _latency(rows: tuple[Latency, ...], threads: int) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=f"Latency of a call, {threads} thread{'s' if threads > 1 else ''}: medians, timed in turn",
        title_justify="left",
    )
    for name in ("batch", "bare, ms", "protected, ms", "ratio", "spread of the ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.batch),
            f"{row.bare_ms:.3f}",
            f"{row.protected_ms:.3f}",
            f"{row.ratio:.2f}",
            f"{row.spread:.2f}",
        )
    return table
