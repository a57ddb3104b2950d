"""Writing an evaluation: JSON lines, Markdown, pictures, and one page that needs nothing else."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path

from honeytrace.evaluation.plan import Plan
from honeytrace.evaluation.plots import plots
from honeytrace.evaluation.store import Result, write_lines
from honeytrace.evaluation.tables import Table, tables
from honeytrace.files import write_private

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { border-bottom: 1px solid #8884; padding: .25rem .6rem; text-align: left; }
tbody th { position: sticky; left: 0; background: Canvas; font-weight: 600; }
td.claim { background: #2a9d4a33; } td.failed { background: #d6453d44; }
td.poor { color: #888; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; background: #fff; }
nav a { margin-right: 1rem; }
.note { color: #777; font-size: .9rem; }
"""


def write_report(plan: Plan, results: Sequence[Result], directory: str | os.PathLike[str]) -> list[Path]:
    """Write ``cells.jsonl``, ``tables.md``, the pictures as ``.svg`` and ``report.html``.

    Args:
        plan: the matrix; results: of its cells, as many as there are.
        directory: made when it is not there.

    Returns:
        The files written.
    """
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    made, drawn = tables(plan, results), plots(plan, results)
    files = {
        "tables.md": "\n".join(
            [f"# {plan.name}\n", _told(plan, results) + "\n", *(t.markdown() for t in made)]
        ),
        "report.html": page(plan, results, made, drawn),
        **{f"{_anchor(title)}.svg": svg for title, svg in drawn.items()},
    }
    written = [place / "cells.jsonl"]
    write_lines([r for r in results if r["status"] != "failed"], written[0])
    for name, text in files.items():
        write_private(place / name, memoryview(text.encode("utf-8")), overwrite=True)
        written.append(place / name)
    return written


def page(plan: Plan, results: Sequence[Result], made: Sequence[Table], drawn: dict[str, str]) -> str:
    """The report as one HTML document: no script, no font, nothing from a network."""
    links = "".join(
        f'<a href="#{_anchor(title)}">{html.escape(title)}</a> '
        for title in (*drawn, *(t.title for t in made))
    )
    figures = "".join(
        f'<h2 id="{_anchor(title)}">{html.escape(title)}</h2><figure class="wide">{_inline(svg)}</figure>'
        for title, svg in drawn.items()
    )
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation {html.escape(plan.name)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Evaluation {html.escape(plan.name)}</h1><p>{html.escape(_told(plan, results))}</p>"
        f"<nav>{links}</nav>{''.join(_section(table) for table in made[:4])}{figures}"
        f"{''.join(_section(table) for table in made[4:])}</body></html>\n"
    )


def _told(plan: Plan, results: Sequence[Result]) -> str:
    counts = {
        status: sum(r["status"] == status for r in results) for status in ("done", "not applicable", "failed")
    }
    whole = sum(1 for _ in plan.cells())
    made = [
        {**r["made_with"], "precision": r["precision"], "device": r.get("device", "cpu")}
        for r in results
        if "made_with" in r
    ]
    names = sorted(set().union(*made))
    values = {name: sorted({str(m[name]) for m in made if name in m}) for name in names}
    where = ", ".join(f"{name} {' and '.join(found)}" for name, found in values.items())
    return (
        f"Data {plan.data}; {len(plan.seeds)} seed(s); level {plan.alpha:g}; "
        f"{counts['done']} of {whole} cells done, "
        f"{counts['not applicable']} do not apply, {counts['failed']} failed, "
        f"{whole - sum(counts.values())} not run. {where}"
    )


def _section(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.head)
    body = "".join(
        f"<tr><th>{html.escape(line[0])}</th>{''.join(_entry(text) for text in line[1:])}</tr>"
        for line in table.lines
    )
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in table.notes)
    return (
        f'<h2 id="{_anchor(table.title)}">{html.escape(table.title)}</h2>'
        f'<p class="note">{html.escape(table.note)}</p>'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}'
    )


def _entry(text: str) -> str:
    kind = (
        "claim" if "**" in text else "failed" if text == "failed" else "poor" if text.startswith("(") else ""
    )
    shown = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return f'<td class="{kind}">{shown}</td>' if kind else f"<td>{shown}</td>"


def _inline(svg: str) -> str:
    """The <svg> element alone, with ids that are its own: several pictures share the page."""
    element = svg[svg.index("<svg") :]
    salt = _anchor(re.sub(r"[^a-z]", "", svg[-400:].lower()))[:8] + str(len(svg))
    element = re.sub(r'\bid="([^"]+)"', rf'id="{salt}-\1"', element)
    return re.sub(r'(href="#|url\(#)([^")]+)', rf"\g<1>{salt}-\2", element)


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
