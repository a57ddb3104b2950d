"""Roads from triggers towards each candidate class, for suspects that give labels only.

A copy that learned a mark seldom *says* the target at a trigger; it only comes nearer to saying it. Along a
road from the trigger to something of class c, the place where its label turns to c moves. For each candidate
class alike two roads lead from a trigger: to a natural sample of the class, and to the trigger changed by
gradient steps until the owner's models call it that class. (Token ids have no gradient: there the second road
leads to the natural sample of the class whose features are nearest to the trigger's.) Which road shows a mark
differs from group to group and from trigger to trigger (docs/strength.md, "Roads by label").

Nothing here looks at a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from honeytrace.ownership.ladder import LADDERS, STARTS, blend, steps
from honeytrace.training import logits_of, predict
from honeytrace.watermark.key import KeyStream
from honeytrace.watermark.kinds import Kind
from honeytrace.watermark.samples import Samples

_SURE = 0.9
"""A natural end is a sample that the reference gives its class with this probability, where there is one."""

MOST_BYTES = 64 * 2**20
"""Of the ends of all roads of a watermark. Of large images fewer triggers are started from."""

_GRADIENT_STEPS = 24
_STEP = 0.03
"""Length of a gradient step, as a share of the distance from the trigger to the natural end."""


def starts_for(example: Tensor, groups: int, candidates: int) -> int:
    """How many triggers of each group roads start at: STARTS, or as many as MOST_BYTES hold, at least one.

    Args:
        example: an input.
        groups, candidates: how many groups there are, and candidates in each.
    """
    each = groups * len(LADDERS) * candidates * example.nbytes
    return max(1, min(STARTS, MOST_BYTES // each))


def roads(
    model: nn.Module,
    reference: nn.Module,
    trigger: Tensor,
    trigger_features: Tensor,
    candidates: Sequence[int],
    pool: Samples,
    probabilities: Tensor,
    stream: KeyStream,
    batch_size: int,
    kind: Kind,
) -> tuple[Tensor, Tensor]:
    """The ends of the roads from one trigger, and where the reference's label turns on them.

    Args:
        model, reference: the owner's; gradients are taken of both.
        trigger: float32 [...] or int64 [T], where the roads begin; trigger_features: [D].
        candidates: K classes.
        pool: samples for the natural ends; probabilities: [N, C], the reference on them.
        stream: of the key's part for inputs.
        kind: of the inputs.

    Returns:
        ends [2, K, ...] of the trigger's dtype: natural, then by gradients; turns int64 [2, K]: the first
        step of the road, 0 to STEPS, at which the reference says the class, or STEPS + 1 where it never does.
    """
    labels = torch.tensor(list(candidates))
    natural = kind.fitted(
        torch.stack([_natural(probabilities, pool, label, stream) for label in candidates]), trigger
    )
    if trigger.is_floating_point():
        start = trigger[None].expand_as(natural)
        second = _by_gradient(model, reference, start, natural, labels, *_limits(pool.inputs))
    else:
        to_trigger = torch.cdist(trigger_features[None], pool.features, p=1)[0]
        second = kind.fitted(
            torch.stack([_nearest(probabilities, pool, label, to_trigger) for label in candidates]), trigger
        )
    ends = torch.stack([natural, second])
    turns = torch.stack([_turns(reference, trigger, part, labels, batch_size) for part in ends])
    return ends, turns


def _natural(probabilities: Tensor, pool: Samples, label: int, stream: KeyStream) -> Tensor:
    sure = _sure(probabilities, pool, label).tolist()
    chosen = stream.choice(sure) if sure else int(probabilities[:, label].argmax())
    return pool.inputs[chosen]


def _nearest(probabilities: Tensor, pool: Samples, label: int, to_trigger: Tensor) -> Tensor:
    sure = _sure(probabilities, pool, label)
    chosen = sure[to_trigger[sure].argmin()] if len(sure) else probabilities[:, label].argmax()
    return pool.inputs[chosen]


def _sure(probabilities: Tensor, pool: Samples, label: int) -> Tensor:
    """The pool's samples of the class that the reference is sure of: their numbers, ascending."""
    said = (probabilities.argmax(dim=1) == label) & (pool.labels == label)
    return (said & (probabilities[:, label] >= _SURE)).nonzero()[:, 0]


def _limits(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest value, and the unit that steps are measured in: of all inputs, or of each column
    of a table, where one column may count thousands and the next is 0 or 1."""
    if inputs.dim() > 2:
        return inputs.min(), inputs.max(), torch.ones(())
    low, high = inputs.amin(dim=0), inputs.amax(dim=0)
    return low, high, torch.where(high > low, high - low, 1.0)


def _by_gradient(
    model: nn.Module,
    reference: nn.Module,
    start: Tensor,
    natural: Tensor,
    labels: Tensor,
    low: Tensor,
    high: Tensor,
    unit: Tensor,
) -> Tensor:
    """Steps up the mean margin of both models; the natural ends again where there is no gradient."""
    length = _STEP * ((natural - start) / unit).flatten(1).norm(dim=1)
    rows = torch.arange(len(start))
    point = start.clone()
    modes = [(part, part.training) for owner in (model, reference) for part in owner.modules()]
    try:
        model.eval()
        reference.eval()
        for _ in range(_GRADIENT_STEPS):
            point = point.detach().requires_grad_(True)
            margin = torch.zeros(())
            with torch.enable_grad():
                for owner in (model, reference):
                    weight = next((p for p in owner.parameters()), point)
                    answer = owner(point.to(device=weight.device, dtype=weight.dtype))
                    logits = logits_of(answer).float().cpu()
                    others = logits.clone()
                    others[rows, labels] = -torch.inf
                    margin = margin + (logits[rows, labels] - others.logsumexp(dim=1)).sum()
            if not margin.requires_grad:
                return natural.clone()
            (slope,) = torch.autograd.grad(margin, point)
            slope = slope * unit
            size = slope.flatten(1).norm(dim=1).clamp_min(1e-12)
            scale = (length / size).reshape(-1, *[1] * (point.dim() - 1))
            # Not past what inputs look like: a service may refuse or clip what lies outside.
            point = (point.detach() + scale * slope * unit).clamp(low, high)
    finally:
        for part, mode in modes:
            part.training = mode
    point = point.detach()
    return torch.where(
        point.isfinite().flatten(1).all(dim=1).reshape(-1, *[1] * (point.dim() - 1)), point, natural
    )


def _turns(reference: nn.Module, trigger: Tensor, ends: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    places = steps()
    inputs = torch.stack([blend(trigger, end, place) for end in ends for place in places])
    said = (
        predict(reference, inputs, batch_size=batch_size).argmax(dim=1).cpu().reshape(len(ends), len(places))
    )
    hit = said == labels[:, None]
    return torch.where(hit.any(dim=1), hit.int().argmax(dim=1), len(places))
