"""How much faster `watermark` and `watermark_mix` are than the same steps as torch operators, and what a
protected model costs over the bare one.

Baselines: `eager`: mixing as one would write it with torch's operators; `compiled`: its torch.compile, on
request; `published`: distances by broadcasting, sort and masks, as the published code orders its steps;
`exhaustive`: our own call with every distance computed in full; `faiss`: IndexFlat L1 of each group, the
distances alone, without mixing; `copy`: one read and one write of the logits into a new tensor, the floor of
mixing. `bare`: the model without its protection; there a lead is bare over protected, 1 where protection is
free.

    python bench/bench_watermark.py [--quick] [--threads N] [--compile]
        [--json FILE] [--markdown FILE] [--plot FILE]
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import harness
import torch
from harness import Report, Row
from real_features import RealFeatures, real_features
from torch import Tensor, nn

from honeytrace import _C, WatermarkRule, models, ops
from honeytrace.watermark.protected import AnswerHook, protect

try:
    import faiss
except ImportError:
    faiss = None

NAMES = ("eager", "compiled", "copy", "published", "exhaustive", "faiss", "bare")
SEED = 7


def published_chain(q: Tensor, z: Tensor, b: Tensor, r: Tensor, rule: WatermarkRule) -> Tensor:
    """One group, logit space, as the published code orders its steps; flips by the global generator."""
    distance = (q[:, None] - b[0][None]).abs().mean(-1).sort(dim=1).values[:, : rule.k].mean(1)
    s = (rule.offsets[0] - distance).clamp(0, 1)
    c = torch.softmax(z, 1).amax(1)
    s = torch.where(c < rule.low_confidence, s**rule.low_power, s)
    w = (s**rule.mixing_power)[:, None]
    mixed = (1 - w) * z + w * r
    flip = torch.rand(len(z)) < torch.floor(s**rule.flip_power * rule.flip_bins) / rule.flip_bins
    mixed[flip] = r
    return mixed


def eager_mix(z: Tensor, s: Tensor, r: Tensor, rule: WatermarkRule) -> Tensor:
    """Mixing in probability space by torch's operators; flips by the global generator."""
    strongest, group = s.max(dim=1)
    w = rule.strength * strongest.double() ** rule.mixing_power
    keep, take = torch.log1p(-w).float()[:, None], torch.log(w).float()[:, None]
    target = r[group]
    taken = torch.logsumexp(z, 1, keepdim=True) + take + torch.log_softmax(target, 1)
    mixed = torch.logaddexp(z + keep, taken)
    flip = torch.rand(len(z)) < torch.floor(strongest**rule.flip_power * rule.flip_bins) / rule.flip_bins
    mixed = torch.where(flip[:, None], target, mixed)
    return torch.where(strongest[:, None] > 0, mixed, z)


def threads_text() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def mix_cases(report: Report, options: Any) -> None:
    rule = WatermarkRule(flip_bins=10)
    batches, classes = ((1, 256), (100,)) if options.quick else ((1, 32, 256, 4096), (10, 100, 1000))
    for batch in batches:
        for count in classes:
            for bent in (1.0, 0.02):  # every row, and what traffic is like
                z, r = 3 * torch.randn(batch, count), torch.randn(4, count)
                s = torch.rand(batch, 4) * (torch.rand(batch, 1) < bent)
                args = z, s, r, torch.arange(batch)

                def ours(args: tuple[Tensor, ...] = args) -> Any:
                    return ops.watermark_mix(*args, rule=rule, seed=SEED)

                def eager(z: Tensor = z, s: Tensor = s, r: Tensor = r) -> Tensor:
                    return eager_mix(z, s, r, rule)

                functions: dict[str, Callable[[], Any]] = {"honeytrace": ours, "eager": eager}
                if options.compile and (batch, count) == (256, 100):
                    functions["compiled"] = torch.compile(eager)
                functions["copy"] = z.clone
                size = {"B": batch, "C": count, "G": 4}
                settings = {"bent": bent, "dtype": "float32", "threads": torch.get_num_threads()}
                text = f"({batch}, {count}), {bent:.0%} of rows bent, {threads_text()}"
                seconds = harness.in_turn(functions)
                extra = harness.peak_extra_bytes(ours)
                work = 8.0 * z.numel()
                report.add(Row("watermark_mix", text, size, settings, seconds, work, extra, "bytes"))


