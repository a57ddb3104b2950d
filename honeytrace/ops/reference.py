"""Every op in plain torch: the oracle of all backends, and the backend that is always there.

Same names and signatures as `honeytrace.ops`. Takes float64 besides the dtypes of the ops, and everything is
differentiable by ordinary autograd. Memory is bounded: work proceeds in blocks of queries and bank rows.

Two habits make the results equal bit by bit for a query alone, in any batch and at any thread count:
- Sums over features and classes follow a fixed tree of elementwise additions (`_tree_sum`), never
  `Tensor.sum` or a matrix product, whose order of addition depends on shape, threads and device.
- Of torch's elementwise functions only those are used that give the same bits at every position of a tensor.
  `pow`, `sigmoid` and `logaddexp` do not on CPU (vector lanes and the scalar tail run different code), `exp`,
  `log` and `log1p` do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from honeytrace.ops.bank import Bank
from honeytrace.ops.checks import (
    REFERENCE_DTYPES,
    check_device,
    check_finite,
    check_k,
    check_not_empty,
    check_seed,
    check_size,
    check_tensor,
    unsigned_seed,
)
from honeytrace.rule import WatermarkRule, check_integer, check_metric, check_rule

if TYPE_CHECKING:
    from collections.abc import Iterator

P = ParamSpec("P")
T = TypeVar("T")

_BLOCK = 1 << 20  # elements of the largest temporary: 4 MiB in float32, about a core's share of cache


class WatermarkOutput(NamedTuple):
    """What `watermark` returns.

    logits [B, C] in the dtype given; similarity [B, G] float32, clipped, before confidence shaping; group [B]
    int64; flipped [B] bool.
    """

    logits: Tensor
    similarity: Tensor
    group: Tensor
    flipped: Tensor


def _without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    # An ambient autocast would run parts of the formulas in half precision.
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        device_type = next((value.device.type for value in args if isinstance(value, Tensor)), "none")
        if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
            return function(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return wrapper


# ------------------------------------------------------------------------------------------------------------
# Sums, powers and logarithms with the same bits everywhere


def _tree_sum(x: Tensor) -> Tensor:
    """Sum over dimension 0 in a fixed order. Takes `x` over: it is overwritten where autograd allows it."""
    while (n := x.shape[0]) > 1:
        half = n // 2
        if x.requires_grad:
            x = torch.cat([x[:half] + x[n - half :], x[half : n - half]])
        else:
            x[:half] += x[n - half :]
            x = x[: n - half]
    return x[0]


def _sum_classes(x: Tensor) -> Tensor:
    """Sum [B, C] over classes -> [B]."""
    return _tree_sum(
        x.t().contiguous() if x.requires_grad else x.t().clone(memory_format=torch.contiguous_format)
    )


def _log_sum_exp(x: Tensor) -> Tensor:
    """log(sum(exp(x))) over the classes of [B, C] -> [B]; finite for finite x."""
    top = x.detach().amax(dim=1)
    return top + torch.log(_sum_classes(torch.exp(x - top[:, None])))


def _log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)); -inf is fine in either."""
    top = torch.maximum(a, b)
    gap = torch.where(torch.isfinite(top), torch.abs(a - b), math.inf)  # inf - inf is NaN
    return top + torch.log1p(torch.exp(-gap))


def _exact_power(base: Tensor, exponent: float) -> Tensor:
    """base ** exponent for base in [0, 1], to the last bit as the compiled core has it; derivative 0 at 0.

    Products and the square root for small exponents, the C library's pow for the rest. Flips compare
    floor(s ** flip_power * flip_bins) with a uniform number, so the last bit counts. torch calls the C
    library for a tensor of exponents beside an input that is not contiguous; otherwise it takes its own
    vectorised pow, whose last bit depends on the position in the tensor.
    """
    if exponent == 0.5:
        return _root(base)
    if exponent in (1.0, 2.0, 3.0):
        return _power(base, exponent)
    positive = base > 0
    pairs = torch.where(positive, base, 1.0).unsqueeze(-1).expand(*base.shape, 2).contiguous()
    exponents = torch.full_like(pairs, exponent)
    return torch.where(positive, torch.pow(pairs[..., 0], exponents[..., 0]), 0.0)


