"""What the time of an answer tells about the answer: bent or not, by the op alone and over HTTP.

    python bench/timing_of_answers.py [--queries 200] [--repeats 100] [--json FILE]

A model of the digits with its watermark; queries whose answers are bent and queries whose answers are not,
asked again and again in random order, each alone. Printed for the usual kernel and for constant_time:

    median      microseconds of a query: bent, not bent
    once        chance that a bent query takes longer than another, each asked once (0.5: nothing is told)
    repeated    the same for the median of all repeats of a query: what somebody learns who asks very often
    needed      queries of each kind, asked once, until their mean times differ by 3.3 standard errors of the
                difference (a test at 5% that finds it in 95 of 100 tries); - where the difference is not one
    share       of the variance of the times that bent or not explains

"repeated" tells single queries apart, "needed" whole heaps of them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import mannwhitneyu

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from timed import chance_longer, one_place, times_of

import honeytrace as ht
from honeytrace import data, models, training
from honeytrace.watermark.head import features_and_logits


def compare(times: np.ndarray, bent: np.ndarray) -> dict[str, float]:
    """times [queries, repeats] in seconds; bent [queries] bool."""
    # The machine's own hiccups, cut as anybody would who measures: above the 99th percentile.
    cut = np.minimum(times, np.quantile(times, 0.99))
    a, b = cut[bent].ravel(), cut[~bent].ravel()
    medians = np.median(times, axis=1)
    difference = abs(a.mean() - b.mean())
    error = np.sqrt(a.var() + b.var())
    total = np.concatenate([a, b])
    between = (len(a) * (a.mean() - total.mean()) ** 2 + len(b) * (b.mean() - total.mean()) ** 2) / len(total)
    return {
        "median_bent_us": float(np.median(a) * 1e6),
        "median_plain_us": float(np.median(b) * 1e6),
        "once": chance_longer(a, b),
        "repeated": chance_longer(medians[bent], medians[~bent]),
        "repeated_p": float(mannwhitneyu(medians[bent], medians[~bent]).pvalue),
        "needed": float((3.3 * error / difference) ** 2) if difference > 0 else float("inf"),
        "share": float(between / total.var()),
    }


def world() -> tuple[torch.nn.Module, ht.Watermark, torch.Tensor]:
    splits = data.digits()
    model = training.seeded(lambda: models.small_cnn(10, 1, 8), 1)
    training.fit(model, *splits.train, epochs=3, seed=1)
    watermark = ht.Watermark.calibrate(model, splits.train, key=ht.SecretKey(bytes(range(32))))
    return model.eval(), watermark, splits.test.inputs


def choose(model: torch.nn.Module, watermark: ht.Watermark, inputs: torch.Tensor, count: int) -> Any:
    """Inputs, features, logits and bent of at most `count` bent queries and as many others."""
    features, logits = features_and_logits(model, watermark.head, inputs)
    bent = watermark.mark(features, logits).similarity.amax(dim=1) > 0
    generator = torch.Generator().manual_seed(1)
    chosen = []
    for kind in (bent, ~bent):
        found = kind.nonzero()[:, 0]
        chosen.append(found[torch.randperm(len(found), generator=generator)[: min(count, int(bent.sum()))]])
    rows = torch.cat(chosen)
    return inputs[rows], features[rows], logits[rows], bent[rows].numpy()


def op_times(watermark: ht.Watermark, features: torch.Tensor, logits: torch.Tensor, bent: np.ndarray,
             repeats: int, constant_time: bool) -> np.ndarray:  # fmt: skip
    marker = ht.numpy.Marker._of(
        {name: t.numpy() for name, t in watermark._plain()[0].items()}, watermark._plain()[1]
    )
    place, put = one_place(features.numpy(), logits.numpy())

    def ask(query: int) -> object:
        return marker.mark(*place, constant_time=constant_time)

    for query in range(len(bent)):
        put(query)
        ask(query)
    return times_of(ask, len(bent), repeats, prepare=put)


def http_times(url: str, inputs: torch.Tensor, bent: np.ndarray, repeats: int) -> np.ndarray:
    bodies = [json.dumps({"inputs": inputs[i : i + 1].tolist()}).encode() for i in range(len(bent))]
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)

    def ask(query: int) -> None:
        connection.request("POST", "/classify", bodies[query], {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200

    for query in range(len(bent)):
        ask(query)
    return times_of(ask, len(bent), repeats)


def main() -> None:
    from served import serving

    from honeytrace.serving import Service

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--queries", type=int, default=200, help="of each kind")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, watermark, inputs = world()
    inputs, features, logits, bent = choose(model, watermark, inputs, given.queries)
    found: dict[str, Any] = {"queries": int(bent.sum()), "repeats": given.repeats}
    print(f"{bent.sum()} bent queries, {(~bent).sum()} others, {given.repeats} repeats")
    for constant_time in (False, True):
        mode = "constant_time" if constant_time else "usual"
        times = op_times(watermark, features, logits, bent, given.repeats, constant_time)
        found[f"op, {mode}"] = compare(times, bent)
        with serving(Service(model, watermark, constant_time=constant_time)) as url:
            found[f"HTTP, {mode}"] = compare(http_times(url, inputs, bent, given.repeats), bent)
    shuffled = bent[np.random.default_rng(0).permutation(len(bent))]
    found["op, constant_time, kinds drawn by lot"] = compare(times, shuffled)
    for name, values in found.items():
        if isinstance(values, dict):
            print(f"{name:40}", "  ".join(f"{k} {v:.4g}" for k, v in values.items()))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
