"""Other watermarks and defences, to be compared with: one call for all of them, and their table."""

from honeytrace.baselines.composite import composite
from honeytrace.baselines.dawn import Dawn, dawn
from honeytrace.baselines.ewe import ewe
from honeytrace.baselines.interface import BaselineGroup, Defence, Defended
from honeytrace.baselines.mea_defender import mea_defender
from honeytrace.baselines.mea_encoder import MarkedEncoder, mea_defender_encoder, nearest_class
from honeytrace.baselines.neurht import neurht_published
from honeytrace.baselines.perturbation import Perturbed, none, reverse_sigmoid, rounding, top_k
from honeytrace.baselines.simclr import simclr

DEFENCES: dict[str, Defence] = {
    "none": none,
    "neurht-published": neurht_published,
    "dawn": dawn,
    "ewe": ewe,
    "composite": composite,
    "mea-defender": mea_defender,
    "rounding": rounding,
    "top-k": top_k,
    "reverse-sigmoid": reverse_sigmoid,
}
"""Every defence by its name in tables."""

__all__ = [
    "DEFENCES",
    "BaselineGroup",
    "Dawn",
    "Defence",
    "Defended",
    "MarkedEncoder",
    "Perturbed",
    "composite",
    "dawn",
    "ewe",
    "mea_defender",
    "mea_defender_encoder",
    "nearest_class",
    "neurht_published",
    "none",
    "reverse_sigmoid",
    "rounding",
    "simclr",
    "top_k",
]
