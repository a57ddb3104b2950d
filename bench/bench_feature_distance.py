"""How much faster `feature_distance` is than torch's own operators and than FAISS.

All sides are timed in turn (A B A B ...) in one process; a figure is the ratio of medians, with the 20th to
80th percentile of the rounds' ratios beside it. Baselines: `torch`: torch.cdist and topk for l1 and lp, the
matrix product and topk for l2 and cosine (torch's fastest chain, though it cancels for near rows); `faiss`:
IndexFlat of the same metric, where faiss-cpu is installed.

    python bench/bench_feature_distance.py [--threads N] [--dtype D] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_watermark import compare
from torch import Tensor

from honeytrace import ops
from honeytrace.doctor import doctor

try:
    import faiss
except ImportError:
    faiss = None

K = 10
QUICK = [(1, 500, 512), (256, 500, 512)]
SIZES = [*QUICK, (32, 500, 512), (256, 2000, 1024), (1024, 500, 2048), (64, 20000, 512)]
METRICS: list[tuple[str, float | None]] = [
    ("l1", None),
    ("l2", None),
    ("cosine", None),
    ("lp", 3.0),
    ("lp", 1.5),
]
SLOW_PAIRS = 2**28  # features to be compared beyond which cdist(p = 3) takes seconds: left out


def torch_chain(features: Tensor, rows: Tensor, metric: str, p: float | None) -> Callable[[], Tensor]:
    """Mean of the k smallest by torch's operators; what depends on the bank alone is done before."""
    q, width = features, rows.shape[1]
    if metric == "l2":
        squares, transposed = rows.square().sum(1), rows.t()

        def l2() -> Tensor:
            square = (
                torch.addmm(squares, q.float(), transposed, alpha=-2) + q.float().square().sum(1)[:, None]
            )
            return (square.clamp_min(0).topk(K, largest=False).values / width).sqrt().mean(1)

        return l2
    if metric == "cosine":
        unit = torch.nn.functional.normalize(rows).t()
        return lambda: 1 - (torch.nn.functional.normalize(q.float()) @ unit).topk(K).values.mean(1)
    power = 1.0 if metric == "l1" else float(p or 1)
    factor = width ** (-1 / power)
    return lambda: torch.cdist(q.float(), rows, p=power).topk(K, largest=False).values.mean(1) * factor


def faiss_search(features: Tensor, rows: Tensor, metric: str, p: float | None) -> Callable[[], Any] | None:
    if faiss is None:
        return None
    kinds = {"l1": faiss.METRIC_L1, "l2": faiss.METRIC_L2, "lp": faiss.METRIC_Lp}
    kinds["cosine"] = faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexFlat(rows.shape[1], kinds[metric])
    if p is not None:
        index.metric_arg = p
    index.add((torch.nn.functional.normalize(rows) if metric == "cosine" else rows).numpy())
    queries = features.float().numpy()
    return lambda: index.search(queries, K)


def row(
    batch: int, size: int, width: int, metric: str, p: float | None, dtype: torch.dtype
) -> dict[str, Any]:
    features, rows = torch.randn(batch, width).to(dtype), torch.randn(size, width)
    bank = ops.Bank(rows)
    baselines: dict[str, Callable[[], Any]] = {}
    if metric != "lp" or batch * size * width < SLOW_PAIRS:
        baselines["torch"] = torch_chain(features, rows, metric, p)
        search = faiss_search(features, rows, metric, p)
        if search is not None:
            baselines["faiss"] = search
    name = f"{metric}{'' if p is None else f' p={p}'} B={batch} M={size} D={width}"
    found = compare(name, lambda: ops.feature_distance(features, bank, k=K, metric=metric, p=p), baselines)
    found["gelem_per_second"] = batch * size * width / found["microseconds"] / 1e3
    print(f"{'':44s} {found['gelem_per_second']:10.1f} G features/s")
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--quick", action="store_true", help="two sizes only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if faiss is None:
        print("faiss: not installed (pip install 'honeytrace[bench]'), left out")
    else:
        faiss.omp_set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    rows = [
        row(*size, metric, p, dtype) for size in (QUICK if options.quick else SIZES) for metric, p in METRICS
    ]
    if options.json:
        machine = {"doctor": doctor(), "threads": options.threads, "dtype": options.dtype}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1, default=str))


if __name__ == "__main__":
    main(sys.argv[1:])