def fused_case(
    report: Report,
    name: str,
    q: Tensor,
    z: Tensor,
    b: Tensor,
    r: Tensor,
    planes: Tensor,
    rule: WatermarkRule,
) -> None:
    bank = ops.Bank(b)

    def ours() -> Any:
        return ops.watermark(q, z, bank, r, planes, rule=rule, seed=SEED)

    def exhaustive() -> Any:
        _C._set_exhaustive(True)
        output = ours()
        _C._set_exhaustive(False)
        return output

    functions: dict[str, Callable[[], Any]] = {"honeytrace": ours, "exhaustive": exhaustive}
    if bank.groups == 1 and rule.space == "logits" and q.dtype == torch.float32:
        functions["published"] = lambda: published_chain(q, z, b, r, rule)
    if faiss is not None and rule.metric == "l1":
        indices, queries = [], q.float().numpy()
        for rows in bank.rows:
            indices.append(faiss.IndexFlat(bank.features, faiss.METRIC_L1))
            indices[-1].add(rows.numpy())
        functions["faiss"] = lambda: [index.search(queries, rule.k) for index in indices]
    before = _C._bounded_counts()
    ours()
    free, bounds, finished = (b - a for a, b in zip(before, _C._bounded_counts(), strict=True))
    proven = (free + bounds) / max(1, free + bounds + finished)
    dtype = str(q.dtype).removeprefix("torch.")
    size = {"B": len(q), "M": bank.size, "D": bank.features, "G": bank.groups, "C": z.shape[1]}
    settings = {"data": name, "dtype": dtype, "proven": proven, "threads": torch.get_num_threads()}
    shape = f"({len(q)}, {bank.groups} x {bank.size}, {bank.features})"
    text = f"{shape} {dtype} {name}, {proven:.0%} proven, {threads_text()}"
    seconds = harness.in_turn(functions)
    work = float(len(q) * b.numel())
    report.add(Row("watermark", text, size, settings, seconds, work, harness.peak_extra_bytes(ours)))


def fused_cases(report: Report, options: Any, real: RealFeatures) -> None:
    published = WatermarkRule.neurht("cifar10")
    for batch in (1, 32, 256):
        q, z = torch.randn(batch, 512), 3 * torch.randn(batch, 10)
        b, r, planes = torch.randn(1, 500, 512), torch.randn(1, 10), torch.randn(64, 512)
        for dtype in (torch.float32, torch.bfloat16):
            # Distances lie around 1.05: an offset in their midst defeats every bound.
            rule = dataclasses.replace(published, offset=1.05)
            fused_case(report, "random", q.to(dtype), z.to(dtype), b, r, planes, rule)
        of_real = real.features[:batch], real.logits[:batch]
        fused_case(report, "calibrated", *of_real, real.rows, real.target_logits, real.planes, real.rule)
        distance = ops.feature_distance(real.features, real.composites)
        offset = float(torch.quantile(distance, 0.0017))
        rule = dataclasses.replace(published, offset=offset)
        target, normals = real.target_logits[:1], real.planes[:1].repeat(64, 1)
        fused_case(report, "composites", *of_real, real.composites, target, normals, rule)


def model_cases(report: Report, options: Any) -> None:
    made: dict[str, tuple[nn.Module, int, int]] = {
        "small CNN": (models.small_cnn(10, 1, 28), 1, 28),
        "ResNet-18": (models.resnet(10, 3, depth=18), 3, 32),
        "VGG16-BN": (models.vgg(10, 3, 32, depth=16), 3, 32),
    }
    for name, (model, channels, side) in made.items():
        model.eval()
        heads = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        width = model.get_submodule(heads[-1]).in_features
        bank, r = ops.Bank(torch.rand(16, 32, int(width))), torch.randn(16, 10)  # sizes as calibration makes
        rule = WatermarkRule(offset=0.2, k=5)
        hook = AnswerHook(bank, r, torch.randn(16, int(width)), rule, SEED, "logits")
        served = protect(model, heads[-1], hook, int(width), 10)
        for batch in (1, 32) if options.quick or name != "small CNN" else (1, 32, 256):
            x = torch.rand(batch, channels, side, side)
            functions = {"protected": functools.partial(served, x), "bare": functools.partial(model, x)}
            with torch.no_grad():
                seconds = harness.in_turn(functions)
            settings = {"model": name, "dtype": "float32", "threads": torch.get_num_threads()}
            report.add(
                Row("protected model", f"{name}, batch {batch}, {threads_text()}", {"B": batch}, settings,
                    seconds, float(batch), unit="images")
            )  # fmt: skip


def main(arguments: list[str]) -> None:
    options = harness.parser(__doc__).parse_args(arguments)
    torch.manual_seed(0)
    report = Report("watermark and watermark_mix on the CPU", NAMES, "G/s", options)
    if faiss is None:
        report.note("faiss is not installed (pip install 'honeytrace[bench]'): left out")
    real = real_features(options.data)
    for threads in harness.thread_counts(options):
        harness.use_threads(threads)
        mix_cases(report, options)
        fused_cases(report, options, real)
    harness.use_threads(1)
    model_cases(report, options)
    report.write()


if __name__ == "__main__":
    main(sys.argv[1:])
