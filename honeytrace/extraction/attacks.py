"""`ATTACKS`: every attack by name, for whoever runs all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from honeytrace.extraction.adaptive import random_adaptive
from honeytrace.extraction.averaging import repeat, smoothing
from honeytrace.extraction.bent_hunting import bent_hunting
from honeytrace.extraction.dfme import dfme
from honeytrace.extraction.guessed_bank import guessed_bank
from honeytrace.extraction.interface import Api, Extraction, Labels, Needs
from honeytrace.extraction.jacobian import jbda, jbda_tr
from honeytrace.extraction.label_recovery import bayes, d_dae, d_dae_plus
from honeytrace.extraction.low_confidence import low_confidence
from honeytrace.extraction.noisy_labels import bootstrap, co_teaching
from honeytrace.extraction.outliers import outliers
from honeytrace.extraction.random_queries import random_queries
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.s4l import s4l
from honeytrace.extraction.second_hand import second_hand
from honeytrace.extraction.transfer import transfer
from honeytrace.training import Progress


@dataclass(frozen=True)
class Attack:
    """An attack, to be called as its function is.

    Attributes:
        name: in `ATTACKS`.
        function: ``function(api, pool, recipe, *, seed, budget=None, labels="soft", progress=None,
            **settings)``.
        needs: "scores" where the API must give probabilities, "labels" where labels are enough (then call it
            with ``labels="top1"``).
        wants: settings that have no default.
    """

    name: str
    function: Callable[..., Extraction]
    needs: Needs = "labels"
    wants: tuple[str, ...] = ()

    def __call__(
        self,
        api: Api,
        pool: Tensor,
        recipe: Recipe,
        *,
        seed: int,
        budget: int | None = None,
        labels: Labels = "soft",
        progress: Progress | None = None,
        **settings: Any,
    ) -> Extraction:
        """Run it; see the function's docstring for its own settings.

        Raises:
            TypeError, ValueError: as the function; also where a setting without a default is missing.
        """
        missing = [name for name in self.wants if name not in settings]
        if missing:
            raise ValueError(f"the attack {self.name} needs the setting {', '.join(missing)}")
        return self.function(
            api, pool, recipe, seed=seed, budget=budget, labels=labels, progress=progress, **settings
        )


ATTACKS: Mapping[str, Attack] = MappingProxyType(
    {
        attack.name: attack
        for attack in (
            Attack("random", random_queries),
            Attack("random-adaptive", random_adaptive),
            Attack("jbda", jbda),
            Attack("jbda-tr", jbda_tr),
            Attack("s4l", s4l),
            Attack("smoothing", smoothing),
            Attack("repeat", repeat),
            Attack("low-confidence", low_confidence, needs="scores"),
            Attack("outliers", outliers),
            Attack("bootstrap", bootstrap),
            Attack("co-teaching", co_teaching),
            Attack("transfer", transfer, wants=("pretraining",)),
            Attack("second-hand", second_hand),
            Attack("d-dae", d_dae, needs="scores"),
            Attack("d-dae-plus", d_dae_plus, needs="scores"),
            Attack("bayes", bayes, needs="scores"),
            Attack("dfme", dfme, needs="scores"),
            Attack("bent-hunting-drop", partial(bent_hunting, mode="drop")),
            Attack("bent-hunting-repair", partial(bent_hunting, mode="repair")),
            Attack("guessed-bank", guessed_bank),
        )
    }
)
"""Attacks by name."""
