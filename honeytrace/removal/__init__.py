"""Taking a watermark out of a copy: what an attacker with a few clean samples does after the theft."""

from collections.abc import Sequence
from functools import partial

from torch import nn

from honeytrace.data import Split
from honeytrace.removal.distillation import distill
from honeytrace.removal.fine_pruning import fine_prune
from honeytrace.removal.fine_tuning import fine_tune
from honeytrace.removal.interface import Removal
from honeytrace.removal.mark_erase import erase_mark
from honeytrace.removal.neural_cleanse import Patches, cleanse, find_patches
from honeytrace.removal.wrk import repair_boundaries
from honeytrace.training import Precision, Progress

REMOVALS: dict[str, Removal] = {
    "fine-tune-5": partial(fine_tune, share=0.05),
    "fine-tune-10": partial(fine_tune, share=0.1),
    "fine-prune-20": partial(fine_prune, pruned=0.2),
    "fine-prune-40": partial(fine_prune, pruned=0.4),
    "fine-prune-60": partial(fine_prune, pruned=0.6),
    "fine-prune-80": partial(fine_prune, pruned=0.8),
    "distillation": distill,
    "wrk": repair_boundaries,
    "mark-erase": erase_mark,
    "neural-cleanse": cleanse,
}
"""Every removal by its name in tables; the numbers are per cent of clean labels, or of pruned channels."""

USUAL = ("wrk", "fine-prune-80")
"""The two that change an unmarked copy most, each in its own way: sure of itself, and unsure."""


def after_removals(
    copy: nn.Module,
    data: Split,
    *,
    seed: int,
    names: Sequence[str] = USUAL,
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> list[nn.Module]:
    """What removals make of the owner's unmarked copy: references for suspects that went through one.

    Give ``[copy, *after_removals(copy, data, seed=0)]`` as ``reference`` to `Watermark.calibrate`.

    Args:
        copy: unmarked, from [B, ...] to logits [B, C]; stays as it is.
        data: the owner's labelled samples.
        seed: 0 to 2**64 - 1.
        names: of `REMOVALS`. Default `USUAL`.
        precision, progress: as in `Removal`.

    Returns:
        One model for each name.

    Raises:
        ValueError: a name is no removal. TypeError, ValueError: as the removals.
    """
    unknown = [name for name in names if name not in REMOVALS]
    if unknown:
        raise ValueError(f"names must be of {', '.join(REMOVALS)}; got {', '.join(map(repr, unknown))}")
    return [REMOVALS[name](copy, data, seed=seed, precision=precision, progress=progress) for name in names]


__all__ = [
    "REMOVALS",
    "USUAL",
    "Patches",
    "Removal",
    "after_removals",
    "cleanse",
    "distill",
    "erase_mark",
    "find_patches",
    "fine_prune",
    "fine_tune",
    "repair_boundaries",
]
