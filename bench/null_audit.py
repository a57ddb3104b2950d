"""The null audit: what the tests say about models that never saw the protected answers.

    python bench/null_audit.py --data digits --models 20 --copies 5 --keys 100 --directory audit

Independent models (seed, half of the data, architecture) and copies of the *unprotected* victim are asked
once about all triggers and all roads; then targets are drawn again by as many public values as wanted, which
costs no question. Written to the directory: audit.json and audit.md (false claims at 1e-1, 1e-2, 1e-3 with
binomial intervals, Kolmogorov-Smirnov against uniform), p_values.png where matplotlib is there; and the
models, so that a killed run goes on where it stopped.

`exact` is the fixed-sample test over all groups, `verify` what `verify` does: sequential, each mark at its
share of alpha. The t-test of the literature stands beside them, on the same answers: two-sample, over the
triggers, the suspect's against the reference's probability of the target.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binom, kstest
from torch import Tensor, nn

from honeytrace import data, models, training
from honeytrace.cache import ModelCache, digest
from honeytrace.ownership import DEFAULT_CALIBRATOR, exact_p_value, score_probabilities, t_test
from honeytrace.ownership.answers import top_labels
from honeytrace.ownership.ladder import SCORE_NOISE as RUNG_NOISE
from honeytrace.ownership.ladder import climb
from honeytrace.ownership.scores import SCORE_NOISE
from honeytrace.ownership.sequential import run
from honeytrace.watermark import SecretKey, Watermark, calibrate

LEVELS = (1e-1, 1e-2, 1e-3)
SIDE = {"digits": 8, "fashion": 28}
EPOCHS = {"digits": 5, "fashion": 4}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=sorted(SIDE), default="digits")
    parser.add_argument("--models", type=int, default=20, help="independent models")
    parser.add_argument("--copies", type=int, default=5, help="copies of the unprotected victim")
    parser.add_argument("--keys", type=int, default=100, help="draws of the targets for each model")
    parser.add_argument("--directory", type=Path, default=Path("audit"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    found = audit(
        arguments.data, arguments.models, arguments.copies, arguments.keys, arguments.directory, print
    )
    (arguments.directory / "audit.json").write_text(json.dumps(found["figures"], indent=2) + "\n")
    page = table(found["figures"])
    (arguments.directory / "audit.md").write_text(page)
    print(page)
    draw(found["p_values"], arguments.directory / "p_values.png")


def audit(
    name: str, independent: int, copies: int, keys: int, directory: Path, say: Callable[[str], object]
) -> dict[str, Any]:
    """Figures, and the p-values behind them by test: [models, keys]."""
    splits = data.digits() if name == "digits" else data.fashion_mnist()
    side, epochs, cache = SIDE[name], EPOCHS[name], ModelCache(directory / "models")
    factories = [
        lambda: models.small_cnn(10, 1, side),
        lambda: models.tiny_cnn(10, 1, side),
        lambda: models.small_cnn(10, 1, side, width=16),
    ]
    known = digest(splits.train.inputs[:64], splits.pool.inputs[:64])

    def trained(
        what: str, number: int, factory: Callable[[], nn.Module], train: Callable[[nn.Module], None]
    ) -> nn.Module:
        def make() -> nn.Module:
            model = training.seeded(factory, number)
            train(model)
            return model

        settings = {"data": known, "number": number, "epochs": epochs}
        return cache.model(f"{name}-{what}", lambda: training.seeded(factory, number), settings, make)

    def fitted(inputs: Tensor, targets: Tensor, seed: int) -> Callable[[nn.Module], None]:
        def train(model: nn.Module) -> None:
            training.fit(model, inputs, targets, epochs=epochs, seed=seed)

        return train

    victim = trained("victim", 1, factories[0], fitted(*splits.train, 1))
    say("victim")
    answers = training.predict(victim, splits.pool.inputs).softmax(1)
    owners = training.predict(victim, splits.train.inputs).softmax(1)
    reference = trained("reference", 2, factories[1], fitted(splits.train.inputs, owners, 2))
    file = directory / f"{name}.honeytrace"
    key = SecretKey(bytes(range(32)))
    if file.is_file():
        watermark = Watermark.load(file)
    else:
        watermark = calibrate(
            victim,
            splits.train,
            key=key,
            max_accuracy_drop=0.01,
            trigger_data=splits.test,
            reference=reference,
        )
        watermark.save(file)
    say("watermark")
    suspects: list[tuple[str, nn.Module]] = []
    for n in range(independent):
        # Half of the owner's own data or half of other data: both are innocent.
        part = splits.train if n % 2 else splits.pool
        half = torch.randperm(len(part.inputs), generator=torch.Generator().manual_seed(n))[
            : len(part.inputs) // 2
        ]
        train = fitted(part.inputs[half], part.labels[half], 100 + n)
        suspects.append((f"independent {n}", trained("independent", 100 + n, factories[n % 3], train)))
        say(suspects[-1][0])
    for n in range(copies):
        train = fitted(splits.pool.inputs, answers, 500 + n)
        suspects.append((f"copy {n}", trained("copy", 500 + n, factories[1 + n % 2], train)))
        say(suspects[-1][0])
    p_values: dict[str, list[list[float]]] = {}
    for number, (_, suspect) in enumerate(suspects):
        for test, values in tested(suspect, number, watermark, keys).items():
            p_values.setdefault(test, []).append(values)
    return {"figures": figures(p_values, len(suspects), keys), "p_values": p_values}


def tested(suspect: nn.Module, number: int, watermark: Watermark, keys: int) -> dict[str, list[float]]:
    """p-values of one suspect under many draws of the targets, by test."""
    by_scores, by_labels, said, expected = [], [], [], []
    for group in watermark.groups:
        depth = watermark.questions_per_group
        triggers = group.triggers[:depth]
        probabilities = training.predict(suspect, triggers).double().softmax(1).numpy()
        reference = group.reference_log_probs[:depth].double().numpy()
        scores = score_probabilities(probabilities, reference, group.candidates)
        by_scores.append(DEFAULT_CALIBRATOR.weights(scores, scale_floor=SCORE_NOISE))
        by_labels.append(DEFAULT_CALIBRATOR.weights(_climbed(suspect, group), scale_floor=RUNG_NOISE))
        said.append(probabilities)
        expected.append(np.exp(reference))
    found: dict[str, list[float]] = {}
    for n in range(keys):
        # Draws of its own for each model: innocents are alike, and with common draws their claims would be
        # too, so that no binomial would count them.
        bound = watermark.bind(SecretKey(bytes(range(32))), f"model {number}, draw {n}")
        targets = [group.candidates.index(group.target) for group in bound.groups]
        for name, weights in (("scores", by_scores), ("labels", by_labels)):
            found.setdefault(f"exact, {name}", []).append(exact_p_value(weights, targets))
            found.setdefault(f"verify, {name}", []).append(_as_verify(watermark, weights, targets))
        classes = [group.target for group in bound.groups]
        ours = np.concatenate([p[:, c] for p, c in zip(said, classes, strict=True)])
        theirs = np.concatenate([p[:, c] for p, c in zip(expected, classes, strict=True)])
        found.setdefault("t-test", []).append(t_test(ours, theirs).p_value)
    return found


def _as_verify(watermark: Watermark, weights: list[np.ndarray], targets: list[int]) -> float:
    """The p-value of `verify`: the smallest of the marks' sequential ones, times their number."""
    marks = sorted({group.mark for group in watermark.groups})
    found = []
    for mark in marks:
        part = [g for g, group in enumerate(watermark.groups) if group.mark == mark]
        test = run([weights[g] for g in part], [targets[g] for g in part], alpha=1e-3 / len(marks))
        found.append(test.p_value)
    return min(1.0, len(marks) * min(found))


