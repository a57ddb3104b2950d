"""The attacker who guesses a trigger bank and differentiates through it."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace import ops
from honeytrace.extraction.answer_statistics import mixed_in
from honeytrace.extraction.clusters import clusters
from honeytrace.extraction.interface import Api, Extraction, Labels, best_class
from honeytrace.extraction.outliers import others
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.ops import reference
from honeytrace.rule import WatermarkRule
from honeytrace.training import Progress, device_of, evaluating, excess_loss, predict
from honeytrace.watermark.head import features_of_all, find_head, get_head, watched
from honeytrace.watermark.masks import Mask

# What Honeytrace's calibration uses, for whoever reads its source.
_NEIGHBOURS, _POWER = 5, 0.25
_ROWS = 24
_CELL = 60
_BATCH = 256
_STEPS = 5


class _Guess(NamedTuple):
    """Guessed trigger groups in the features of one of the attacker's models."""

    model: nn.Module
    head: str
    bank: Tensor
    rule: WatermarkRule

    def similarity(self, inputs: Tensor) -> Tensor:
        """[N, G] in [0, 1] to each guessed group."""
        features = features_of_all(self.model, self.head, inputs)[0]
        distance = ops.feature_distance(features, self.bank, k=self.rule.k, metric=self.rule.metric)
        return reference.similarity(distance, features, rule=self.rule)


