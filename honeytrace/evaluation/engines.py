"""Where cells are run: here, in several processes, or on Ray. All call one function and give results as they
come."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from queue import Queue
from threading import Lock
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

    Cells of one defence and seed share work (the defended model, its answers, first trainings), so a process
    stays with them as long as there are any, and then turns to those where the fewest are at work.

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
        desk, done = _Desk(cells), Queue[tuple[Cell, dict[str, Any]] | BaseException]()

        def serve() -> None:
            try:
                with _Process() as process:
                    for cell in desk.cells():
                        done.put((cell, process.attempt(run, cell, directory)))
            except BaseException as error:
                done.put(error)

        with ThreadPoolExecutor(workers) as threads:
            for _ in range(min(workers, len(cells))):
                threads.submit(serve)
            try:
                for _ in cells:
                    found = done.get()
                    if isinstance(found, BaseException):
                        raise found
                    yield found
            finally:
                desk.close()

    return engine


class _Process:
    """A process that runs cells, started again when it dies."""

    def __enter__(self) -> _Process:
        self._pool = self._started()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()

    @staticmethod
    def _started() -> ProcessPoolExecutor:
        # Spawned: a GPU cannot be used in a forked process.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(1,))

    def attempt(self, run: CellFunction, cell: Cell, directory: str) -> dict[str, Any]:
        for _ in range(1 + MOST_RETRIES):
            try:
                return self._pool.submit(attempt, run, cell, directory).result()
            except BrokenProcessPool:
                self._pool.shutdown()
                self._pool = self._started()
        return {"status": "failed", "error": "the worker was lost"}


class _Desk:
    """Hands out cells, those of one defence and seed to the same server where that is possible."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._lock = Lock()
        self._left: dict[tuple[int, str], deque[Cell]] = {}
        for cell in cells:
            self._left.setdefault((cell.seed, cell.row), deque()).append(cell)
        self._servers = dict.fromkeys(self._left, 0)

    def cells(self) -> Iterator[Cell]:
        """The cells of one server, which asks for the next when it is done with one."""
        group = None
        while True:
            with self._lock:
                if group is None or not self._left[group]:
                    if group is not None:
                        self._servers[group] -= 1
                    group = max(
                        (name for name, cells in self._left.items() if cells),
                        key=lambda name: (-self._servers[name], len(self._left[name])),
                        default=None,
                    )
                    if group is None:
                        return
                    self._servers[group] += 1
                    helps = self._servers[group] > 1
                # Whoever helps begins at the other end, far from what the first server shares.
                cell = self._left[group].pop() if helps else self._left[group].popleft()
            yield cell

    def close(self) -> None:
        """Nothing more is handed out."""
        with self._lock:
            for cells in self._left.values():
                cells.clear()


def on_ray(address: str | None = None, workers: int | None = None, *, gpu_share: float = 0.0) -> Engine:
    """Ray: a cluster, or workers on this machine.

    Args:
        address: of a running cluster ("auto" finds one on this machine). Its nodes must see the same
            directory. Default: start Ray here, and stop it at the end.
        workers: cells at once, when Ray is started here. Default: one a core.
        gpu_share: what a cell takes of a GPU, in [0, 1]: Ray runs so many on each as add up to 1, and shows
            a cell no other GPU. Default 0: Ray shows it none.

    Raises:
        ValueError: `gpu_share` is out of range. When first used: there is no GPU in Ray to take it of.
        ImportError: when first used: Ray is not installed; the message says how to get it.
    """
    if not 0 <= gpu_share <= 1:
        raise ValueError(f"gpu_share must be from 0 to 1, got gpu_share={gpu_share}")

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
            there = ray.cluster_resources()  # type: ignore[no-untyped-call]
            if gpu_share and not there.get("GPU", 0):  # Ray would wait for one for ever
                raise ValueError(f"gpu_share={gpu_share} of a GPU for each cell, but Ray knows of no GPU")
            # One thread a worker: several with several threads each would fight over the cores. Workers stay,
            # with what cells share; Ray would end one that has a GPU after each cell.
            task = ray.remote(
                num_cpus=1,
                num_gpus=gpu_share,
                max_calls=0,
                max_retries=MOST_RETRIES,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
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
