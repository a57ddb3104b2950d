"""The nearest rows of a bank, and not only their mean distance."""

import torch
from torch import Tensor

from honeytrace.ops import Bank
from honeytrace.ops.feature_distance import check_queries, op
from honeytrace.ops.library import call
from honeytrace.rule import check_metric


def nearest_rows(queries: Tensor, bank: Bank, *, k: int) -> tuple[Tensor, Tensor]:
    """The k rows nearest to each query: Euclidean distances float32 [B, k], and rows int64 [B, k].

    The kernel of ``honeytrace.ops.feature_distance`` finds them: the table of distances [B, M] is never in
    memory.

    Args:
        queries: float32 [B, D]. bank: of one group, [1, M, D]. k: 1 to M.
    """
    metric, exponent = check_metric("l2", None)
    check_queries(queries, bank.rows, k)
    rows = call(op, False, queries, bank.rows, bank.packed, bank.norms, k, metric, exponent)[1][:, 0].long()
    return torch.linalg.vector_norm(bank.rows[0][rows] - queries[:, None], dim=2), rows
