"""The matrix: every defence against every attack and removal, on one table.

`Plan` says what is run, `evaluate` runs what is missing of it, `write_report` writes tables, plots and page.
"""

from honeytrace.evaluation.cells import run_cell
from honeytrace.evaluation.engines import Engine, in_process, in_processes, on_ray
from honeytrace.evaluation.plan import BUILT_IN, Cell, Plan
from honeytrace.evaluation.report import write_report
from honeytrace.evaluation.run import evaluate
from honeytrace.evaluation.store import Store

__all__ = [
    "BUILT_IN",
    "Cell",
    "Engine",
    "Plan",
    "Store",
    "evaluate",
    "in_process",
    "in_processes",
    "on_ray",
    "run_cell",
    "write_report",
]
