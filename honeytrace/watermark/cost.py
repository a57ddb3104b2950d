"""What a watermark costs: accuracy with it and without, and how many answers it touches."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from honeytrace.training import Progress
from honeytrace.watermark.protected import is_protected
from honeytrace.watermark.samples import Samples, gather, look

if TYPE_CHECKING:
    from honeytrace.watermark.watermark import Watermark


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Attributes:
    accuracy, accuracy_marked: of the bare model and with the watermark, on labelled samples.
    expected_drop: share of answers that the model's own probabilities expect to lose.
    bent, flipped: share of queries whose answer changes at all, and whose label is replaced.
    measured_on: number of labelled samples.
    """

    accuracy: float
    accuracy_marked: float
    expected_drop: float
    bent: float
    flipped: float
    measured_on: int

    @property
    def drop(self) -> float:
        """The worse of what was measured on labels and what the model's own probabilities expect."""
        return max(self.accuracy - self.accuracy_marked, self.expected_drop)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    def __str__(self) -> str:
        lost = 100 * (self.accuracy - self.accuracy_marked)
        return "\n".join(
            [
                f"accuracy, bare model    {self.accuracy:.2%}  (on {self.measured_on:,} samples)",
                f"accuracy, protected     {self.accuracy_marked:.2%}  ({lost:.2f} points lost)",
                f"answers changed at all  {self.bent:.2%}",
                f"labels replaced         {self.flipped:.2%}",
            ]
        )


def cost_on(watermark: Watermark, checked: Samples, likely: Samples | None = None) -> Cost:
    """The cost on samples the model has been asked about: accuracy on `checked`, the rest on `likely`.

    Args:
        checked: labelled samples that the accuracies are measured on.
        likely: samples that stand for the queries to come. Default: `checked`.
    """
    likely = checked if likely is None else likely
    others = watermark.mark(likely.features, likely.logits)
    marked = others if checked is likely else watermark.mark(checked.features, checked.logits)
    chances = likely.probabilities
    said = others.logits.argmax(dim=1)
    loss = chances.gather(1, likely.predicted[:, None]) - chances.gather(1, said[:, None])
    return Cost(
        accuracy=float((checked.predicted == checked.labels).double().mean()),
        accuracy_marked=float((marked.logits.argmax(dim=1) == checked.labels).double().mean()),
        expected_drop=float(loss.double().mean()),
        bent=float((others.similarity.amax(dim=1) > 0).double().mean()),
        flipped=float(others.flipped.double().mean()),
        measured_on=len(checked),
    )


def measure(
    watermark: Watermark,
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 512,
    progress: Progress | None = None,
) -> Cost:
    """What the watermark costs the bare `model` on labelled data; see `Watermark.measure`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if is_protected(model):
        raise ValueError("model must be the bare model, got a protected one")
    inputs, labels = gather(data, "data")
    return cost_on(
        watermark, look(model, watermark.head, inputs, labels, batch_size=batch_size, progress=progress)
    )
