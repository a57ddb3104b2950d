"""Showing long work: one line for each stage, a bar where there is a terminal to draw it on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Report(Protocol):
    """`honeytrace.training.Progress`, without the import of torch."""

    def __call__(self, done: int, total: int, text: str) -> None:
        """`done` of `total` steps are over; `text` says in a few words where the work stands."""


Stage: TypeAlias = Callable[[str], AbstractContextManager[Report]]
"""`with stage("training the victim") as report:` does one piece of work and tells `report` how far it is."""


@contextmanager
def silent(text: str) -> Iterator[Report]:
    """The stage that shows nothing."""
    yield lambda done, total, text: None


class Stages:
    """Stages on a console. A context manager; call it inside to open a stage.

    On a terminal every stage is a bar that stays when it is over. Elsewhere (a log, a pipe) every stage is
    one line with the seconds it took, written when it is over.

    Args:
        console: where to write; the commands give the one of standard error, so that standard output holds
            results only.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Stages:
        self._bars.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bars.stop()

    @contextmanager
    def __call__(self, text: str) -> Iterator[Report]:
        """One stage, named `text`."""
        began = time.perf_counter()
        task = self._bars.add_task(text, total=None, detail="")

        def report(done: int, total: int, text: str) -> None:
            self._bars.update(task, completed=done, total=total, detail=text)

        yield report
        # What was announced is done, whether or not somebody counted its steps.
        self._bars.update(task, completed=1, total=1, detail="")
        self._bars.stop_task(task)
        if not self._console.is_terminal:
            self._console.print(f"{text}: {time.perf_counter() - began:.1f} s", highlight=False)
