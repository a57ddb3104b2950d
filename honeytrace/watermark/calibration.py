"""Choosing where and how to mark: the owner's data in, a `Watermark` out. The model is not trained.

    data -> features -> proposals (inputs' part of the key) -> choice by predicted lift and isolation
         -> targets (targets' part of the key) -> offsets and strength within the accuracy budget -> Watermark

Targets are drawn last and change nothing that was chosen before: neither the groups nor their triggers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from honeytrace.ops import Bank
from honeytrace.rule import WatermarkRule, check_integer, check_number
from honeytrace.training import Progress, predict
from honeytrace.watermark.cost import Cost, cost_on
from honeytrace.watermark.groups import MOST_CANDIDATES, TriggerGroup, candidates_of, draw_target
from honeytrace.watermark.head import check_head, features_of_all, find_head, get_head, sizes_of
from honeytrace.watermark.key import KeyStream, SecretKey
from honeytrace.watermark.kinds import Kind, kind_of
from honeytrace.watermark.probes import roads, starts_for
from honeytrace.watermark.proposals import (
    MIXING_POWER,
    NEIGHBOURS,
    Clusters,
    Proposal,
    cluster_proposals,
    composite_proposals,
    offset_for,
)
from honeytrace.watermark.protected import is_protected
from honeytrace.watermark.samples import Samples, gather, look
from honeytrace.watermark.summary import GroupSummary, Summary
from honeytrace.watermark.watermark import PLANES, Watermark

_GRADED_CLUSTER = 300
"""Samples in a graded group's cluster, on average: about as many as its region marks."""

_FLIP_CLUSTER = 75
"""Samples in a flip group's cluster: small, for every one of them costs accuracy, and enough to be
learned."""

_PURE = 0.9
"""A flip group's cluster must be of one class to this mean probability. In mixed regions a copy's answers
vary by themselves, and the target's rank drowns in that."""

_OVERLAP = 0.3
"""Two regions may share this much of the smaller one; beyond that the second would mostly be the first
again."""

_FREE = 1e-3
"""Accuracy the graded mark may cost (share of answers): as good as nothing."""

_FLIP_SLOPE = 1e-3
"""Width of a flip region's edge, as a share of its offset: inside s is 1, outside it is 0."""

_KEPT_BACK = 0.2
"""Share of the data that becomes the trigger pool where none was given."""

