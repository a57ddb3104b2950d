"""A dress rehearsal: the owner steals the protected model from itself before anybody else can.

Whether a claim will stand depends on the key (where its groups lie, which targets it drew) and on the data.
The rehearsal says so beforehand, by measuring: copies are trained on the protected answers to the owner's own
inputs, by soft and by top-1 labels, and verified as a suspect would be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from honeytrace.extraction import Recipe, api, random_queries
from honeytrace.ownership import Verdict, verify
from honeytrace.training import Progress
from honeytrace.watermark import SecretKey, Watermark


@dataclass(frozen=True)
class Rehearsal:
    """Verdicts on the owner's own copies.

    Attributes:
        soft: on the copy trained on the answers' probabilities.
        top1: on the copy trained on the answers' labels.
    """

    soft: Verdict
    top1: Verdict

    def __str__(self) -> str:
        def line(name: str, verdict: Verdict) -> str:
            word = "a claim would stand" if verdict.claim else "NO claim: this key does not reach it"
            return f"  copy by {name:<10}  {word} (p = {verdict.p_value:.2g}, {verdict.queries} queries)"

        return "\n".join(["Rehearsal", line("soft labels", self.soft), line("top-1", self.top1)])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return {"soft": self.soft.to_dict(), "top1": self.top1.to_dict()}


def rehearse(
    model: nn.Module,
    watermark: Watermark,
    key: SecretKey,
    inputs: Tensor,
    *,
    surrogate: Callable[[], nn.Module],
    epochs: int,
    seed: int,
    alpha: float = 1e-3,
    progress: Progress | None = None,
) -> Rehearsal:
    """Extract the protected model with the owner's inputs, twice, and put both copies to the test.

    A rehearsal is optimistic where the attacker's inputs are unlike the owner's (see docs/strength.md), and
    it says
    nothing about an innocent model: that is the test's own promise.

    Args:
        model: the bare model.
        watermark, key: as calibrated.
        inputs: [N, ...], the owner's; labels are not used.
        surrogate: makes a fresh copy to train, best another architecture than the model's.
        epochs, seed: of the copies' training.
        alpha: false-claim probability of the verdicts. Default 1e-3.
        progress: told of every batch.

    Raises:
        TypeError, ValueError: as `random_queries` and `verify`.
    """
    answers = api(watermark.protect(model))
    recipe = Recipe(surrogate, epochs)
    soft = random_queries(answers, inputs, recipe, seed=seed, labels="soft", progress=progress)
    top1 = random_queries(answers, inputs, recipe, seed=seed, labels="top1", progress=progress)
    return Rehearsal(
        soft=verify(soft.surrogate, watermark, key, alpha=alpha),
        top1=verify(top1.surrogate, watermark, key, alpha=alpha),
    )
