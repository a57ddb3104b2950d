"""Three pictures of an evaluation, as SVG text."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Sequence
from typing import Any

from honeytrace.evaluation.plan import Plan
from honeytrace.evaluation.store import Result

_PRUNED = re.compile(r"fine-prune-(\d+)")


def plots(plan: Plan, results: Sequence[Result]) -> dict[str, str]:
    """Title -> SVG. Empty where matplotlib is not installed, and without those that have no data yet.

    Args:
        plan: gives the order of rows and columns.
        results: of its cells.
    """
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    marked = [r for r in results if r["status"] == "done" and "target_probability" in r]
    found = {
        "Price and effect": _price(plan, marked),
        "E-value against queries": _curves(plan, marked),
        "Mark after pruning": _pruning(plan, marked),
    }
    return {title: svg for title, svg in found.items() if svg is not None}


def _price(plan: Plan, marked: Sequence[Result]) -> str | None:
    """Accuracy lost against the mean target probability on copies, one point a defence."""
    figure, axes = _canvas()
    drawn = 0
    for row in plan.rows:
        own = [
            r for r in marked if r["cell"]["row"] == row and not r["cell"]["removal"] and not r.get("null")
        ]
        if own:
            lost = statistics.mean(100 * (r["accuracy_bare"] - r["accuracy_protected"]) for r in own)
            shown = [100 * r["target_probability"] for r in own]
            low, middle, high = min(shown), statistics.mean(shown), max(shown)
            axes.errorbar(lost, middle, yerr=[[middle - low], [high - middle]], fmt="o", capsize=3, label=row)
            drawn += 1
    axes.set_xlabel("accuracy lost by the protected model, points")
    axes.set_ylabel("target probability on triggers, %\n(mean over attacks, worst to best)")
    return _svg(figure, axes, drawn)


def _curves(plan: Plan, marked: Sequence[Result]) -> str | None:
    """Running e-value of the first row's copies, one line an attack; dotted: copies of the bare model."""
    figure, axes = _canvas()
    first = next(iter(plan.rows))
    drawn = 0
    for result in marked:
        cell = result["cell"]
        if (
            cell["seed"] != plan.seeds[0]
            or cell["removal"]
            or not (cell["row"] == first or result.get("null"))
        ):
            continue
        points = [(asked, e) for asked, e in result["claims"]["scores"]["curve"] if e]
        if points:
            innocent = bool(result.get("null"))
            axes.plot(
                [asked for asked, _ in points],
                [e for _, e in points],
                linestyle=":" if innocent else "-",
                color="gray" if innocent else None,
                linewidth=1,
                label=None if innocent else cell["column"],
            )
            drawn += 1
    axes.axhline(1 / plan.alpha, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("queries")
    axes.set_ylabel(f"running e-value ({first}; dotted: innocent)")
    return _svg(figure, axes, drawn, small=True)


def _pruning(plan: Plan, marked: Sequence[Result]) -> str | None:
    """Mean target probability after fine-pruning, one line a defence."""
    figure, axes = _canvas()
    drawn = 0
    for row in plan.rows:
        points: dict[int, list[float]] = {}
        for result in marked:
            cell = result["cell"]
            share = _PRUNED.fullmatch(str(cell["removal_settings"].get("removal", "")))
            if cell["row"] == row and share is not None:
                points.setdefault(int(share[1]), []).append(100 * result["target_probability"])
        if points:
            places = sorted(points)
            axes.plot(places, [statistics.mean(points[p]) for p in places], marker="o", label=row)
            drawn += 1
    axes.set_xlabel("channels pruned, %")
    axes.set_ylabel("target probability on triggers, %")
    return _svg(figure, axes, drawn)


def _canvas() -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(6.4, 4.4))


def _svg(figure: Any, axes: Any, drawn: int, *, small: bool = False) -> str | None:
    import matplotlib
    from matplotlib import pyplot

    if not drawn:
        pyplot.close(figure)
        return None
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=6 if small else 8)
    figure.tight_layout()
    text = io.StringIO()
    # A fixed salt: the same results are the same file.
    with matplotlib.rc_context({"svg.hashsalt": "honeytrace", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return text.getvalue()
