"""Adaptive queries: a bandit learns which part of the pool teaches most."""

import torch
from torch import Tensor
from torch.nn import functional

from honeytrace.extraction.clusters import clusters
from honeytrace.extraction.interface import Api, Extraction, Labels
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.training import Progress, predict


def random_adaptive(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    parts: Tensor | int = 30,
    rounds: int = 20,
    progress: Progress | None = None,
) -> Extraction:
    """Draw the queries from parts of the pool, more often from those whose answers were worth most.

    The adaptive strategy of KnockoffNets (Orekondy, Schiele & Fritz, arXiv 1812.02766, section 4.1.2): a
    gradient bandit (Sutton & Barto, section 2.8) over the parts, with learning rate 1 / (times a part was
    drawn). The reward is the mean of three: certainty (margin of the two largest probabilities), diversity
    (how much more often a class is answered than in the answers before) and the loss of the copy so far; each
    is brought to [0, 1] over the round, and losses are finite however wrong the copy is. In place of single
    queries there are rounds, in which the policy stands still and the copy learns from the round before.

    Args:
        api, pool, recipe, seed, budget, labels, progress: as `random_queries`. No input is sent twice.
        parts: which part each input of the pool belongs to, integer [N] (the paper: the pool's own classes),
            or how many parts k-means shall make of the pool. Default 30.
        rounds: of asking and rewarding. Default 20.

    Returns:
        The copy, trained from scratch on all answers.

    Raises:
        TypeError, ValueError: as `random_queries`, or a setting is out of range.
    """
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be an int of at least 1, got rounds={rounds}")
    bandit = _Bandit(_parts(parts, pool, seed), session.generator)
    learner = recipe.fresh(seed)
    for number in range(rounds, 0, -1):
        count = session.left // number
        if count == 0:
            continue
        rows = bandit.draw(count).to(pool.device)
        before = session.asked()[1] if session.left < session.budget else None
        answers = session.ask(pool[rows], rows)
        bandit.learn(_reward(answers, before, predict(learner, pool[rows])))
        if number > 1:
            recipe.train_on(
                learner,
                pool[rows],
                session.learnable(answers),
                seed=(seed + number) % 2**64,
                epochs=1,
                progress=progress,
            )
    queries, answers, _ = session.asked()
    return session.extraction(
        *recipe.train(queries, session.learnable(answers), seed=seed, progress=progress)
    )


class _Bandit:
    """Preferences for the parts, and what is left to draw in each."""

    def __init__(self, parts: Tensor, generator: torch.Generator) -> None:
        count = int(parts.max()) + 1
        # Each part's inputs in a random order of their own; a pointer says how many of them are gone.
        order = torch.randperm(len(parts), generator=generator)
        self._rows = order[torch.argsort(parts[order], stable=True)]
        self._sizes = torch.bincount(parts, minlength=count)
        self._starts = self._sizes.cumsum(0) - self._sizes
        self._gone = torch.zeros(count, dtype=torch.int64)
        self._preferences = torch.zeros(count, dtype=torch.float64)
        self._generator = generator
        self._drawn = self._policy = self._preferences
        self._mean: float | None = None

    def draw(self, count: int) -> Tensor:
        """`count` rows that were not drawn before, as the policy has it; an empty part is out of the game."""
        found: list[Tensor] = []
        drawn: list[Tensor] = []
        left = self._sizes - self._gone
        self._policy = self._preferences.masked_fill(left == 0, -torch.inf).softmax(0)
        while count:
            odds = self._preferences.masked_fill(left == 0, -torch.inf).softmax(0)
            choices = torch.multinomial(odds, count, replacement=True, generator=self._generator)
            taken = torch.bincount(choices, minlength=len(left)).minimum(left)
            which = torch.repeat_interleave(torch.arange(len(left)), taken)
            place = torch.arange(len(which)) - torch.repeat_interleave(taken.cumsum(0) - taken, taken)
            found.append(self._rows[self._starts[which] + self._gone[which] + place])
            drawn.append(which)
            self._gone += taken
            left = self._sizes - self._gone
            count -= len(which)
        self._drawn = torch.cat(drawn)
        return torch.cat(found)

    def learn(self, rewards: Tensor) -> None:
        """The gradient step for the rows drawn last; rewards float64 [count] in [0, 1]."""
        mean = float(rewards.mean()) if self._mean is None else self._mean
        gain = torch.zeros_like(self._preferences).index_add_(0, self._drawn, rewards.cpu() - mean)
        gradient = gain - gain.sum() * self._policy
        self._preferences += gradient / self._gone.clamp(min=1)
        self._mean = float(rewards.mean())


def _reward(answers: Tensor, before: Tensor | None, logits: Tensor) -> Tensor:
    """Mean of certainty, diversity and loss of each answer, float64 [n] in [0, 1]."""
    classes = logits.shape[1]
    known = answers if answers.dim() == 2 else functional.one_hot(answers, classes)
    known = known.double()
    top = known.topk(2, dim=1).values
    past = known if before is None else before
    past = past if past.dim() == 2 else functional.one_hot(past, classes)
    diversity = (known - past.double().mean(0)).clamp(min=0).sum(1)
    loss = -(known * logits.double().log_softmax(1)).sum(1)
    return torch.stack([_scaled(top[:, 0] - top[:, 1]), _scaled(diversity), _scaled(loss)]).mean(0)


def _scaled(values: Tensor) -> Tensor:
    """Values brought to [0, 1]: smallest to 0, largest to 1; all 0 where they are equal."""
    values = values.nan_to_num(nan=0.0, posinf=1e6, neginf=0.0)
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-12)


def _parts(parts: Tensor | int, pool: Tensor, seed: int) -> Tensor:
    if isinstance(parts, Tensor):
        if parts.dim() != 1 or len(parts) != len(pool) or parts.is_floating_point() or parts.min() < 0:
            raise ValueError(
                f"parts must be integers of 0 or more, [N] with N={len(pool)}, got {parts.dtype} "
                f"{list(parts.shape)}"
            )
        return parts.long().cpu()
    return clusters(pool.flatten(1), parts, seed=seed).cpu()