def _climbed(suspect: nn.Module, group: Any) -> np.ndarray:
    climber = climb(
        group.triggers[: len(group.ends)],
        group.ends,
        group.turns.tolist(),
        np.asarray(group.candidates),
        list(range(len(group.candidates))),
    )
    questions = next(climber)
    while True:
        labels = top_labels(training.predict(suspect, questions).double().softmax(1).numpy())
        try:
            questions = climber.send(labels)
        except StopIteration as end:
            return np.asarray(end.value)


def figures(p_values: dict[str, list[list[float]]], suspects: int, keys: int) -> dict[str, Any]:
    """False claims with the interval that a binomial at the level allows (99%), and Kolmogorov-Smirnov."""
    total = suspects * keys
    rows = {}
    for name, values in p_values.items():
        p = np.asarray(values).ravel()
        rows[name] = {
            "false_claims": {str(level): int((p <= level).sum()) for level in LEVELS},
            "allowed": {str(level): int(binom.ppf(0.995, total, level)) for level in LEVELS},
            # Discrete p-values lie above uniform by design; what matters is how far they lie below.
            "ks_below_uniform": float(kstest(p, "uniform", alternative="greater").statistic),
            "ks_p_value": float(kstest(p, "uniform", alternative="greater").pvalue),
            "worst_model": {
                str(level): int(max((np.asarray(v) <= level).sum() for v in values)) for level in LEVELS
            },
        }
    return {"suspects": suspects, "keys": keys, "tests": rows}


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    head = [
        f"{found['suspects']} innocent models, {found['keys']} draws of the targets each. False claims (at "
        "most so many with 99.5%), the most for one model, and how far the p-values lie below uniform.",
        "",
        "| test | " + " | ".join(f"{level:g}" for level in LEVELS) + " | worst model at 0.1 | KS below | p |",
        "|---|" + "---|" * (len(LEVELS) + 3),
    ]
    rows = [
        f"| {name} | "
        + " | ".join(f"{row['false_claims'][str(level)]} ({row['allowed'][str(level)]})" for level in LEVELS)
        + f" | {row['worst_model'][str(0.1)]} | {row['ks_below_uniform']:.3f} | {row['ks_p_value']:.2g} |"
        for name, row in found["tests"].items()
    ]
    return "\n".join([*head, *rows]) + "\n"


def draw(p_values: dict[str, list[list[float]]], path: Path) -> None:
    """The distributions of the p-values against uniform."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5))
    for name, values in p_values.items():
        p = np.sort(np.asarray(values).ravel())
        axes.step(p, np.arange(1, len(p) + 1) / len(p), where="post", label=name)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, label="uniform")
    axes.set_xlabel("p-value")
    axes.set_ylabel("share of innocent models and keys at or below")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
