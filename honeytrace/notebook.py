"""Results as a notebook shows them: HTML that is whole in itself and takes its colours from the page around.

Everything is escaped; nothing has a colour of its own but the bar at the side, so it reads on light and dark.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

# A page in quirks mode would give tables a black text of their own.
_TABLE = '<table style="color:inherit;font:inherit;border-spacing:0.8em 0.1em">'
_SIDES = {"good": "#2e9e5b", "bad": "#d0563f", "plain": "#8888"}


def card(title: str, *parts: str, side: str = "plain") -> str:
    """A titled box. side: "good", "bad" or "plain", a bar on the left; parts: HTML of `facts` and `table`."""
    style = f"border-left:4px solid {_SIDES[side]};padding:0.2em 0 0.2em 0.8em;margin:0.4em 0"
    return f'<div style="{style}"><div><b>{html.escape(title)}</b></div>{"".join(parts)}</div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    left = 'style="text-align:left;font-weight:normal;opacity:0.75"'
    rows = (
        f'<tr><th scope="row" {left}>{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(value)}</td></tr>'
        for name, value in pairs
    )
    return f"{_TABLE}<tbody>{''.join(rows)}</tbody></table>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a line of heads."""
    head = "".join(f'<th scope="col" style="text-align:right">{html.escape(name)}</th>' for name in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>".replace(
            "<td>", '<td style="text-align:right">'
        )
        for row in rows
    )
    return f"{_TABLE}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def notes(texts: Iterable[str]) -> str:
    """A list of sentences; nothing where there are none."""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""
