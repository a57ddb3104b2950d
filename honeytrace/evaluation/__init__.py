"""The matrix: every defence against every attack and removal, on one table.

`Plan` says what is run, `evaluate` runs what is missing of it, `write_report` writes tables, plots and page.
"""

from honeytrace.evaluation.engines import in_process, on_ray
from honeytrace.evaluation.plan import BUILT_IN, Cell, Plan
from honeytrace.evaluation.report import write_report
from honeytrace.evaluation.run import evaluate
from honeytrace.evaluation.store import Store

__all__ = ["BUILT_IN", "Cell", "Plan", "Store", "evaluate", "in_process", "on_ray", "write_report"]
