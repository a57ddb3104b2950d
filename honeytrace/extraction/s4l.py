"""Extraction with self-supervision: the copy learns how unlabelled images are turned, beside the answers."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace.extraction.interface import Api, Extraction, Labels
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.training import Progress, device_of, seeded
from honeytrace.watermark.head import find_head, get_head, linear_head, watched


def s4l(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    weight: float = 1.0,
    progress: Progress | None = None,
) -> Extraction:
    """Train on the answers and, with the same features, on telling by which quarter turn an image was turned.

    S4L-Rotation (Zhai et al., "S4L: Self-Supervised Semi-Supervised Learning", arXiv 1905.03670, section 3.1)
    for extraction, as in Jagielski et al., arXiv 1909.01838, section 4.3. The unlabelled images are the whole
    pool, asked or not. A step sees as many unlabelled images as answered ones, each turned by one random
    quarter (the paper: by all four), so that it costs twice as much as a plain one, not five times.

    Args:
        api, recipe, seed, budget, labels, progress: as `random_queries`.
        pool: square images [N, channels, S, S].
        weight: of the rotation loss. Default 1.

    Returns:
        The copy, without the second head.

    Raises:
        TypeError, ValueError: as `random_queries`; the pool holds no square images; `weight` is below 0.
    """
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress)
    if pool.dim() != 4 or pool.shape[2] != pool.shape[3]:
        raise ValueError(
            f"pool must be square images [N, channels, S, S] to be turned, got {list(pool.shape)}"
        )
    if not weight >= 0:
        raise ValueError(f"weight must be 0 or more, got weight={weight}")
    copy = recipe.fresh(seed)
    learner = _TwoHeads(copy, find_head(copy, pool[:2]), seed)
    queries, targets = session.ask_at_random()
    draws = torch.Generator().manual_seed((seed + 2) % 2**64)

    def objective(batch: Tensor, wanted: Tensor, place: float) -> tuple[Tensor, Tensor]:
        unlabelled = pool[torch.randint(len(pool), (len(batch),), generator=draws).to(pool.device)]
        turns = torch.randint(4, (len(batch),), generator=draws).to(batch.device)
        logits, guesses = learner(batch, _turned(unlabelled.to(batch.device), turns))
        supervised = functional.cross_entropy(logits.float(), wanted)
        return supervised + weight * functional.cross_entropy(guesses.float(), turns), logits

    history = recipe.train_on(learner, queries, targets, seed=seed, objective=objective, progress=progress)
    return session.extraction(copy, history)


class _TwoHeads(nn.Module):
    """A classifier and, on the features of its head, a second head for the four turns."""

    def __init__(self, copy: nn.Module, head: str, seed: int) -> None:
        super().__init__()
        features = linear_head(copy, head).in_features
        self.copy = copy
        self.second = seeded(lambda: nn.Linear(features, 4), seed).to(device_of(copy))
        self._name = head

    def forward(self, batch: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, C] of `batch`, and [B', 4] of `turned`. In one pass: batch normalisation must know both
        kinds of image alike."""
        with watched([get_head(self.copy, self._name)]) as seen:
            logits = self.copy(torch.cat([batch, turned]))
        return logits[: len(batch)], self.second(seen[-1].got[len(batch) :])


def _turned(images: Tensor, turns: Tensor) -> Tensor:
    """Each image turned by its own number of quarters."""
    all_turns = torch.stack([torch.rot90(images, quarter, (2, 3)) for quarter in range(4)])
    return all_turns[turns, torch.arange(len(images), device=images.device)]
