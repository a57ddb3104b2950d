"""The readable page of an evidence bundle: one HTML file, nothing fetched, nothing secret, the same bytes
each time."""

from __future__ import annotations

import html
import math
from typing import Any

_WIDTH, _HEIGHT, _MARGIN = 640, 260, 46

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:46em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}"
    "th,td{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}"
    "code{word-break:break-all}"
)


def page(verdict: dict[str, Any], facts: dict[str, str]) -> str:
    """The page.

    Args:
        verdict: `Verdict.to_dict()`.
        facts: what else to show, by name: commitment, beacon, suspect, ...
    """
    claim = bool(verdict["claim"])
    headline = (
        "Claim: the suspect was trained on the protected answers"
        if claim
        else "No claim: the evidence is not enough"
    )
    meaning = (
        "If the suspect had been made without the protected answers, evidence as strong as this would have "
        f"come about with probability at most {verdict['p_value']:.2g}; the limit declared beforehand was "
        f"{verdict['alpha']:g}. The chance is that of the draw of the secret target classes, and of nothing "
        "else: nothing is assumed about the suspect or about honest models."
    )
    rows = {
        "p-value": f"{verdict['p_value']:.3g}",
        "declared limit (alpha)": f"{verdict['alpha']:g}",
        "rule": str(verdict["rule"]),
        "e-value": f"{verdict['e_value']:.4g}",
        "questions until then": f"{verdict['queries']}",
        "answers used": str(verdict["answers"]),
        **facts,
    }
    table = "".join(
        f"<tr><th>{html.escape(name)}</th><td><code>{html.escape(value)}</code></td></tr>"
        for name, value in rows.items()
    )
    groups = "".join(
        f"<tr><td>{n}</td><td>{g['target_rank']} of {g['candidates']}</td><td>{g['e_value']:.3g}</td>"
        f"<td>{g['running_e']:.3g}</td><td>{g['p_value']:.2g}</td><td>{g['queries']}</td></tr>"
        for n, g in enumerate(verdict["groups"], start=1)
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Honeytrace evidence</title>"
        f"<style>{_STYLE}</style></head><body><h1>{headline}</h1><p>{meaning}</p><table>{table}</table>"
        "<h2>How the evidence grew</h2><p>The running e-value after each group of questions, on a "
        "logarithmic scale. For a suspect that never saw the answers it is 1 on average, wherever the "
        "asking stops.</p>"
        f"{curve([g['running_e'] for g in verdict['groups']], verdict['alpha'])}"
        "<table><thead><tr><th>group</th><th>rank of the target</th><th>e-value</th><th>running e</th>"
        f"<th>p-value</th><th>questions</th></tr></thead><tbody>{groups}</tbody></table>"
        "<p>This page is a reading aid. What counts is that <code>honeytrace check-evidence</code> derives "
        "it again from the opened key and the recorded answers.</p></body></html>\n"
    )


def curve(running: list[float], alpha: float) -> str:
    """The running e-values as an inline SVG, with a line at 1 / alpha."""
    logs = [0.0, *(math.log10(max(value, 1e-12)) for value in running)]
    level = -math.log10(alpha)
    low, high = min(*logs, -1.0), max(*logs, level) + 0.3

    def x(place: float) -> float:
        return _MARGIN + (_WIDTH - 2 * _MARGIN) * place / max(1, len(logs) - 1)

    def y(log: float) -> float:
        return _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (log - low) / (high - low)

    points = " ".join(f"{x(i):.1f},{y(log):.1f}" for i, log in enumerate(logs))
    marks = "".join(
        f"<text x='4' y='{y(power) + 4:.1f}' font-size='11'>1e{power}</text>"
        f"<line x1='{_MARGIN}' x2='{_WIDTH - _MARGIN}' y1='{y(power):.1f}' y2='{y(power):.1f}' "
        "stroke='#ddd'/>"
        for power in range(math.ceil(low), math.floor(high) + 1)
    )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' aria-label='running e-value' "
        f"width='{_WIDTH}' height='{_HEIGHT}' viewBox='0 0 {_WIDTH} {_HEIGHT}'>{marks}"
        f"<line x1='{_MARGIN}' x2='{_WIDTH - _MARGIN}' y1='{y(level):.1f}' y2='{y(level):.1f}' stroke='#b00' "
        "stroke-dasharray='5 4'/>"
        f"<text x='{_WIDTH - _MARGIN}' y='{y(level) - 5:.1f}' text-anchor='end' font-size='11' "
        f"fill='#b00'>1 / alpha</text><polyline points='{points}' fill='none' stroke='#036' "
        "stroke-width='2'/></svg>"
    )
