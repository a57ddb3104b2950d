"""`feature_distance` on a GPU: our backends, torch's operators, and torch.compile on them.

    python bench/gpu_feature_distance.py [--quick] [--calls N] [--dtype D] [--without SIDE] [--output DIR]

Baselines: "torch": torch.cdist and topk for l1, l2 and lp, a matrix product and topk for cosine; "compiled":
the same under torch.compile. (cdist by matrix product and the cosine product cancel for near rows; ours do
not.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from on_gpu import HEADER, Cold, Row, arguments_of, compare, gpu_backends, write
from roofline import DISTANCE_SIZES, K, distance
from torch import Tensor

from honeytrace import ops
from honeytrace.ops import registry

METRICS: list[tuple[str, str, float | None]] = [  # roofline's name, metric, p
    ("l1", "l1", None),
    ("l2", "l2", None),
    ("cosine", "cosine", None),
    ("lp 3", "lp", 3.0),
    ("lp 1.5", "lp", 1.5),
]
LARGEST = 2**34  # features to be compared beyond which torch's chain of an lp takes seconds


def chain(features: Tensor, rows: Tensor, metric: str, p: float | None) -> Callable[[], Tensor]:
    """Mean of the k smallest of each group, by torch's operators."""
    width = rows.shape[2]
    if metric == "cosine":
        unit = torch.nn.functional.normalize(rows, dim=2)

        def cosine() -> Tensor:
            product = torch.nn.functional.normalize(features.float()) @ unit.transpose(1, 2)
            return (1 - product.topk(K, dim=2).values.mean(2)).t()

        return cosine
    power = {"l1": 1.0, "l2": 2.0}.get(metric, float(p or 1))
    factor = width ** (-1 / power)

    def lp() -> Tensor:
        found = torch.cdist(features.float()[None].expand(len(rows), -1, -1), rows, p=power)
        return found.topk(K, dim=2, largest=False).values.mean(2).t() * factor

    return lp


def ours(backend: str, features: Tensor, bank: ops.Bank, metric: str, p: float | None) -> Callable[[], Any]:
    def call() -> Tensor:
        with registry.force(backend):
            return ops.feature_distance(features, bank, k=K, metric=metric, p=p)

    return call


def main(command: list[str]) -> None:
    options = arguments_of((__doc__ or "").splitlines()[0], command)
    generator = torch.Generator("cuda").manual_seed(0)
    backends, cold = gpu_backends(), Cold()
    print(HEADER)
    rows: list[Row] = []
    for batch, groups, size, width in DISTANCE_SIZES[3:5] if options.quick else DISTANCE_SIZES:
        features = torch.randn(batch, width, device="cuda", generator=generator)
        features = features.to(getattr(torch, options.dtype))
        bank = ops.Bank(torch.randn(groups, size, width, device="cuda", generator=generator))
        for name, metric, p in METRICS:
            sides = {backend: ours(backend, features, bank, metric, p) for backend in backends}
            if metric != "lp" or batch * groups * size * width < LARGEST:
                baseline = chain(features, bank.rows, metric, p)
                sides |= {"torch": baseline, "compiled": torch.compile(baseline)}
            case = f"{name} B={batch} G={groups} M={size} D={width}"
            work = distance(name, batch, groups, size, width)
            rows += compare(case, sides, work, options, cold)
    write("feature_distance", "gpu_feature_distance", rows, options)


if __name__ == "__main__":
    main(sys.argv[1:])
