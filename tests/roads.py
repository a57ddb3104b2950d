"""The whole road in short, for kinds of input that the demonstration does not show: mark, steal, ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from honeytrace import training
from honeytrace.extraction import Recipe, api, random_queries
from honeytrace.ownership import Verdict, verify
from honeytrace.watermark import SecretKey, Watermark, calibrate

Labelled = tuple[Tensor, Tensor]


class Road(NamedTuple):
    """What came out: the watermark, what it cost on the trigger data, and the verdicts."""

    watermark: Watermark
    bare: float
    marked: float
    soft: Verdict
    top1: Verdict
    independent: Verdict
    from_bare: Verdict


def travel(
    key: SecretKey,
    factory: Callable[[], nn.Module],
    owned: Labelled,
    triggers: Labelled,
    pool: Labelled,
    *,
    epochs: int,
    learning_rate: float = 3e-3,
) -> Road:
    """Train a victim, mark it, steal it by soft and by top-1 labels, and ask both copies and two innocents.

    The owner's unmarked reference is a copy of the bare victim, as an owner would make it.
    """
    settings = {"epochs": epochs, "learning_rate": learning_rate}
    victim, independent, reference = (training.seeded(factory, seed) for seed in (1, 2, 3))
    training.fit(victim, *owned, seed=1, **settings)
    training.fit(independent, *pool, seed=2, **settings)
    training.fit(reference, owned[0], training.predict(victim, owned[0]).softmax(1), seed=3, **settings)
    watermark = calibrate(
        victim, owned, key=key, max_accuracy_drop=0.01, trigger_data=triggers, reference=reference
    )
    served = watermark.protect(victim)
    recipe = Recipe(factory, **settings)

    def asked(model: nn.Module, labels: str) -> Verdict:
        return verify(
            random_queries(api(model), pool[0], recipe, seed=4, labels=labels).surrogate, watermark, key
        )

    return Road(
        watermark,
        training.accuracy(victim, *triggers),
        training.accuracy(served, *triggers),
        asked(served, "soft"),
        asked(served, "top1"),
        verify(independent, watermark, key),
        asked(victim, "soft"),
    )
