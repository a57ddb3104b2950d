"""The whole answer on a GPU: the fused op of our backends, and the chain of torch operators that it replaces.

    python bench/gpu_watermark.py [--quick] [--calls N] [--dtype D] [--without SIDE] [--output DIR]

Two kinds of queries: "far" from every trigger, as nearly all are, where the fused op may stop early; and
"near" ones, where it may not. Baselines: "torch": distance, similarity, hash and mixing by torch's operators;
"compiled": the same under torch.compile. watermark_mix alone is timed as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from on_gpu import HEADER, Cold, Row, arguments_of, compare, gpu_backends, write
from roofline import MIX_SIZES, WATERMARK_SIZES, mix, watermark
from torch import Tensor

from honeytrace import WatermarkRule, ops
from honeytrace.ops import registry

RULE = WatermarkRule(offset=0.9, scale=0.5, k=10, metric="l1", strength=0.2)
SEED = 7


def eager_mix(z: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """Mixing in probability space."""
    strongest, group = s.max(dim=1)
    w = RULE.strength * strongest**RULE.mixing_power
    taken = torch.logsumexp(z.float(), 1, keepdim=True) + torch.log_softmax(r[group], 1)
    mixed = torch.logaddexp(z.float() + torch.log1p(-w)[:, None], taken + torch.log(w)[:, None])
    return torch.where(strongest[:, None] > 0, mixed.to(z.dtype), z)


def chain(q: Tensor, z: Tensor, rows: Tensor, r: Tensor, planes: Tensor) -> Callable[[], Tensor]:
    weights = 2 ** torch.arange(63, device=q.device)

    def call() -> Tensor:
        features = q.float()
        distance = torch.cdist(features[None].expand(len(rows), -1, -1), rows, p=1.0)
        mean = distance.topk(RULE.k, dim=2, largest=False).values.mean(2).t() / rows.shape[2]
        s = ((RULE.offsets[0] - mean) / RULE.scales[0]).clamp(0, 1)
        bucket = ((features @ planes.t() >= 0)[:, :63] * weights).sum(1)
        return eager_mix(z, s, r) + 0 * bucket[:, None].to(z.dtype)

    return call


def fused(backend: str, *args: Tensor | ops.Bank) -> Callable[[], object]:
    def call() -> object:
        with registry.force(backend):
            return ops.watermark(*args, rule=RULE, seed=SEED)  # type: ignore[arg-type]

    return call


def mixed(backend: str, *args: Tensor) -> Callable[[], object]:
    def call() -> object:
        with registry.force(backend):
            return ops.watermark_mix(*args, rule=RULE, seed=SEED)

    return call


def watermark_rows(
    options: argparse.Namespace, cold: Cold, backends: list[str], dtype: torch.dtype
) -> list[Row]:
    generator = torch.Generator("cuda").manual_seed(0)
    rows: list[Row] = []
    for batch, groups, size, width, classes in WATERMARK_SIZES[2:4] if options.quick else WATERMARK_SIZES:

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda", generator=generator)

        b, planes = draw(groups, size, width), draw(64, width)
        z, r = draw(batch, classes), draw(groups, classes)
        queries = {"far": 3 * draw(batch, width), "near": b[0, :1] + 0.5 * draw(batch, width)}
        for kind, q in queries.items():
            q, z, bank = q.to(dtype), z.to(dtype), ops.Bank(b)
            sides: dict[str, Callable[[], object]] = {
                backend: fused(backend, q, z, bank, r, planes) for backend in backends
            }
            baseline = chain(q, z, b, r, planes)
            sides |= {"torch": baseline, "compiled": torch.compile(baseline)}
            case = f"{kind} B={batch} G={groups} M={size} D={width} C={classes}"
            rows += compare(case, sides, watermark("l1", batch, groups, size, width, classes), options, cold)
    return rows


def mix_rows(options: argparse.Namespace, cold: Cold, backends: list[str], dtype: torch.dtype) -> list[Row]:
    generator = torch.Generator("cuda").manual_seed(1)
    rows: list[Row] = []
    for batch, classes in MIX_SIZES[1:3] if options.quick else MIX_SIZES:
        z = torch.randn(batch, classes, device="cuda", generator=generator).to(dtype)
        s = torch.rand(batch, 8, device="cuda", generator=generator)
        r = torch.randn(8, classes, device="cuda", generator=generator)
        bucket = torch.arange(batch, device="cuda")
        sides: dict[str, Callable[[], object]] = {
            backend: mixed(backend, z, s, r, bucket) for backend in backends
        }

        def baseline(z: Tensor = z, s: Tensor = s, r: Tensor = r) -> Tensor:
            return eager_mix(z, s, r)

        sides |= {"torch": baseline, "compiled": torch.compile(baseline)}
        work = mix(batch, classes, str(dtype).removeprefix("torch."))
        rows += compare(f"mix B={batch} C={classes}", sides, work, options, cold)
    return rows


def main(command: list[str]) -> None:
    options = arguments_of((__doc__ or "").splitlines()[0], command)
    backends, cold, dtype = gpu_backends(), Cold(), getattr(torch, options.dtype)
    print(HEADER)
    rows = mix_rows(options, cold, backends, dtype)
    rows += watermark_rows(options, cold, backends, dtype)
    write("watermark", "gpu_watermark", rows, options)


if __name__ == "__main__":
    main(sys.argv[1:])
