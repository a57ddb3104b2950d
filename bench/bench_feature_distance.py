"""How much faster `feature_distance` is than torch, FAISS and NumKong, on random and on real features.

Baselines: `broadcast`: differences in memory, sum and topk, as the published code does it; `torch`:
torch.cdist and topk for l1 and lp, the matrix product and topk for l2 and cosine (torch's fastest way,
though it cancels for near rows); `compiled`: torch.compile of `broadcast`, on request; `faiss`: IndexFlat of
the same metric, for cosine on queries that are normalised in the call; `numkong`: its cdist and topk, for l2
and cosine. FAISS and NumKong are left out by name where they are not installed. `ceiling`: our inner loop on
operands in the first-level cache, as long as it would take for the same work on all threads.

    python bench/bench_feature_distance.py [--quick] [--threads N] [--compile]
        [--json FILE] [--markdown FILE] [--plot FILE]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from harness import Report, Row
from torch import Tensor

from honeytrace import _C, ops
from honeytrace.rule import METRICS as CODES

try:
    import faiss
except ImportError:
    faiss = None
try:
    import numkong
except ImportError:
    numkong = None

K = 10
QUICK = [(1, 500, 512), (32, 500, 512), (256, 500, 512)]
SIZES = [*QUICK, (256, 2000, 1024), (1024, 500, 2048), (64, 20000, 512)]
METRICS: list[tuple[str, float | None]] = [
    ("l1", None),
    ("l2", None),
    ("cosine", None),
    ("lp", 3.0),
    ("lp", 1.5),
]
SLOW_PAIRS = 2**28  # features of pairs beyond which cdist(p = 3) takes seconds: left out
LARGEST_BROADCAST = 2**28  # elements in memory
NAMES = ("broadcast", "torch", "compiled", "faiss", "numkong", "ceiling")


def broadcast_chain(q: Tensor, b: Tensor, metric: str, p: float | None) -> Callable[[], Tensor]:
    """The formula as it stands, every difference in memory."""
    power = {"l1": 1.0, "l2": 2.0}.get(metric, p)

    def chain(q: Tensor = q, b: Tensor = b) -> Tensor:
        q = q.float()
        if metric == "cosine":
            q, rows = torch.nn.functional.normalize(q), torch.nn.functional.normalize(b)
            pairs = 0.5 * (q[:, None] - rows).square().sum(-1)
        else:
            pairs = (q[:, None] - b).abs().pow(power).mean(-1).pow(1 / power)
        return pairs.topk(K, largest=False).values.mean(1)

    return chain


def torch_chain(q: Tensor, b: Tensor, metric: str, p: float | None) -> Callable[[], Tensor]:
    """Mean of the k smallest by torch's operators; what depends on the bank alone is done before."""
    width = b.shape[1]
    if metric == "l2":
        squares, transposed = b.square().sum(1), b.t()

        def l2() -> Tensor:
            wide = q.float()
            square = torch.addmm(squares, wide, transposed, alpha=-2) + wide.square().sum(1)[:, None]
            return (square.clamp_min(0).topk(K, largest=False).values / width).sqrt().mean(1)

        return l2
    if metric == "cosine":
        unit = torch.nn.functional.normalize(b).t()
        return lambda: 1 - (torch.nn.functional.normalize(q.float()) @ unit).topk(K).values.mean(1)
    power = 1.0 if metric == "l1" else float(p or 1)
    factor = width ** (-1 / power)
    return lambda: torch.cdist(q.float(), b, p=power).topk(K, largest=False).values.mean(1) * factor


def faiss_search(q: Tensor, b: Tensor, metric: str, p: float | None) -> Callable[[], Any]:
    kinds = {"l1": faiss.METRIC_L1, "l2": faiss.METRIC_L2, "lp": faiss.METRIC_Lp}
    kinds["cosine"] = faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexFlat(b.shape[1], kinds[metric])
    if p is not None:
        index.metric_arg = p
    index.add((torch.nn.functional.normalize(b) if metric == "cosine" else b).numpy())
    if metric == "cosine":
        # Ours takes the queries as they are: normalising them belongs to the work.
        return lambda: index.search(torch.nn.functional.normalize(q.float()).numpy(), K)
    queries = q.float().numpy()
    return lambda: index.search(queries, K)


def numkong_chain(q: Tensor, b: Tensor, metric: str) -> Callable[[], Tensor]:
    queries, rows, name = q.float().numpy(), b.numpy(), "euclidean" if metric == "l2" else "angular"

    def chain() -> Tensor:
        pairs = torch.from_dlpack(numkong.cdist(queries, rows, metric=name))
        return pairs.topk(K, largest=False).values.mean(1)

    return chain


def ceiling_speed(metric: str, p: float | None) -> float:
    """Features of pairs a second on one thread with everything in the first-level cache."""
    code, found = CODES.index(metric), []
    for _ in range(5):
        start = time.process_time()
        done = _C._ceiling(code, p or 1.0, 4000, _C._preselection_pays(code))
        found.append(done / (time.process_time() - start))
    return max(found)


