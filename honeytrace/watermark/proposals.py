"""Places in feature space where a mark could go, proposed before anyone knows the targets.

Two families. *Clusters*: compact groups of the owner's own samples, found by k-means on the features; their
triggers are further members and small changes of them, and look like any query. *Composites*: two samples of
two classes put together, images by a mask (Neural Honeytrace, arXiv 2501.09328, section 4), other kinds of
input in their own way (kinds.py). What is proposed depends on the model, the owner's data and the key's
stream for inputs, never on the stream for targets: the ownership test is exact because of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from honeytrace.ops import Bank, feature_distance
from honeytrace.watermark.groups import Family, Mark
from honeytrace.watermark.key import KeyStream
from honeytrace.watermark.kinds import Kind
from honeytrace.watermark.samples import Samples

BANK_ROWS = 32
"""Rows of the bank in each group. More rows follow a region's shape more closely and cost time in each
query."""

NEIGHBOURS = 5
"""k of the feature distance: small enough for groups of 32, large enough that no single row decides."""

MIXING_POWER = 0.25
"""Of the graded mark. Similarity falls from 1 at the bank to 0 at the offset, and queries lie near the
offset: a small power gives most of them most of the strength, and still ends at 0 without a step."""

_COMPOSITE_PAIRS = 256
"""Composites tried as triggers of a composite group; the nearest to its bank are kept."""

Embed = Callable[[Tensor], Tensor]
"""Inputs [n, ...] -> features [n, D] of the owner's model."""


@dataclass(frozen=True)
class Proposal:
    """A place for a group: its bank, its sources, its triggers, and how far the owner's samples are from it.

    Attributes:
        family, mark: as in `TriggerGroup`.
        sources: the two classes the owner's model sees most in it, the first one first.
        rows: [M, D], the bank.
        triggers: [n, ...], nearest first.
        trigger_features: [n, D].
        distances: [L], the likely queries to the bank.
        isolation: distance of the second nearest cluster centre over that of its own, the median over the
            members; 0 for composites. High means apart from everything else.
        offset: distance within which the mark works.
        lift: predicted weight that a copy will show at the triggers, see `predicted_lift`.
    """

    family: Family
    mark: Mark
    sources: tuple[int, int]
    rows: Tensor
    triggers: Tensor
    trigger_features: Tensor
    distances: Tensor
    isolation: float
    offset: float
    lift: float


@dataclass(frozen=True)
class Clusters:
    """k-means on the owner's features.

    Attributes:
        centres: [K, D]; assigned: [N] the nearest centre of each sample; apart: [N] second nearest distance
            over nearest.
    """

    centres: Tensor
    assigned: Tensor
    apart: Tensor

    @classmethod
    def of(cls, features: Tensor, count: int, seed: int) -> Clusters:
        """`count` clusters of features [N, D]; `seed` fixes the start (0 <= seed < 2^32)."""
        means = MiniBatchKMeans(count, random_state=seed, batch_size=4096, n_init=1, max_iter=30)
        means.fit(features.numpy())
        centres = torch.from_numpy(means.cluster_centers_).to(features.dtype)
        apart, assigned = [], []
        for block in torch.split(features, 8192):
            nearest = torch.cdist(block, centres).topk(2, dim=1, largest=False)
            assigned.append(nearest.indices[:, 0])
            apart.append(nearest.values[:, 1] / nearest.values[:, 0].clamp_min(1e-12))
        return cls(centres, torch.cat(assigned), torch.cat(apart))


def distances_to(features: Tensor, rows: list[Tensor]) -> Tensor:
    """[N, D] to several banks [M, D] -> [N, number of banks]: the rule's own distance."""
    return feature_distance(features, Bank(torch.stack(rows)), k=NEIGHBOURS)


def cluster_proposals(
    samples: Samples,
    likely: Samples,
    clusters: Clusters,
    chosen: list[int],
    mark: Mark,
    share: float,
    trigger_pool: Samples,
    trigger_count: int,
    embed: Embed,
    kind: Kind,
    stream: KeyStream,
) -> list[Proposal]:
    """A proposal around each of the chosen clusters.

    Args:
        samples: what banks are made of.
        likely: samples that stand for the queries to come; none of them is in a bank. (Offsets read off the
            bank's
            own samples would be too wide: the bank takes a region's core, so what is left of them lies
                outside it.)
        share: of the likely queries, within the offset.
        trigger_pool: samples that triggers may be made of; nothing else may have seen them.
        trigger_count: triggers in each group.
        embed: gives features of changed samples.
        kind: of the inputs; knows small changes of them.
        stream: of the key's part for inputs.
    """
    probabilities = samples.probabilities
    rows, sources, isolation = [], [], []
    for cluster in chosen:
        to_centre = feature_distance(samples.features, clusters.centres[cluster][None], k=1)[:, 0]
        near = to_centre.argsort()[:BANK_ROWS]
        own = (clusters.assigned == cluster).nonzero()[:, 0]
        seen = probabilities[near].mean(dim=0).argsort(descending=True)
        rows.append(samples.features[near])
        sources.append((int(seen[0]), int(seen[1])))
        isolation.append(float(clusters.apart[own].median()))
    if not rows:
        return []
    reached = distances_to(likely.features, rows)
    pool = distances_to(trigger_pool.features, rows)
    proposals = []
    for j in range(len(chosen)):
        nearest = pool[:, j].argsort()[:trigger_count]
        inputs = kind.changed(trigger_pool.inputs[nearest], stream)
        features = embed(inputs)
        order = distances_to(features, [rows[j]])[:, 0].argsort(stable=True)[:trigger_count]
        proposals.append(
            _propose(
                "cluster", mark, sources[j], rows[j], inputs[order], features[order],
                reached[:, j], isolation[j], share, likely,
            )
        )  # fmt: skip
    return proposals


