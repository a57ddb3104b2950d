"""Where cells are run: here, in several processes, or on Ray. All call one function and give results as they
come."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import torch

from honeytrace.evaluation.plan import Cell

CellFunction = Callable[[Cell, str], dict[str, Any]]
"""A cell and the directory of the evaluation -> figures. Must be importable by name for Ray."""

MOST_RETRIES = 2
"""How often a cell is started again whose worker died (not one that raised)."""


class Engine(Protocol):
    """Runs cells in any order."""

    def __call__(
        self, run: CellFunction, cells: Sequence[Cell], directory: str
    ) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """Each cell with its figures, or with ``status`` "failed" and an ``error``, as they come."""


def in_process(
    run: CellFunction, cells: Sequence[Cell], directory: str
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """One after the other, here."""
    for cell in cells:
        yield cell, attempt(run, cell, directory)


def in_processes(workers: int) -> Engine:
    """So many processes on this machine, each with one thread of torch; they share its GPU, if cells use one.

    Cells of different defences are begun first, so that workers make different things and do not wait for one
    another to train the same one.

    Args:
        workers: processes, at least 1.

    Raises:
        ValueError: fewer.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got workers={workers}")

    def engine(
        run: CellFunction, cells: Sequence[Cell], directory: str
    ) -> Iterator[tuple[Cell, dict[str, Any]]]:
        # Spawned: a GPU cannot be used in a forked process.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            running = {pool.submit(attempt, run, cell, directory): cell for cell in _spread(cells)}
            for ready in as_completed(running):
                try:
                    yield running[ready], ready.result()
                except BrokenProcessPool:
                    yield running[ready], {"status": "failed", "error": "a worker was lost"}

    return engine


def _spread(cells: Sequence[Cell]) -> list[Cell]:
    """The first cell of every defence and seed, then the second ones, and so on."""
    seen: Counter[tuple[int, str]] = Counter()
    turns = []
    for cell in cells:
        turns.append(seen[cell.seed, cell.row])
        seen[cell.seed, cell.row] += 1
    return [cells[place] for place in sorted(range(len(cells)), key=turns.__getitem__)]


def on_ray(address: str | None = None, workers: int | None = None) -> Engine:
    """Ray: a cluster, or workers on this machine.

    Args:
        address: of a running cluster ("auto" finds one on this machine). Its nodes must see the same
            directory. Default: start Ray here, and stop it at the end.
        workers: cells at once, when Ray is started here. Default: one a core.

    Raises (when first used):
        ImportError: Ray is not installed; the message says how to get it.
    """

    def engine(
        run: CellFunction, cells: Sequence[Cell], directory: str
    ) -> Iterator[tuple[Cell, dict[str, Any]]]:
        try:
            import ray
        except ImportError:
            raise ImportError('the Ray engine needs Ray: pip install "honeytrace[ray]"') from None
        count = workers or os.cpu_count() or 1
        if address is None:
            ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False, configure_logging=False)
        else:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        try:
            # One thread a worker: several with several threads each would fight over the cores.
            task = ray.remote(
                num_cpus=1, max_retries=MOST_RETRIES, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}
            )(attempt)
            running = {task.remote(run, cell, directory): cell for cell in cells}
            while running:
                (ready,), _ = ray.wait(list(running), num_returns=1)
                cell = running.pop(ready)
                try:
                    yield cell, ray.get(ready)
                except ray.exceptions.RayError as error:
                    yield cell, {"status": "failed", "error": f"the worker was lost: {type(error).__name__}"}
        finally:
            ray.shutdown()

    return engine


def attempt(run: CellFunction, cell: Cell, directory: str) -> dict[str, Any]:
    """The figures of a cell; an exception becomes its result, so that one cell does not stop the others."""
    try:
        return run(cell, directory)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(last.filename)}:{last.lineno}"
        return {"status": "failed", "error": f"{type(error).__name__} at {where}: {error}"}
