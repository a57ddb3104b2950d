"""Model extraction attacks: from a callable that answers queries to a trained copy.

Every attack is ``attack(api, pool, recipe, *, seed, budget=None, labels="soft", <its own settings>,
progress=None)``: it takes the API (a callable), a pool of inputs and a `Recipe` for the copy, asks no more
than `budget` queries, and gives an `Extraction`: the copy with the record of what was asked, answered and
learned. The shared arguments are explained at `random_queries`; `ATTACKS` names all of them.
"""

from honeytrace.extraction.adaptive import random_adaptive
from honeytrace.extraction.attacks import ATTACKS, Attack
from honeytrace.extraction.averaging import repeat, smoothing
from honeytrace.extraction.bent_hunting import Hunt, bent_hunting, hunt, repaired
from honeytrace.extraction.dfme import dfme
from honeytrace.extraction.guessed_bank import guessed_bank
from honeytrace.extraction.interface import (
    Api,
    Extraction,
    Labels,
    Needs,
    agreement,
    api,
    ask,
    fidelity,
    predicted_labels,
)
from honeytrace.extraction.jacobian import jbda, jbda_tr
from honeytrace.extraction.label_recovery import bayes, d_dae, d_dae_plus, honeytrace_defence
from honeytrace.extraction.low_confidence import low_confidence
from honeytrace.extraction.noisy_labels import bootstrap, co_teaching
from honeytrace.extraction.outliers import outliers, worst_dropped
from honeytrace.extraction.random_queries import random_queries
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.s4l import s4l
from honeytrace.extraction.second_hand import second_hand
from honeytrace.extraction.transfer import transfer

__all__ = [
    "ATTACKS",
    "Api",
    "Attack",
    "Extraction",
    "Hunt",
    "Labels",
    "Needs",
    "Recipe",
    "agreement",
    "api",
    "ask",
    "bayes",
    "bent_hunting",
    "bootstrap",
    "co_teaching",
    "d_dae",
    "d_dae_plus",
    "dfme",
    "fidelity",
    "guessed_bank",
    "honeytrace_defence",
    "hunt",
    "jbda",
    "jbda_tr",
    "low_confidence",
    "outliers",
    "predicted_labels",
    "random_adaptive",
    "random_queries",
    "repaired",
    "repeat",
    "s4l",
    "second_hand",
    "smoothing",
    "transfer",
    "worst_dropped",
]