def _power(base: Tensor, exponent: float) -> Tensor:
    """base ** exponent for base >= 0, with derivative 0 where base is 0; by products for small integers."""
    if exponent == int(exponent) and exponent <= 16:
        result, square, n = None, base, int(exponent)
        while True:
            if n & 1:
                result = square if result is None else result * square
            n >>= 1
            if n == 0:
                return base if result is None else result
            square = square * square
    positive = base > 0
    return torch.where(positive, torch.exp(exponent * torch.log(torch.where(positive, base, 1.0))), 0.0)


def _root(x: Tensor) -> Tensor:
    """Square root with derivative 0 at 0."""
    positive = x > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, x, 1.0)), 0.0)


# ------------------------------------------------------------------------------------------------------------
# Feature distance


def _unit(x: Tensor) -> Tensor:
    """x / |x| along the last dimension, 0 where the norm is 0. The norm is accumulated in float64."""
    wide = x.double()
    norm = _root(_tree_sum(torch.movedim(wide * wide, -1, 0).contiguous()))[..., None]
    return torch.where(norm > 0, wide / torch.where(norm > 0, norm, 1.0), 0.0).to(x.dtype)


def _pair_distance(q: Tensor, b: Tensor, metric: str, p: float) -> Tensor:
    """Distance along dimension 0 (features) of two broadcastable tensors; cosine takes unit vectors."""
    n = q.shape[0]
    difference = q - b
    if metric == "l1" or (metric == "lp" and p == 1):
        return _tree_sum(difference.abs()) / n
    if metric == "cosine":
        # 1 - u.v loses everything for near rows; |u - v|^2 / 2 is the same number without the cancellation. A
        # vector of norm 0 has no direction: its unit vector is all 0, and the distance is 1 by definition.
        zero = ~((q != 0).any(dim=0) & (b != 0).any(dim=0))
        return torch.where(zero, 1.0, 0.5 * _tree_sum(difference * difference))
    # l2 and lp: taken relative to the largest difference, so that no power under- or overflows. The largest
    # difference cancels out of the derivative (the norm is homogeneous), so it may be a constant.
    exponent = 2.0 if metric == "l2" else p
    size = difference.abs()
    top = size.detach().amax(dim=0)
    usable = (top > 0) & torch.isfinite(top)
    relative = torch.where(usable, size / torch.where(usable, top, 1.0), 0.0)
    mean = torch.where(usable, _tree_sum(_power(relative, exponent)) / n, 1.0)
    root = torch.sqrt(mean) if exponent == 2 else torch.exp(torch.log(mean) / exponent)
    return torch.where(usable, top * root, top)


def _mean_ascending(values: Tensor) -> Tensor:
    """Mean over the last dimension, added from first to last."""
    total = values[..., 0]
    for i in range(1, values.shape[-1]):
        total = total + values[..., i]
    return total / values.shape[-1]


def _blocks(size: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, width))
    for start in range(0, size, step):
        yield slice(start, min(size, start + step))