_LEAST_OF_GROUP = 80
"""Samples that the data must hold for each group."""


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    key: SecretKey,
    max_accuracy_drop: float = 0.005,
    flips: bool = True,
    graded_groups: int = 8,
    flip_groups: int = 8,
    strength: float = 0.2,
    graded_share: float = 0.02,
    triggers_per_group: int = 16,
    validation: Any = None,
    trigger_data: Any = None,
    reference: nn.Module | Sequence[nn.Module] | None = None,
    head: str | None = None,
    batch_size: int = 512,
    progress: Progress | None = None,
) -> Watermark:
    """Make a watermark for a trained classifier.

    Graded groups mix a little of the target into the answers near them (probability space, no label changes,
    no accuracy lost); flip groups replace the answer in small, compact, isolated regions, for attackers who
    use labels only, as far as the accuracy budget goes.

    Args:
        model: a classifier with an `nn.Linear` (or 1x1 convolution) head and at least 5 classes. Not changed,
            not trained. Its answer may be a tensor, a tuple, or an object with `.logits` (docs/models.md).
        data: the owner's labelled samples: pairs (inputs [B, ...], labels [B]) as a DataLoader gives them,
            single samples (input, label), or one pair of tensors. Images and rows of tables are float32,
            token ids integers [B, T]. Held in memory. Samples the model was not trained on give truer
            figures.
        key: fixes groups, triggers and targets.
        max_accuracy_drop: share of answers whose correctness may be lost; measured on `validation`, and not
            exceeded by what the model's own probabilities expect on `data` either. Default 0.005 (half a
            point).
        flips: whether to spend the budget on flips. Default True.
        graded_groups, flip_groups: how many of each. Default 8 and 8: a claim at 1e-3 stands when a third of
            them fail (10 classes).
        strength: largest weight of a graded target, in (0, 1). Default 0.2; halved until the graded mark
            costs no more than a tenth of a point, nor more than max_accuracy_drop.
        graded_share: share of likely queries that each graded group marks. Default 0.02.
        triggers_per_group: inputs a suspect will be asked in each group. Default 16.
        validation: labelled samples to measure accuracy on, best ones the model was not trained on. Default:
            data.
        trigger_data: labelled samples to make triggers of; nobody should have seen them. Default: a fifth of
            data, drawn by the key, which then serves for nothing else.
        reference: an unmarked model to compare suspects with, best a copy of the model's own answers trained
            by the owner. Or several, the plain copy first: with what removals make of it (`after_removals`)
            among them, copies whose makers pruned or repaired them are told better
            (`honeytrace.ownership.fitted_reference`). Default: the model itself.
        head: name of the head. Default: the last `nn.Linear` or 1x1 convolution that runs.
        batch_size: inputs put to the model at once. Default 512.
        progress: told of every batch and every step.

    Returns:
        The watermark; `print(watermark.summary)` says what was chosen and what it costs.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is out of range, the model has fewer than 5 classes, or the data is too small.

    Source: Neural Honeytrace (arXiv 2501.09328), section 4, for the rule and the bank; graded marks, natural
    clusters and the drawing of targets are this project's (docs/strength.md).
    """
    references = _check_modules(model, reference, key, head)
    for name, number, low, high, above in (
        ("max_accuracy_drop", max_accuracy_drop, 0.0, 1.0, False),
        ("strength", strength, 0.0, 1.0, True),
        ("graded_share", graded_share, 0.0, 0.5, True),
    ):
        check_number(name, number, low, math.nextafter(high, 0), above=above)
    for name, count in (
        ("graded_groups", graded_groups),
        ("flip_groups", flip_groups),
        ("triggers_per_group", triggers_per_group),
        ("batch_size", batch_size),
    ):
        check_integer(name, count, 1, 2**31 - 1)
    if not isinstance(flips, bool):
        raise TypeError(f"flips must be True or False, got {type(flips).__name__}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable, got {type(progress).__name__}")
    inputs, labels = gather(data, "data")
    name = _head_of(model, head, inputs[:2])
    classes = sizes_of(get_head(model, name))[1]
    if classes < 5:
        raise ValueError(
            f"model must have at least 5 classes, so that 3 are left to draw a target from, got {classes}"
        )
    groups = graded_groups + (flip_groups if flips else 0)
    usable = 1 - _KEPT_BACK if trigger_data is None else 1  # of the data, not kept for triggers
    least = math.ceil(_LEAST_OF_GROUP * groups / usable)
    if len(inputs) < least:
        fitting = int(len(inputs) * usable) // _LEAST_OF_GROUP
        raise ValueError(
            f"data must hold at least {least} samples for {groups} groups, {_LEAST_OF_GROUP} for each"
            f"{' besides those kept back for triggers' if trigger_data is None else ''}, got {len(inputs)}: "
            f"give more, or ask for at most {fitting} groups by graded_groups and flip_groups"
        )
    owner = look(
        model, name, inputs, labels, batch_size=batch_size, progress=progress, text="reading the data"
    )
    chooser = key.stream("inputs")
    if trigger_data is None:
        order = torch.tensor(chooser.permutation(len(owner)))
        kept_back = max(1, int(_KEPT_BACK * len(owner)))
        pool, owner = owner[order[:kept_back]], owner[order[kept_back:].sort().values]
    else:
        pool = look(
            model, name, *gather(trigger_data, "trigger_data"), batch_size=batch_size, progress=progress
        )
    if len(pool) < triggers_per_group:
        raise ValueError(
            f"trigger_data must hold at least {triggers_per_group} samples, one for each trigger of a group, "
            f"got {len(pool)}"
        )
    # Banks are made of one half, and the other stands for queries to come: see cluster_proposals.
    halves = torch.tensor(chooser.permutation(len(owner)))
    likely, owner = owner[halves[: len(owner) // 2]], owner[halves[len(owner) // 2 :]]
    checked = likely
    if validation is not None:
        checked = look(
            model, name, *gather(validation, "validation"), batch_size=batch_size, progress=progress
        )

    def embed(batch: Tensor) -> Tensor:
        return features_of_all(model, name, batch, batch_size=batch_size)[0].cpu()

    kind = kind_of(inputs)
    report = progress if progress is not None else _silent
    report(0, 4, "choosing graded groups")
    graded = _graded(
        owner, likely, chooser, pool, graded_groups, graded_share, triggers_per_group, embed, kind
    )
    report(1, 4, "choosing flip groups")
    flipped = (
        _flips(owner, likely, chooser, pool, flip_groups, triggers_per_group, embed, kind) if flips else []
    )
    proposals = [*graded, *flipped]

    # Further starts of roads draw from streams of their own: whatever else the key chooses, the first start's
    # ends among it, does not depend on how many there are.
    starts = starts_for(inputs[0], len(proposals), min(classes - 2, MOST_CANDIDATES))
    choosers = [chooser, *(key.stream(f"inputs/start {start}") for start in range(1, starts))]
    known = predict(references[0], pool.inputs, batch_size=batch_size).float().softmax(dim=1).cpu()
    parts = _Parts(
        likely=likely,
        class_logits=class_logits(owner),
        planes=centred_planes(key, owner.features),
        groups=tuple(
            _group(key, proposal, model, references, pool, known, choosers, batch_size, kind)
            for proposal in proposals
        ),
        proposals=tuple(proposals),
        head=name,
        key=key,
    )
    report(2, 4, "fitting the graded mark")
    strength = _fit_strength(parts, checked, strength, min(_FREE, max_accuracy_drop))
    report(3, 4, "fitting the flips")
    share = _fit_flips(parts, checked, strength, max_accuracy_drop) if flipped else 0.0
    watermark = parts.build(strength, share)
    watermark.summary = _summarise(parts, checked, watermark, strength, share, max_accuracy_drop)
    report(4, 4, "done")
    # Flip groups that bend nothing would take their questions and half of alpha all the same.
    return watermark if share > 0 or not flipped else watermark.without_flips()


@dataclass(frozen=True)
class _Parts:
    """All that is fixed before strength and flip share are fitted."""

    likely: Samples
    class_logits: Tensor
    planes: Tensor
    groups: tuple[TriggerGroup, ...]
    proposals: tuple[Proposal, ...]
    head: str
    key: SecretKey

    def build(self, strength: float, flip_share: float) -> Watermark:
        """The watermark with this strength, flipping this share of likely queries in each flip group (0:
        none)."""
        offsets, scales = [], []
        for proposal in self.proposals:
            if proposal.mark == "graded":
                offsets.append(proposal.offset)
                scales.append(proposal.offset * (1 + 1e-6))  # s < 1 everywhere: a graded group never flips
            else:
                radius = offset_for(proposal.distances, flip_share) if flip_share > 0 else 0.0
                edge = max(radius, 1e-6) * _FLIP_SLOPE
                offsets.append(radius + edge if flip_share > 0 else -1.0)
                scales.append(edge)
        rule = WatermarkRule(
            offset=tuple(offsets),
            scale=tuple(scales),
            space="probabilities",
            strength=strength,
            mixing_power=MIXING_POWER,
            flip_bins=1 if flip_share > 0 else 0,
            k=NEIGHBOURS,
        )
        return Watermark(
            rule=rule,
            bank=Bank(torch.stack([proposal.rows for proposal in self.proposals])),
            target_logits=self.class_logits[[group.target for group in self.groups]],
            class_logits=self.class_logits,
            planes=self.planes,
            seed=self.key.seed("flips"),
            groups=self.groups,
            head=self.head,
            key_identifier=self.key.identifier,
            summary=Summary.empty(),
        )


def class_logits(samples: Samples) -> Tensor:
    """[C, C] float32: the mean logits of each class's correctly classified samples; row c is a target's
    answer.

    A class the model never gets right on the data has no such samples; the mean over all samples it gives the
    class, or else a plain one-hot row of the data's own logit range, stands in.
    """
    rows = []
    low, high = samples.logits.amin(dim=1).mean(), samples.logits.amax(dim=1).mean()
    for label in range(samples.num_classes):
        said = samples.predicted == label
        right = said & (samples.labels == label)
        chosen = right if right.any() else said
        if chosen.any():
            rows.append(samples.logits[chosen].mean(dim=0))
        else:
            row = low.repeat(samples.num_classes)
            row[label] = high
            rows.append(row)
    return torch.stack(rows)


def centred_planes(key: SecretKey, features: Tensor) -> Tensor:
    """[16, D] float32: keyed sign planes, made orthogonal to the mean feature.

    Features behind a ReLU all lie in one corner; planes through the origin would put nearly every query on
    the same side. Orthogonal to the mean, each plane cuts the data in the middle.
    """
    planes = key.stream("planes").signs(PLANES, features.shape[1])
    mean = features.double().mean(dim=0)
    size = float(mean @ mean)
    if size == 0:
        return planes
    wide = planes.double()
    return (wide - torch.outer(wide @ mean, mean) / size).float()


def _graded(
    owner: Samples,
    likely: Samples,
    chooser: KeyStream,
    pool: Samples,
    count: int,
    share: float,
    triggers: int,
    embed: Any,
    kind: Kind,
) -> list[Proposal]:
    """The `count` proposals, of clusters and composites alike, that a copy will show most of."""
    clusters = Clusters.of(
        owner.features, min(max(len(owner) // _GRADED_CLUSTER, 2 * count), 200), chooser.below(2**32)
    )
    drawn = chooser.permutation(len(clusters.centres))[: 3 * count]
    proposals = cluster_proposals(
        owner, likely, clusters, drawn, "graded", share, pool, triggers, embed, kind, chooser
    )
    proposals += composite_proposals(
        owner, likely, chooser, count, "graded", share, pool, triggers, embed, kind
    )
    proposals.sort(key=lambda proposal: -proposal.lift)
    return _apart(proposals, count)


def _flips(
    owner: Samples,
    likely: Samples,
    chooser: KeyStream,
    pool: Samples,
    count: int,
    triggers: int,
    embed: Any,
    kind: Kind,
) -> list[Proposal]:
    """`count` proposals drawn by the key from the most isolated pure clusters."""
    clusters = Clusters.of(
        owner.features, min(max(len(owner) // _FLIP_CLUSTER, 3 * count), 600), chooser.below(2**32)
    )
    probabilities = owner.probabilities
    eligible: list[tuple[float, int]] = []
    usual = len(owner) / len(clusters.centres)
    for cluster in range(len(clusters.centres)):
        own = (clusters.assigned == cluster).nonzero()[:, 0]
        if not 0.25 * usual <= len(own) <= 1.25 * usual:
            continue
        if float(probabilities[own].mean(dim=0).max()) >= _PURE:
            eligible.append((float(clusters.apart[own].median()), cluster))
    eligible.sort(reverse=True)
    # Twice as many as needed, and the key picks: whoever knows the model must not know the groups.
    best = [cluster for _, cluster in eligible[: 2 * count]]
    drawn = [best[i] for i in chooser.permutation(len(best))]
    share = 1 / len(clusters.centres)
    return _apart(
        cluster_proposals(
            owner, likely, clusters, drawn, "flip", share, pool, triggers, embed, kind, chooser
        ),
        count,
    )


def _apart(proposals: list[Proposal], count: int) -> list[Proposal]:
    """The first `count` proposals whose regions do not lie in one another's."""
    kept: list[Proposal] = []
    regions: list[Tensor] = []
    for proposal in proposals:
        region = proposal.distances <= proposal.offset
        smaller = [min(int(region.sum()), int(other.sum())) for other in regions]
        shared = [int((region & other).sum()) for other in regions]
        if all(s <= _OVERLAP * max(1, n) for s, n in zip(shared, smaller, strict=True)):
            kept.append(proposal)
            regions.append(region)
        if len(kept) == count:
            break
    return kept


def _group(
    key: SecretKey,
    proposal: Proposal,
    model: nn.Module,
    references: Sequence[nn.Module],
    pool: Samples,
    known: Tensor,
    choosers: Sequence[KeyStream],
    batch_size: int,
    kind: Kind,
) -> TriggerGroup:
    """With roads from its first triggers, one for each chooser."""
    triggers = proposal.triggers
    answers = [
        predict(reference, triggers, batch_size=batch_size).float().log_softmax(dim=1).cpu()
        for reference in references
    ]
    candidates = candidates_of(proposal.sources, answers[0].shape[1], choosers[0])
    # A group may have fewer triggers than there are choosers.
    laid = [
        roads(model, references[0], trigger, features, candidates, pool, known, chooser, batch_size, kind)
        for trigger, features, chooser in zip(triggers, proposal.trigger_features, choosers, strict=False)
    ]
    return TriggerGroup(
        family=proposal.family,
        mark=proposal.mark,
        sources=proposal.sources,
        candidates=candidates,
        target=draw_target(key, triggers, candidates),
        triggers=triggers,
        reference_log_probs=answers[0] if len(answers) == 1 else torch.stack(answers),
        ends=torch.stack([ends for ends, _ in laid]),
        turns=torch.stack([turns for _, turns in laid]),
    )


def _cost(parts: _Parts, checked: Samples, watermark: Watermark) -> Cost:
    return cost_on(watermark, checked, parts.likely)


def _fit_strength(parts: _Parts, checked: Samples, strength: float, free: float) -> float:
    while _cost(parts, checked, parts.build(strength, 0.0)).drop > free and strength > 1e-3:
        strength /= 2
    return strength


def _fit_flips(parts: _Parts, checked: Samples, strength: float, budget: float) -> float:
    """The largest share of likely queries that each flip group may bend within the budget (bisection)."""
    low, high = 0.0, 4 * budget / max(1, sum(p.mark == "flip" for p in parts.proposals))
    for _ in range(12):
        middle = (low + high) / 2
        if _cost(parts, checked, parts.build(strength, middle)).drop <= budget:
            low = middle
        else:
            high = middle
    # Fewer than two likely queries in each region: nothing that anybody could learn.
    return low if low * len(parts.likely) >= 2 else 0.0


def _summarise(
    parts: _Parts, checked: Samples, watermark: Watermark, strength: float, share: float, budget: float
) -> Summary:
    graded = _cost(parts, checked, parts.build(strength, 0.0))
    whole = _cost(parts, checked, watermark)
    return Summary(
        budget=budget,
        accuracy=whole.accuracy,
        accuracy_graded=graded.accuracy_marked,
        accuracy_marked=whole.accuracy_marked,
        expected_drop=whole.expected_drop,
        strength=strength,
        bent=whole.bent,
        flipped=whole.flipped,
        measured_on=len(checked),
        groups=tuple(
            GroupSummary(
                family=proposal.family,
                mark=proposal.mark,
                share=share
                if proposal.mark == "flip"
                else float((proposal.distances <= proposal.offset).float().mean()),
                lift=proposal.lift,
                isolation=proposal.isolation,
                candidates=len(group.candidates),
                triggers=len(group.triggers),
            )
            for proposal, group in zip(parts.proposals, parts.groups, strict=True)
        ),
    )


def _silent(done: int, total: int, text: str) -> None:
    pass


def _check_modules(model: Any, reference: Any, key: Any, head: Any) -> list[nn.Module]:
    """Raise for what is no bare model, no key or no name; gives the references, the model itself for none."""
    several = isinstance(reference, (list, tuple))
    references = [model] if reference is None else list(reference) if several else [reference]
    if not references:
        raise ValueError("reference must be a model or at least one of them, got an empty list")
    named = [(f"reference[{n}]" if several else "reference", module) for n, module in enumerate(references)]
    for name, module in (("model", model), *named):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be an nn.Module, got {type(module).__name__}")
        if is_protected(module):
            raise ValueError(f"{name} must be a bare model, got a protected one")
    if not isinstance(key, SecretKey):
        raise TypeError(f"key must be a SecretKey, got {type(key).__name__}")
    if head is not None and not isinstance(head, str):
        raise TypeError(f"head must be a str, the name of a module, got {type(head).__name__}")
    return references


def _head_of(model: nn.Module, head: str | None, inputs: Tensor) -> str:
    try:
        if head is None:
            return find_head(model, inputs)
        check_head(model, head, inputs)
    except (RuntimeError, TypeError, IndexError) as error:
        if not inputs.is_floating_point():
            raise TypeError(
                "model must take token ids, for the inputs in data are integers; make rows of a table "
                f"float32, and wrap a model that takes something else ({error})"
            ) from error
        if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
            raise TypeError(
                "model must take float32 inputs, as a suspect is asked; calibrate it in float32 and move the "
                f"protected model to another dtype, or wrap it ({error})"
            ) from error
        raise
    return head
