"""Taking a watermark out of a copy: what an attacker with a few clean samples does after the theft."""

from functools import partial

from honeytrace.removal.distillation import distill
from honeytrace.removal.fine_pruning import fine_prune
from honeytrace.removal.fine_tuning import fine_tune
from honeytrace.removal.interface import Removal
from honeytrace.removal.mark_erase import erase_mark
from honeytrace.removal.neural_cleanse import Patches, cleanse, find_patches
from honeytrace.removal.wrk import repair_boundaries

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

__all__ = [
    "REMOVALS",
    "Patches",
    "Removal",
    "cleanse",
    "distill",
    "erase_mark",
    "find_patches",
    "fine_prune",
    "fine_tune",
    "repair_boundaries",
]