def _select(q: Tensor, b: Tensor, k: int, metric: str, p: float) -> tuple[Tensor, Tensor]:
    """The k smallest distances of queries [B, D] to rows [M, D] and their rows, [B, k] each."""
    features = b.shape[1]
    columns = b.t().contiguous()
    distances, indices = [], []
    for block in _blocks(len(q), min(len(b), max(1, _BLOCK // features)) * features):
        queries = q[block].t().contiguous()[:, :, None]
        parts = [
            _pair_distance(queries, columns[:, None, rows], metric, p)
            for rows in _blocks(len(b), features * queries.shape[1])
        ]
        row_distances = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        near, index = torch.sort(row_distances, dim=1, stable=True)
        distances.append(near[:, :k])
        indices.append(index[:, :k])
    if not distances:
        return q.new_empty((0, k)), torch.empty((0, k), dtype=torch.int64, device=q.device)
    return torch.cat(distances), torch.cat(indices)


def nearest(features: Tensor, rows: Tensor, *, k: int, metric: str, p: float) -> tuple[Tensor, Tensor]:
    """Mean distance to the k nearest rows, and which they are.

    Args:
        features: [B, D] float32 or float64.
        rows: [G, M, D] of the same dtype.
        k, metric, p: as `feature_distance`; p is 1.0 where the metric has none.

    Returns:
        distance [B, G] in the dtype given, +inf for queries that are not finite, and indices [B, G, k] int64,
        sorted by (distance, index), 0..k-1 for queries that are not finite.
    """
    finite = torch.isfinite(features).all(dim=1)
    clean = torch.where(finite[:, None], features, 0.0)
    if metric == "cosine":
        clean, rows = _unit(clean), _unit(rows)
    with torch.no_grad():
        found = [_select(clean.detach(), group.detach(), k, metric, p) for group in rows]
        indices = torch.stack([index for _, index in found], dim=1)
        indices = torch.where(finite[:, None, None], indices, torch.arange(k, device=indices.device))
        near = torch.stack([distance for distance, _ in found], dim=1)
    if torch.is_grad_enabled() and (features.requires_grad or rows.requires_grad):
        # Which rows are nearest has no derivative; their distances have. Computed again for these rows alone,
        # by the same function on the same values, they keep the same bits.
        group = torch.arange(len(rows), device=rows.device)[None, :, None]
        chosen = rows[group, indices]
        near = _pair_distance(clean.t()[:, :, None, None], torch.movedim(chosen, -1, 0), metric, p)
    distance = torch.where(finite[:, None], _mean_ascending(near), math.inf)
    return distance, indices


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _bank_rows(bank: Bank | Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(bank, Bank):
        return bank.rows.to(dtype)
    if isinstance(bank, Tensor) and bank.dim() == 2:
        bank = bank[None]
    check_tensor("bank", bank, 3, "[G, M, D] or [M, D]", REFERENCE_DTYPES)
    check_not_empty("bank", bank, 0, "[G, M, D] or [M, D]")
    check_finite("bank", bank)
    return bank.to(dtype)


@_without_autocast
def feature_distance(
    features: Tensor, bank: Bank | Tensor, *, k: int = 10, metric: str = "l1", p: float | None = None
) -> Tensor:
    """Mean of the k smallest distances of each query to the rows of each group.

    Args:
        features: [B, D] float32, float16, bfloat16 or float64.
        bank: [G, M, D] or [M, D] (then G = 1), or a `Bank`.
        k: number of nearest rows, 1 <= k <= M. Default 10.
        metric: "l1" sum|q-b|/D (default), "l2" sqrt(sum(q-b)^2/D), "lp" (sum|q-b|^p/D)^(1/p), "cosine"
            1-q.b/(|q||b|).
        p: exponent of "lp", finite, >= 1.

    Returns:
        [B, G] float32, float64 for float64 features; +inf for queries with a NaN or infinite feature.

    Raises:
        TypeError, ValueError: as `honeytrace.ops.feature_distance`.

    Source: Neural Honeytrace (arXiv 2501.09328), section 4; the mean of k nearest as in its published code.
    """
    check_tensor("features", features, 2, "[B, D]", REFERENCE_DTYPES)
    q = _wide(features)
    rows = _bank_rows(bank, q.dtype)
    check_size("features", features, 1, "D", rows.shape[2], "bank")
    check_device("bank", rows, features.device, "features")
    _, exponent = check_metric(metric, p)
    check_k(check_integer("k", k, 1, 2**31 - 1), rows.shape[1])
    return nearest(q, rows, k=k, metric=metric, p=exponent)[0]


# ------------------------------------------------------------------------------------------------------------
# Sign hash and Philox


@_without_autocast
def sign_hash(features: Tensor, planes: Tensor) -> Tensor:
    """Bit j of the bucket says on which side of plane j a query lies: dot(q, plane_j) >= 0.

    Args:
        features: [B, D] float32, float16, bfloat16 or float64.
        planes: [P, D], 1 <= P <= 64.

    Returns:
        [B] int64; 0 for queries with a NaN or infinite feature.

    Source: Charikar, "Similarity estimation techniques from rounding algorithms" (STOC 2002).
    """
    check_tensor("features", features, 2, "[B, D]", REFERENCE_DTYPES)
    check_tensor("planes", planes, 2, "[P, D]", REFERENCE_DTYPES)
    check_planes(features, planes)
    q, normals = _wide(features.detach()), planes.detach()
    normals = normals.to(q.dtype)
    columns = normals.t().contiguous()[:, None, :]
    shifts = torch.arange(len(normals), device=q.device)
    buckets = [torch.empty(0, dtype=torch.int64, device=q.device)]
    for block in _blocks(len(q), normals.numel()):
        side = _tree_sum(q[block].t().contiguous()[:, :, None] * columns) >= 0
        bucket = (side.to(torch.int64) << shifts).sum(dim=1)
        buckets.append(torch.where(torch.isfinite(q[block]).all(dim=1), bucket, 0))
    return torch.cat(buckets)


def check_planes(features: Tensor, planes: Tensor) -> None:
    """The checks of `planes` that go beyond type and number of dimensions."""
    if not 1 <= planes.shape[0] <= 64:
        raise ValueError(f"planes must have between 1 and 64 rows, got shape {list(planes.shape)}")
    check_size("planes", planes, 1, "D", features.shape[1], "features")
    check_device("planes", planes, features.device, "features")
    check_finite("planes", planes)


_WORD = 0xFFFF_FFFF


def _multiply_words(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a * b for 32-bit unsigned words in int64, where the product may not fit."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32_10(
    counter: Sequence[int | Tensor], key: Sequence[int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 with 10 rounds, a counter-based random generator.

    Args:
        counter: four 32-bit words, each an int or an int64 tensor; tensors broadcast.
        key: two 32-bit words of the same kind.

    Returns:
        four int64 tensors of words in [0, 2^32).

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 4.3.
    """
    if len(counter) != 4 or len(key) != 2:
        raise ValueError(f"counter must have 4 words and key 2, got {len(counter)} and {len(key)}")
    inputs = (*counter, *key)
    device = next((word.device for word in inputs if isinstance(word, Tensor)), torch.device("cpu"))
    words = [torch.as_tensor(word, dtype=torch.int64, device=device) & _WORD for word in inputs]
    c0, c1, c2, c3, k0, k1 = words
    for _ in range(10):
        high0, low0 = _multiply_words(0xD2511F53, c0)
        high1, low1 = _multiply_words(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


# ------------------------------------------------------------------------------------------------------------
# Similarity, mixing, flips


def confidence(logits: Tensor) -> Tensor:
    """max softmax of [B, C] -> [B], NaN for rows with a logit that is not finite."""
    z = _wide(logits)
    top = z.amax(dim=1, keepdim=True)
    return 1.0 / _sum_classes(torch.exp(z - top))


def similarity(distance: Tensor, logits: Tensor, *, rule: WatermarkRule) -> Tensor:
    """s = clip((offset_g - d - confidence_weight * c) / scale_g, 0, 1), with c = max softmax(logits).

    Args:
        distance: [B, G] float32 or float64, +inf for queries without a distance.
        logits: [B, C].
        rule: offsets, scales and confidence weight.

    Returns:
        [B, G] in the distance's dtype: clipped, before confidence shaping; 0 for queries whose distance or
        logits are not finite. The derivative is 0 outside the open interval (0, 1).
    """
    check_tensor("distance", distance, 2, "[B, G]", REFERENCE_DTYPES)
    check_tensor("logits", logits, 2, "[B, C]", REFERENCE_DTYPES)
    check_size("logits", logits, 0, "B", distance.shape[0], "distance")
    rule.check_groups(distance.shape[1])
    offset, scale = (distance.new_tensor(values) for values in (rule.offsets, rule.scales))
    usable = torch.isfinite(logits).all(dim=1, keepdim=True) & torch.isfinite(distance)
    margin = offset - torch.where(usable, distance, 0.0)
    if rule.confidence_weight > 0:
        clean = torch.where(torch.isfinite(logits).all(dim=1, keepdim=True), logits, 0.0)
        margin = margin - rule.confidence_weight * confidence(clean).to(distance.dtype)[:, None]
    raw = margin / scale
    inside = usable & (raw > 0) & (raw < 1)
    return torch.where(inside, raw, torch.where(usable & (raw >= 1), 1.0, 0.0).to(raw.dtype))


def shape_similarity(similarity: Tensor, confidence: Tensor, *, rule: WatermarkRule) -> Tensor:
    """Confidence shaping: s ^ low_power where c < low_confidence, ^ high_power where c > high_confidence.

    Args:
        similarity: [B, G] or [B], in [0, 1].
        confidence: [B].
        rule: the two thresholds and powers.

    Returns:
        float64 of similarity's shape. Computed in float64, since flips depend on it to the last bit.
    """
    s, c = similarity.double(), confidence.detach().double()
    if s.dim() == 2:
        c = c[:, None]
    s = torch.where(c < rule.low_confidence, _exact_power(s, rule.low_power), s)
    return torch.where(c > rule.high_confidence, _exact_power(s, rule.high_power), s)


def flip_probability(shaped: Tensor, *, rule: WatermarkRule) -> Tensor:
    """floor(s ^ flip_power * flip_bins) / flip_bins of a shaped similarity; 0 when flips are off. float64."""
    if rule.flip_bins == 0:
        return torch.zeros_like(shaped, dtype=torch.float64)
    return (
        torch.floor(_exact_power(shaped.detach().double(), rule.flip_power) * rule.flip_bins) / rule.flip_bins
    )


def mix(z: Tensor, target: Tensor, weight: Tensor, *, space: str) -> Tensor:
    """Mix logits z [B, C] and target [B, C] (finite, float32 or float64), weights [B] float64 in [0, 1]."""
    if space == "logits":
        w = weight.to(z.dtype)[:, None]
        return (1 - w) * z + w * target
    # log(0) is -inf, by a constant: its derivative would be infinite, and times 0 that is NaN.
    inner = weight < 1
    log_keep = torch.where(inner, torch.log1p(-torch.where(inner, weight, 0.0)), -math.inf).to(z.dtype)
    inner = weight > 0
    log_take = torch.where(inner, torch.log(torch.where(inner, weight, 1.0)), -math.inf).to(z.dtype)
    taken = target - _log_sum_exp(target)[:, None] + (_log_sum_exp(z) + log_take)[:, None]
    return _log_add_exp(z + log_keep[:, None], taken)


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, kept within its finite range."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


@_without_autocast
def watermark_mix(
    logits: Tensor,
    similarity: Tensor,
    target_logits: Tensor,
    bucket: Tensor,
    *,
    rule: WatermarkRule,
    seed: int,
    flipped: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bend each answer towards the target of its nearest group.

    Args:
        logits: [B, C] float32, float16, bfloat16 or float64.
        similarity: [B, G] clipped similarity before confidence shaping; NaN counts as 0.
        target_logits: [G, C], finite.
        bucket: [B] int64, the sign hash of the features.
        rule: see `WatermarkRule`.
        seed: 64 bits of the secret key, 0 <= seed < 2^64.
        flipped: [B] bool, flips to take instead of drawing them (the reference only, for recorded draws).

    Returns:
        mixed logits [B, C] in the logits' dtype, group [B] int64, flipped [B] bool. Rows whose similarity is
        0 in all groups and rows with a logit that is not finite come back bit for bit, not flipped.
        Differentiable in logits, similarity and target_logits; group, confidence thresholds and flips count
        as constants.
    """
    check_mix(logits, similarity, target_logits, bucket, REFERENCE_DTYPES)
    check_rule(rule)
    signed_seed = check_seed(seed)
    finite = torch.isfinite(logits).all(dim=1)
    z = _wide(torch.where(finite[:, None], logits, 0.0))

    s_all = torch.nan_to_num(_wide(similarity), nan=0.0).clamp(0, 1)
    group = s_all.detach().argmax(dim=1)
    s = s_all.gather(1, group[:, None])[:, 0]
    active = finite & (s > 0)
    group = torch.where(finite, group, 0)
    shaped = shape_similarity(torch.where(active, s, 1.0), confidence(z.detach()), rule=rule)

    if flipped is None:
        flipped = _draw(bucket, group, unsigned_seed(signed_seed)) < flip_probability(shaped, rule=rule)
    flipped = flipped & active

    target = target_logits.to(z.dtype)[group]
    mixed = mix(z, target, rule.strength * _exact_power(shaped, rule.mixing_power), space=rule.space)
    mixed = torch.where(flipped[:, None], target, mixed)
    return torch.where(active[:, None], round_to(mixed, logits.dtype), logits), group, flipped


def _draw(bucket: Tensor, group: Tensor, seed: int) -> Tensor:
    """The uniform number in [0, 1) of each (bucket, group), float64 [B]."""
    word = philox4x32_10((bucket & _WORD, (bucket >> 32) & _WORD, group, 0), (seed & _WORD, seed >> 32))[0]
    return word.double() * 2.0**-32


def check_mix(
    logits: Tensor, similarity: Tensor, target_logits: Tensor, bucket: Tensor, dtypes: frozenset[torch.dtype]
) -> None:
    """The checks of `watermark_mix`'s tensors."""
    check_tensor("logits", logits, 2, "[B, C]", dtypes)
    check_tensor("similarity", similarity, 2, "[B, G]", dtypes)
    check_tensor("bucket", bucket, 1, "[B]", frozenset({torch.int64}))
    check_size("similarity", similarity, 0, "B", logits.shape[0], "logits")
    check_size("bucket", bucket, 0, "B", logits.shape[0], "logits")
    check_device("similarity", similarity, logits.device, "logits")
    check_device("bucket", bucket, logits.device, "logits")
    check_not_empty("logits", logits, 1, "[B, C]")
    check_not_empty("similarity", similarity, 1, "[B, G]")
    check_target_logits(target_logits, logits, similarity.shape[1], "similarity", dtypes)


def check_target_logits(
    target_logits: Tensor, logits: Tensor, groups: int, groups_of: str, dtypes: frozenset[torch.dtype]
) -> None:
    """The checks of `target_logits` [G, C]."""
    check_tensor("target_logits", target_logits, 2, "[G, C]", dtypes)
    check_size("target_logits", target_logits, 0, "G", groups, groups_of)
    check_size("target_logits", target_logits, 1, "C", logits.shape[1], "logits")
    check_device("target_logits", target_logits, logits.device, "logits")
    check_finite("target_logits", target_logits)


@_without_autocast
def watermark(
    features: Tensor,
    logits: Tensor,
    bank: Bank | Tensor,
    target_logits: Tensor,
    planes: Tensor,
    *,
    rule: WatermarkRule,
    seed: int,
) -> WatermarkOutput:
    """Feature distance, similarity, sign hash and mixing in turn.

    Args:
        features: [B, D] and logits [B, C], of float32, float16, bfloat16 or float64, not necessarily of the
            same.
        bank: [G, M, D] or [M, D], or a `Bank`.
        target_logits: [G, C], finite.
        planes: [P, D], 1 <= P <= 64.
        rule: see `WatermarkRule`.
        seed: 64 bits of the secret key.

    Returns:
        `WatermarkOutput`.
    """
    check_rule(rule)
    check_tensor("features", features, 2, "[B, D]", REFERENCE_DTYPES)
    check_tensor("logits", logits, 2, "[B, C]", REFERENCE_DTYPES)
    check_size("logits", logits, 0, "B", features.shape[0], "features")
    check_device("logits", logits, features.device, "features")
    distance = feature_distance(features, bank, k=rule.k, metric=rule.metric, p=rule.p)
    rule.check_groups(distance.shape[1])
    check_target_logits(target_logits, logits, distance.shape[1], "bank", REFERENCE_DTYPES)
    s = similarity(distance, logits, rule=rule)
    mixed, group, flipped = watermark_mix(
        logits, s, target_logits, sign_hash(features, planes), rule=rule, seed=seed
    )
    return WatermarkOutput(mixed, s, group, flipped)


# ------------------------------------------------------------------------------------------------------------
# Compose


@_without_autocast
def compose(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a * (1 - mask) + b * mask: exactly a where the mask is 0, exactly b where it is 1 (even beside NaN).

    Args:
        a, b: of one shape [B, ...] and dtype (float32, float16, bfloat16, float64).
        mask: values in [0, 1], broadcastable to a's shape.

    Returns:
        a's shape and dtype; the sum is formed in float32 (float64 for float64).
    """
    check_compose(a, b, mask, REFERENCE_DTYPES)
    m = _wide(mask).to(_wide(a[:0]).dtype)
    blended = _wide(a) * (1 - m) + _wide(b) * m
    return torch.where(m == 0, a, torch.where(m == 1, b, blended.to(a.dtype)))


def check_compose(a: Tensor, b: Tensor, mask: Tensor, dtypes: frozenset[torch.dtype]) -> None:
    """The checks of `compose`."""
    for name, value in (("a", a), ("b", b), ("mask", mask)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        check_tensor(name, value, value.dim(), "[B, ...]", dtypes)
        check_device(name, value, a.device, "a")
    if b.shape != a.shape:
        raise ValueError(f"b must have a's shape {list(a.shape)}, got {list(b.shape)}")
    if b.dtype != a.dtype:
        raise TypeError(f"b must have a's dtype {a.dtype}, got {b.dtype}")
    excess = mask.dim() - a.dim()
    sizes = zip(reversed(mask.shape), reversed(a.shape), strict=False)
    if excess > 0 or any(m not in (1, n) for m, n in sizes):
        raise ValueError(f"mask must broadcast to a's shape {list(a.shape)}, got {list(mask.shape)}")
