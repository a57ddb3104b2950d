"""The demo's figures as text that people read."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from honeytrace.demo import DemoResult, Latency, SuspectResult


def report(result: DemoResult, console: Console) -> None:
    """Print everything a run found."""
    console.print(str(result.summary), markup=False)
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
    def lost(accuracy: float) -> str:
        return f"{accuracy:.2%} ({100 * (result.accuracy_bare - accuracy):+.2f} points lost)"

    return (
        f"Accuracy on the test images: bare {result.accuracy_bare:.2%}, graded mark alone "
        f"{lost(result.accuracy_graded)}, all marks {lost(result.accuracy_protected)}"
    )


def _suspects(result: DemoResult) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        title=f"Suspects at false-claim probability {result.alpha:g}",
        title_justify="left",
        caption=(
            "hits: share of the flip groups' triggers answered with the target's label. target: mean "
            "probability of the target on all triggers "
            f"({result.reference_probability:.4f} for the owner's unmarked reference). "
            "p, e, queries: of the verdict, by scores. p, labels: when the suspect shows labels only."
        ),
        caption_justify="left",
    )
    table.add_column("suspect\n  made from", no_wrap=True)
    for name in ("accuracy", "fidelity", "hits", "target", "p-value", "e-value", "queries", "p, labels"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for suspect in result.suspects:
        table.add_row(*_suspect_row(suspect))
    return table


def _suspect_row(suspect: SuspectResult) -> tuple[str, ...]:
    verdict = suspect.by_scores
    said = "[bold]CLAIM[/bold]" if verdict.claim else "no claim"
    expectation = "as expected" if suspect.as_expected else "[bold red]NOT expected[/bold red]"
    if suspect.expected is None:
        expectation = "none expected"
    return (
        f"{suspect.name}\n  {suspect.made_from}",
        f"{suspect.accuracy:.2%}",
        f"{suspect.fidelity:.2%}",
        "-" if suspect.success_rate is None else f"{suspect.success_rate:.1%}",
        f"{suspect.target_probability:.4f}",
        f"{verdict.p_value:.2g}",
        f"{verdict.e_value:.3g}",
        f"{verdict.queries}/{verdict.queries_total}",
        f"{suspect.by_labels.p_value:.2g}" + ("*" if suspect.by_labels.claim else ""),
        f"{said}\n[dim]{expectation}[/dim]",
    )


def _latency(rows: tuple[Latency, ...], threads: int) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
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