def guessed_bank(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    mode: Literal["avoid", "unbend"] = "avoid",
    guess: Literal["clusters", "composites"] = "clusters",
    groups: int = 16,
    coverage: float = 0.02,
    step: float = 0.1,
    progress: Progress | None = None,
) -> Extraction:
    """Guess trigger groups, and keep the queries out of them or take the marks off their answers.

    This project's own attack, on the differentiable reference of its ops. The attacker's copy stands in for
    the victim's features. Guessed groups are its most suspicious clusters (answers whose second class seems
    mixed in, or that fit worst), or composites of two classes' inputs; each reaches as far as to cover the
    share of queries that the calibration marks by default.

    - "avoid": half the budget is asked at random. The inputs of the other half are first moved along the
      gradient of the similarity, out of the guessed groups. What lies in one of them is not learned.
    - "unbend": all is asked at random. Target and weight of each group are fitted, by gradient descent
      through the watermark's formulas, to what the answers have beyond those of a copy that learned labels
      only; then the mixture is undone.

    Args:
        api: must give probabilities with "unbend". pool, recipe, seed, budget, labels, progress: as
            `random_queries`; the budget must be at least 2.
        mode, guess: see above.
        groups: guessed groups. Default 16. coverage: share of queries in each, in (0, 0.5). Default 0.02.
        step: how far an input is moved at most in each of its values, in units of the inputs. Default 0.1.

    Returns:
        The copy; `suspected` are the queries in guessed groups: left out, or unbent.

    Raises:
        TypeError, ValueError: as `random_queries`, or a setting is out of range.
    """
    _check(mode, guess, groups, coverage, step)
    session = Session(
        api,
        pool,
        seed=seed,
        budget=budget,
        labels=labels,
        progress=progress,
        needs="scores" if mode == "unbend" else "labels",
    )
    if session.budget < 2:
        raise ValueError(f"budget must be at least 2 to be asked in two halves, got budget={session.budget}")
    rows = session.draw(session.budget)
    first = rows if mode == "unbend" else rows[: session.budget // 2]
    session.ask(pool[first], first)
    made = _guess(session, recipe, guess, groups, coverage)
    if mode == "unbend":
        return _unbent(session, recipe, made)
    second = rows[len(first) :]
    session.ask(_moved_away(made, pool[second], step, session), second)
    return _without_groups(session, recipe, made)


def _guess(session: Session, recipe: Recipe, guess: str, groups: int, coverage: float) -> _Guess:
    """Train on the labels of what was asked so far, and put groups into that model's features."""
    queries, answers, _ = session.asked()
    best = best_class(answers)
    model, _ = recipe.train(queries, best, seed=(session.seed + 1) % 2**64, progress=session.progress)
    head = find_head(model, queries[:2])
    features = features_of_all(model, head, queries)[0]
    # Groups from one half of the queries, their reach from the other: a group lies near its own members.
    halves = torch.randperm(len(queries), generator=session.generator).to(queries.device)
    own, other = halves[: (len(queries) + 1) // 2], halves[len(queries) // 2 :]
    if guess == "clusters":
        suspicion = excess_loss(model, queries, best)
        if answers.dim() == 2 and answers.shape[1] >= 3:
            suspicion = mixed_in(answers)[0].to(suspicion.dtype)
        bank = _suspicious_clusters(features[own], suspicion[own], groups, session)
    else:
        bank = torch.stack(
            [features_of_all(model, head, _composites(queries, best, session))[0] for _ in range(groups)]
        )
    distance = ops.feature_distance(features[other], bank, k=_NEIGHBOURS, metric="l1")
    # Never 0: a group that is nothing but copies of one query still has a scale.
    reach = distance.quantile(coverage, dim=0).clamp(min=1e-6).tolist()
    rule = WatermarkRule(offset=tuple(reach), scale=tuple(reach), k=_NEIGHBOURS, metric="l1")
    return _Guess(model, head, bank, rule)


def _suspicious_clusters(features: Tensor, suspicion: Tensor, groups: int, session: Session) -> Tensor:
    """Members [groups, _ROWS, D] of the clusters with the highest mean suspicion."""
    count = min(len(features), max(groups, len(features) // _CELL))
    cell = clusters(features, count, seed=session.seed)
    sizes = torch.bincount(cell, minlength=count)
    mean = suspicion.new_zeros(count).index_add_(0, cell, suspicion) / sizes.clamp(min=1)
    chosen = mean.masked_fill(sizes == 0, -torch.inf).argsort(descending=True, stable=True)[:groups]
    members = []
    for number in chosen.tolist():
        own = (cell == number).nonzero().flatten()
        draw = torch.randint(max(1, len(own)), (_ROWS,), generator=session.generator).to(own.device)
        members.append(features[own[draw]] if len(own) else features[:_ROWS])
    return torch.stack(members)


def _composites(queries: Tensor, best: Tensor, session: Session) -> Tensor:
    """_ROWS inputs of one class, each with a part of an input of another class, by a quadrant mask (rows of
    numbers: halfway between both)."""
    present = torch.unique(best)
    pair = present[torch.randperm(len(present), generator=session.generator)[:2].to(present.device)]
    chosen = []
    for number in pair.tolist():
        own = (best == number).nonzero().flatten()
        draw = torch.randint(len(own), (_ROWS,), generator=session.generator).to(own.device)
        chosen.append(queries[own[draw]])
    down, right = torch.randint(2, (2,), generator=session.generator).tolist()
    mask = Mask("blend", (0.5,)) if queries.dim() == 2 else Mask("quadrant", (float(down), float(right)))
    rendered = mask.render(tuple(queries.shape[1:])).to(queries.device)
    return ops.compose(chosen[0], chosen[-1], rendered)


def _moved_away(made: _Guess, inputs: Tensor, step: float, session: Session) -> Tensor:
    """Inputs moved by at most `step` along the sign of the gradient of the similarity to all guessed groups;
    those that lie in none stay as they are."""
    low, high = session.pool.amin().item(), session.pool.amax().item()
    device = device_of(made.model)
    bank = made.bank.to(device)
    found = []
    with evaluating(made.model), torch.enable_grad():
        for batch in torch.split(inputs, _BATCH):
            point = batch.detach().to(device)
            for _ in range(_STEPS):
                point.requires_grad_()
                features = _features_of(made.model, made.head, point).float()
                distance = reference.feature_distance(features, bank, k=made.rule.k, metric=made.rule.metric)
                similarity = reference.similarity(distance, features.detach(), rule=made.rule)
                slope = torch.autograd.grad(similarity.sum(), point)[0]
                point = (point.detach() - step / _STEPS * slope.sign()).clamp(low, high)
            found.append(point.to(inputs.device))
    return torch.cat(found)


def _without_groups(session: Session, recipe: Recipe, made: _Guess) -> Extraction:
    queries, answers, _ = session.asked()
    inside = (made.similarity(queries) > 0).any(dim=1).nonzero().flatten()
    kept = others(inside, len(queries))
    if len(kept) == 0:
        raise ValueError("every query lies in a guessed group: fewer groups or a smaller coverage are needed")
    targets = session.learnable(answers)[kept]
    copy, history = recipe.train(queries[kept], targets, seed=session.seed, progress=session.progress)
    return session.extraction(copy, history, kept=kept, suspected=inside)


def _unbent(session: Session, recipe: Recipe, made: _Guess) -> Extraction:
    """Fit what each guessed group mixes in, and take it out of the answers."""
    queries, answers, _ = session.asked()
    answers = answers / answers.sum(1, keepdim=True)
    nearness, group = made.similarity(queries).max(dim=1)
    inside = (nearness > 0).nonzero().flatten()
    clean = predict(made.model, queries[inside]).float()
    reached, group = nearness[inside].double() ** _POWER, group[inside]
    target, weight = _fitted_marks(answers[inside], clean, reached, group, made.bank.shape[0])
    share = (weight[group] * reached)[:, None].float()
    unmixed = (answers[inside] - share * target.softmax(1)[group]).clamp(min=1e-6) / (1 - share)
    mended = answers.clone()
    mended[inside] = unmixed / unmixed.sum(1, keepdim=True)
    targets = session.learnable(mended)
    copy, history = recipe.train(queries, targets, seed=session.seed, progress=session.progress)
    return session.extraction(copy, history, targets=targets, suspected=inside)


def _fitted_marks(
    answers: Tensor, clean: Tensor, reached: Tensor, group: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Target logits [G, C] and weight float64 [G] of the marks that explain the answers [n, C] best when put
    on the logits `clean` [n, C] with the similarities `reached` [n] to the groups `group` [n]."""
    with torch.enable_grad():
        surplus = (answers - clean.softmax(1)).clamp(min=1e-4)
        target = torch.full((groups, clean.shape[1]), 1e-4, device=clean.device).index_add_(0, group, surplus)
        target = target.log().requires_grad_()
        weight = torch.full((groups,), -2.0, dtype=torch.float64, device=clean.device).requires_grad_()
        optimizer = torch.optim.Adam([target, weight], lr=0.05)
        for _ in range(100):
            mixed = reference.mix(
                clean, target[group], weight.sigmoid()[group] * reached, space="probabilities"
            )
            loss = functional.cross_entropy(mixed, answers)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return target.detach(), weight.detach().sigmoid()


def _check(mode: str, guess: str, groups: int, coverage: float, step: float) -> None:
    if mode not in ("avoid", "unbend"):
        raise ValueError(f'mode must be "avoid" or "unbend", got mode={mode!r}')
    if guess not in ("clusters", "composites"):
        raise ValueError(f'guess must be "clusters" or "composites", got guess={guess!r}')
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be an int of at least 1, got groups={groups!r}")
    if not 0 < coverage < 0.5:
        raise ValueError(f"coverage must be in (0, 0.5), got coverage={coverage}")
    if not step > 0:
        raise ValueError(f"step must be above 0, got step={step}")


def _features_of(model: nn.Module, head: str, batch: Tensor) -> Tensor:
    """Features [B, D] of a batch, with gradients, in the mode the model is in."""
    with watched([get_head(model, head)]) as seen:
        model(batch)
    features: Tensor = seen[-1].got.flatten(1)  # a convolution gets [B, D, 1, 1]
    return features