def baselines(
    q: Tensor, b: Tensor, metric: str, p: float | None, compiled: bool
) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    work = len(q) * b.numel()
    chain = broadcast_chain(q, b, metric, p)
    if work <= LARGEST_BROADCAST:
        found["broadcast"] = chain
    if metric != "lp" or work <= SLOW_PAIRS:
        found["torch"] = torch_chain(q, b, metric, p)
        if faiss is not None:
            found["faiss"] = faiss_search(q, b, metric, p)
    if compiled:
        fused = torch.compile(chain)
        found["compiled"] = lambda: fused(q, b)
    if numkong is not None and metric in ("l2", "cosine"):
        found["numkong"] = numkong_chain(q, b, metric)
    return found


def case(
    report: Report,
    name: str,
    q: Tensor,
    b: Tensor,
    metric: str,
    p: float | None,
    *,
    compiled: bool = False,
) -> Row:
    bank = ops.Bank(b)

    def ours() -> Tensor:
        return ops.feature_distance(q, bank, k=K, metric=metric, p=p)

    seconds = harness.in_turn({"honeytrace": ours, **baselines(q, b, metric, p, compiled)})
    work = float(len(q) * b.numel())
    threads = torch.get_num_threads()
    seconds["ceiling"] = [work / ceiling_speed(metric, p) / threads] * harness.ROUNDS
    label = metric if p is None else f"{metric} p={p:g}"
    dtype = str(q.dtype).removeprefix("torch.")
    shape = f"({len(q)}, {b.shape[0]}, {b.shape[1]})"
    return report.add(
        Row(
            label,
            f"{shape} {dtype} {name}, {threads} thread{'s' * (threads > 1)}",
            {"B": len(q), "M": b.shape[0], "D": b.shape[1], "G": 1, "k": K},
            {"metric": metric, "p": p, "dtype": dtype, "data": name, "threads": threads},
            seconds,
            work,
            harness.peak_extra_bytes(ours),
        )
    )


def random_cases(report: Report, options: Any) -> None:
    sizes = QUICK if options.quick else SIZES
    for threads in harness.thread_counts(options):
        harness.use_threads(threads)
        for size in sizes:
            for metric, p in METRICS:
                q, b = torch.randn(size[0], size[2]), torch.randn(size[1], size[2])
                compiled = options.compile and size == QUICK[-1] and threads == 1
                case(report, "random", q, b, metric, p, compiled=compiled)
                if threads == 1 and size in QUICK[1:]:
                    case(report, "random", q.bfloat16(), b, metric, p)


def real_cases(report: Report, options: Any) -> None:
    from real_features import real_features

    harness.use_threads(1)
    real = real_features(options.data)
    for batch in (1, 32, 256):
        for metric, p in METRICS[:3]:
            case(report, f"real ({options.data})", real.features[:batch], real.composites[0], metric, p)


def scaling(report: Report) -> None:
    """Exponents of time against each size, the others fixed, one thread, l1; and the gain of all threads."""
    harness.use_threads(1)
    base = {"B": 128, "M": 512, "D": 512, "G": 1}
    for letter, values in {"B": (32, 64, 128, 256), "M": (256, 512, 1024, 2048), "D": (128, 256, 512, 1024),
                           "G": (1, 2, 4, 8)}.items():  # fmt: skip
        seconds = []
        for value in values:
            size = base | {letter: value}
            q, bank = (
                torch.randn(size["B"], size["D"]),
                ops.Bank(torch.randn(size["G"], size["M"], size["D"])),
            )
            run = {"ours": lambda q=q, bank=bank: ops.feature_distance(q, bank, k=K)}
            seconds.append(min(harness.in_turn(run)["ours"]))
        report.note(f"time against {letter} in {values}: exponent {harness.exponent(values, seconds):.2f}")
    gains = {}
    for batch in (64, 256, 1024):
        q, bank = torch.randn(batch, 512), ops.Bank(torch.randn(500, 512))
        run = {"ours": lambda q=q, bank=bank: ops.feature_distance(q, bank, k=K)}
        times = {}
        for threads in (1, harness.thread_counts(report.options)[-1]):
            harness.use_threads(threads)
            start = time.perf_counter
            best = []
            for _ in range(15):
                begin = start()
                run["ours"]()
                best.append(start() - begin)
            times[threads] = min(best)
        gains[batch] = times[1] / min(times.values())
    told = ", ".join(f"B={batch}: {gain:.2f}" for batch, gain in gains.items())
    report.note(f"all threads against one, best of 15 by the clock: {told}")


def main(arguments: list[str]) -> None:
    options = harness.parser(__doc__).parse_args(arguments)
    torch.manual_seed(0)
    report = Report("feature_distance on the CPU", NAMES, "G/s", options)
    for name, module in (("faiss", faiss), ("numkong", numkong)):
        if module is None:
            report.note(f"{name} is not installed (pip install 'honeytrace[bench]'): left out")
        else:
            report.note(f"{name} {getattr(module, '__version__', '')}")
    random_cases(report, options)
    if not options.quick:
        real_cases(report, options)
        scaling(report)
    report.write()


if __name__ == "__main__":
    main(sys.argv[1:])