def composite_proposals(
    samples: Samples,
    likely: Samples,
    stream: KeyStream,
    count: int,
    mark: Mark,
    share: float,
    trigger_pool: Samples,
    trigger_count: int,
    embed: Embed,
    kind: Kind,
) -> list[Proposal]:
    """Proposals of `count` source pairs, masks (or other mixtures) and geometries drawn from the key;
    arguments as `cluster_proposals`.

    Pairs of classes that the trigger pool or the data has no sample of are left out.
    """
    present = sorted(set(samples.labels.tolist()) & set(trigger_pool.labels.tolist()))
    if len(present) < 2:
        return []
    drawn, rows, triggers, features = [], [], [], []
    for _ in range(count):
        first = stream.choice(present)
        second = stream.choice([c for c in present if c != first])
        mix = kind.mixture(stream, tuple(samples.inputs.shape[1:]), samples.inputs[samples.labels == second])
        bank_inputs = _composites(samples, first, second, mix, BANK_ROWS, stream)
        trigger_inputs = _composites(trigger_pool, first, second, mix, _COMPOSITE_PAIRS, stream)
        drawn.append((first, second))
        rows.append(embed(bank_inputs))
        triggers.append(trigger_inputs)
        features.append(embed(trigger_inputs))
    reached = distances_to(likely.features, rows)
    proposals = []
    for j, sources in enumerate(drawn):
        order = distances_to(features[j], [rows[j]])[:, 0].argsort(stable=True)[:trigger_count]
        proposals.append(
            _propose(
                "composite", mark, sources, rows[j], triggers[j][order], features[j][order],
                reached[:, j], 0.0, share, likely,
            )
        )  # fmt: skip
    return proposals


def similarity_of(distances: Tensor, offset: float, mark: Mark) -> Tensor:
    """Weight of the target, in units of the strength (graded) or whether the answer is flipped: [N] in [0,
    1]."""
    if mark == "flip":
        return (distances <= offset).float()
    return ((offset - distances) / offset).clamp(0, 1) ** MIXING_POWER


def _propose(
    family: Family,
    mark: Mark,
    sources: tuple[int, int],
    rows: Tensor,
    triggers: Tensor,
    trigger_features: Tensor,
    distances: Tensor,
    isolation: float,
    share: float,
    likely: Samples,
) -> Proposal:
    offset = offset_for(distances, share)
    lift = predicted_lift(likely.features, similarity_of(distances, offset, mark), trigger_features)
    return Proposal(
        family, mark, sources, rows, triggers, trigger_features, distances, isolation, offset, lift
    )


def offset_for(distances: Tensor, share: float) -> float:
    """The distance within which `share` of the likely queries lie."""
    rank = min(len(distances), max(1, math.ceil(share * len(distances))))
    return max(float(distances.kthvalue(rank).values), 1e-6)


def predicted_lift(
    features: Tensor, similarity: Tensor, trigger_features: Tensor, neighbours: int = 20
) -> float:
    """How much of the mark a copy can be expected to show at the triggers: in [0, 1].

    A copy knows the answers to its queries. So: the mean weight at the 20 likely queries nearest to each
    trigger (a nearest-neighbour regression of the mark, read at the triggers).
    Composites far from all data have near neighbours that are hardly marked, and are learned badly.
    """
    nearest = torch.cdist(trigger_features, features, p=1).topk(min(neighbours, len(features)), largest=False)
    return float(similarity[nearest.indices].mean())


def _composites(
    samples: Samples,
    first: int,
    second: int,
    mix: Callable[[Tensor, Tensor], Tensor],
    count: int,
    stream: KeyStream,
) -> Tensor:
    """`count` composites of random samples of the two classes (with repetition where there are few)."""

    def pick(label: int) -> Tensor:
        own = (samples.labels == label).nonzero()[:, 0]
        chosen = torch.tensor([int(own[stream.below(len(own))]) for _ in range(count)])
        return samples.inputs[chosen]

    return mix(pick(first), pick(second))
