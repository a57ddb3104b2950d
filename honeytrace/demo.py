"""The whole road, once: train, calibrate, protect, steal, prove. Gives figures; the command line prints them.

    owner's data -> victim -> reference copy, watermark -> protected model -> copies -> verdicts
                                                           innocents      -> verdicts

Every suspect is a model of another architecture than the victim. Each goes through `verify` twice, by scores
(the verdict that is expected to come out) and by labels only (a second figure).
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from honeytrace import data, extraction, training
from honeytrace.cache import ModelCache, digest, model_digest
from honeytrace.ownership import Verdict, verify
from honeytrace.progress import Stage, silent
from honeytrace.watermark import SecretKey, Summary, Watermark
from honeytrace.world import SETTINGS, DataName, World

TRIGGERS = 16
"""Asked in each group by scores: all there are. Four suffice for most keys (`verify`'s default), but a group
that comes second for want of questions costs more than the questions do."""

LATENCY_BATCHES = (1, 32, 256)
_LATENCY_ROUNDS = 31
_LATENCY_SECONDS = 0.01
"""One timing repeats the call for about this long: clock and scheduler are coarser than a call."""


@dataclass(frozen=True, kw_only=True)
class SuspectResult:
    """One suspect and what was found about it.

    Attributes:
        name: what the suspect is.
        made_from: whose answers, or which data, it learned from.
        innocent: True where nothing of the protected answers went into it.
        expected: whether a claim should come out; None where nothing is promised.
        accuracy: share of test images it labels correctly.
        fidelity: share of test images it labels as the bare victim does.
        success_rate: share of the flip groups' triggers it answers with the target's label; None where the
            watermark it is verified against has no flip groups.
        target_probability: mean probability it gives the target, over all triggers.
        by_scores, by_labels: the two verdicts.
    """

    name: str
    made_from: str
    innocent: bool
    expected: bool | None
    accuracy: float
    fidelity: float
    success_rate: float | None
    target_probability: float
    by_scores: Verdict
    by_labels: Verdict

    @property
    def as_expected(self) -> bool:
        """Whether the verdict by scores is the expected one; True where none is expected."""
        return self.expected is None or self.by_scores.claim == self.expected


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One batch size: the bare and the protected model, timed in turn. Milliseconds for a call, medians.

    Attributes:
        ratio: median of protected / bare, round by round.
        spread: interquartile range of those ratios.
    """

    batch: int
    bare_ms: float
    protected_ms: float
    ratio: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """All figures of one run. Nothing in it gives the key, a trigger or a target away.

    Attributes:
        data, seed, alpha, threads: as asked for.
        key_identifier: names the key.
        summary: what calibration chose.
        accuracy_bare, accuracy_graded, accuracy_protected: on the test images; without the watermark, with
            the graded mark alone, with all marks.
        reference_probability: mean probability that the owner's unmarked reference gives the targets on all
            triggers: what the suspects' `target_probability` is to be compared with.
        suspects, latency: one entry a row.
        notes: what could not be done, and what would make it possible.
        seconds: of the whole run.
    """

    data: DataName
    seed: int
    alpha: float
    threads: int
    key_identifier: str
    summary: Summary
    accuracy_bare: float
    accuracy_graded: float
    accuracy_protected: float
    reference_probability: float
    suspects: tuple[SuspectResult, ...]
    latency: tuple[Latency, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def as_expected(self) -> bool:
        """Whether every expected verdict came out."""
        return all(suspect.as_expected for suspect in self.suspects)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts for json.dumps."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **fields,
            "summary": self.summary.to_dict(),
            "suspects": [
                {
                    **{field.name: getattr(suspect, field.name) for field in dataclasses.fields(suspect)},
                    "by_scores": suspect.by_scores.to_dict(),
                    "by_labels": suspect.by_labels.to_dict(),
                    "as_expected": suspect.as_expected,
                }
                for suspect in self.suspects
            ],
            "latency": [dataclasses.asdict(latency) for latency in self.latency],
            "notes": list(self.notes),
            "as_expected": self.as_expected,
        }


def run(
    name: DataName = "digits",
    *,
    directory: str | os.PathLike[str] | None = None,
    alpha: float = 1e-3,
    seed: int = 0,
    key: SecretKey | None = None,
    cache: str | os.PathLike[str] | None = None,
    threads: int = 1,
    stage: Stage = silent,
) -> DemoResult:
    """Walk the whole road.

    Args:
        name: the data, "digits" or "fashion".
        directory: where Fashion-MNIST lies, for "fashion" only; default: where Debian's package puts it.
        alpha: false-claim probability, in (0, 1).
        seed: fixes the division of the data, all trainings and all queries; 0 to 2**32 - 1.
        key: the owner's. Default: a fresh one; with a cache, a run that was killed is resumed with its own.
        cache: directory for trained models. Default: nothing is kept.
        threads: of PyTorch, during the run. Default 1: these trainings are small, and on a machine that has
            other work to do a second thread mostly waits.
        stage: shows progress.

    Raises:
        MissingDataset: Fashion-MNIST is not there; the message says how to get it.
        TypeError, ValueError: an argument is out of range.
        OSError: the cache cannot be written.
    """
    if name not in SETTINGS:
        raise ValueError(f"data must be one of {', '.join(SETTINGS)}, got {name!r}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0 to 2**32 - 1, got {seed}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if directory is not None and name != "fashion":
        raise ValueError(f"a directory is read for data fashion only; {name} comes with scikit-learn")
    began = time.perf_counter()
    models_kept = ModelCache(cache)
    with _torch_threads(threads), _run_key(models_kept, key, f"{name}-{seed}") as owned_key:
        world = World(name, seed=seed, key=owned_key, directory=directory, cache=models_kept, stage=stage)
        result = _Road(world, alpha).walk(name)
    return dataclasses.replace(result, threads=threads, seconds=time.perf_counter() - began)


class _Road:
    """The people of the story and what they hold."""

    def __init__(self, world: World, alpha: float) -> None:
        self.world, self.alpha = world, alpha
        self.settings, self.splits, self.stage, self.key = (
            world.settings,
            world.splits,
            world.stage,
            world.key,
        )

    def walk(self, name: DataName) -> DemoResult:
        victim, reference, watermark = self.world.victim, self.world.reference, self.world.watermark
        graded = watermark.without_flips()
        protected, protected_graded = watermark.protect(victim), graded.protect(victim)
        test = self.splits.test
        with self.stage("measuring the protected model"):
            accuracies = [training.accuracy(m, *test) for m in (victim, protected_graded, protected)]
            latency = measure_latency(victim, protected, test.inputs)
        suspects = [
            self._judge(victim, watermark if mark is None else mark, suspect, *words, innocent, expected)
            for suspect, words, mark, innocent, expected in self._suspects(
                victim, protected, protected_graded, watermark, graded
            )
        ]
        strangers, notes = self._strangers(victim, protected, watermark) if name == "fashion" else ([], ())
        return DemoResult(
            data=name,
            seed=self.world.seed,
            alpha=self.alpha,
            threads=0,
            key_identifier=self.key.identifier,
            summary=watermark.summary,
            accuracy_bare=accuracies[0],
            accuracy_graded=accuracies[1],
            accuracy_protected=accuracies[2],
            reference_probability=_success(reference, watermark)[1],
            suspects=(*suspects, *strangers),
            latency=latency,
            notes=notes,
            seconds=0.0,
        )

    def _suspects(
        self,
        victim: nn.Module,
        protected: nn.Module,
        protected_graded: nn.Module,
        watermark: Watermark,
        graded: Watermark,
    ) -> Iterator[tuple[nn.Module, tuple[str, str], Watermark | None, bool, bool]]:
        """Model, (name, made from), what to verify it against, innocent, expected claim."""
        copy, both, one, bare = self._copy, "protected model", "graded mark alone", "bare model"
        soft = copy("soft", "stealing: soft labels", protected, number=9, mark=watermark)
        yield soft, ("copy by soft labels", both), None, False, True
        top1 = copy("top1", "stealing: top-1 labels", protected, number=10, mark=watermark, labels="top1")
        yield top1, ("copy by top-1 labels", both), None, False, True
        alone = copy("graded", "stealing: soft labels, graded mark", protected_graded, number=9, mark=graded)
        yield alone, ("copy by soft labels", one), graded, False, True
        filtered = copy(
            "filtered",
            "stealing: the same, worst 10% dropped",
            protected_graded,
            number=9,
            mark=graded,
            drop_worst=0.1,
        )
        yield filtered, ("same, 10% dropped", one), graded, False, True
        yield self._independent(), ("independent model", "its own data"), None, True, False
        soft = copy("bare-soft", "copying the bare model: soft labels", victim, number=11)
        yield soft, ("copy by soft labels", bare), None, True, False
        top1 = copy("bare-top1", "copying the bare model: top-1 labels", victim, number=12, labels="top1")
        yield top1, ("copy by top-1 labels", bare), None, True, False

    def _independent(self) -> nn.Module:
        def train() -> nn.Module:
            model = training.seeded(self.world.small, seed)
            with self.stage("training an independent model") as report:
                epochs = self.settings.independent_epochs
                training.fit(model, *self.splits.pool, epochs=epochs, seed=seed, progress=report)
            return model

        seed = self.world.number(77)
        epochs = self.settings.independent_epochs
        return self.world.kept("independent", self.world.small, train, seed=seed, epochs=epochs)

    def _strangers(
        self, victim: nn.Module, protected: nn.Module, watermark: Watermark
    ) -> tuple[list[SuspectResult], tuple[str, ...]]:
        """The attacker who has no clothes and asks about digits. Reported as it comes: nothing promised."""
        try:
            pool = data.mnist_digits().inputs
        except data.MissingDataset as missing:
            return [], (f"the attacker who asks about digits is left out. {missing}",)
        found = []
        for number, labels, words in ((13, "soft", "soft labels"), (14, "top1", "top-1 labels")):
            copy = self._copy(
                f"digits-{labels}",
                f"stealing with digits as queries: {words}",
                protected,
                number=number,
                pool=pool,
                mark=watermark,
                labels="soft" if labels == "soft" else "top1",
            )
            name = f"digits asked, {labels}"
            found.append(self._judge(victim, watermark, copy, name, "protected model", False, None))
        return found, ()

    def _copy(
        self,
        name: str,
        text: str,
        asked: nn.Module,
        *,
        number: int,
        pool: Tensor | None = None,
        mark: Watermark | None = None,
        labels: Literal["soft", "top1"] = "soft",
        drop_worst: float = 0.0,
    ) -> nn.Module:
        """A copy of `asked` by random queries; `mark` is the watermark on its answers, for the cache."""
        queries = self.splits.pool.inputs if pool is None else pool
        passes = self.settings.copy_epochs
        seed = self.world.number(number)

        def train() -> nn.Module:
            with self.stage(text) as report:
                return extraction.outliers(
                    extraction.api(asked),
                    queries,
                    extraction.Recipe(self.world.small, passes),
                    seed=seed,
                    labels=labels,
                    share=drop_worst,
                    progress=report,
                ).surrogate

        return self.world.kept(
            name,
            self.world.small,
            train,
            seed=seed,
            epochs=passes,
            labels=labels,
            drop_worst=drop_worst,
            asked=model_digest(asked),
            mark=None if mark is None else _mark_digest(mark),
            pool=None if pool is None else digest(pool),
        )

    def _judge(
        self,
        victim: nn.Module,
        watermark: Watermark,
        suspect: nn.Module,
        name: str,
        made_from: str,
        innocent: bool,
        expected: bool | None,
    ) -> SuspectResult:
        success_rate, target_probability = _success(suspect, watermark)
        return SuspectResult(
            name=name,
            made_from=made_from,
            innocent=innocent,
            expected=expected,
            accuracy=training.accuracy(suspect, *self.splits.test),
            fidelity=extraction.fidelity(suspect, victim, self.splits.test.inputs),
            success_rate=success_rate,
            target_probability=target_probability,
            by_scores=verify(
                suspect, watermark, self.key, alpha=self.alpha, answers="scores", triggers=TRIGGERS
            ),
            by_labels=verify(suspect, watermark, self.key, alpha=self.alpha, answers="labels"),
        )


def measure_latency(
    bare: nn.Module,
    protected: nn.Module,
    inputs: Tensor,
    *,
    batches: Sequence[int] = LATENCY_BATCHES,
    rounds: int = _LATENCY_ROUNDS,
) -> tuple[Latency, ...]:
    """Time both models on the first inputs [N, ...], in turn, after a warm-up, on as many threads as are set.

    Args:
        batches: sizes, each at most N.
        rounds: timings of each model and size; at least 2.
    """

    def timed(model: nn.Module, batch: Tensor, calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            model(batch)
        return (time.perf_counter() - began) / calls

    found = []
    with torch.inference_mode():
        for size in batches:
            batch = inputs[:size]
            warm = min(timed(model, batch, 3) for model in (bare, protected, bare, protected))
            calls = max(1, round(_LATENCY_SECONDS / warm))
            pairs = [(timed(bare, batch, calls), timed(protected, batch, calls)) for _ in range(rounds)]
            ratios = [after / before for before, after in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4)
            found.append(
                Latency(
                    batch=size,
                    bare_ms=1e3 * statistics.median(before for before, _ in pairs),
                    protected_ms=1e3 * statistics.median(after for _, after in pairs),
                    ratio=middle,
                    spread=high - low,
                )
            )
    return tuple(found)


def _success(model: nn.Module, watermark: Watermark) -> tuple[float | None, float]:
    """Share of the flip groups' triggers answered with the target; mean probability of the target on all."""
    hits: list[Tensor] = []
    probabilities: list[Tensor] = []
    for group in watermark.groups:
        answers = training.predict(model, group.triggers).double().softmax(1)
        probabilities.append(answers[:, group.target])
        if group.mark == "flip":
            hits.append(answers.argmax(1) == group.target)
    share = float(torch.cat(hits).double().mean()) if hits else None
    return share, float(torch.cat(probabilities).mean())


def _mark_digest(watermark: Watermark) -> str:
    """Names a watermark for the cache. One-way: rule, key's name, all triggers and targets go in together."""
    described = json.dumps([watermark.rule.to_dict(), watermark.key_identifier], sort_keys=True)
    tensors = [torch.tensor(list(described.encode("utf-8")), dtype=torch.uint8)]
    for group in watermark.groups:
        tensors += [group.triggers, torch.tensor(group.target)]
    return digest(*tensors)


@contextmanager
def _run_key(cache: ModelCache, key: SecretKey | None, run_name: str) -> Iterator[SecretKey]:
    """The key of this run: the given one, that of an unfinished run in the cache, or a fresh one.

    A fresh key lies in the cache until the run is over, for without it the copies made so far would be worth
    nothing to the run that resumes.
    """
    if key is not None or cache.directory is None:
        yield key if key is not None else SecretKey.generate()
        return
    file = cache.directory / f"unfinished-{run_name}.key"
    if file.exists():
        key = SecretKey.load(file)
    else:
        key = SecretKey.generate()
        cache.directory.mkdir(parents=True, exist_ok=True)
        key.save(file)
    yield key
    file.unlink(missing_ok=True)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
