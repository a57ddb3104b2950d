"""`feature_distance`: the k nearest rows of each group, without a distance matrix in memory.

Steps, all on one stream, no synchronisation:

1. `prepare_kernel` reads the queries once: float32, feature-major in panels of 16 as the bank is packed, unit
   vectors for cosine, Euclidean norms, and a flag for those that are finite.
2. One of three selections, each over a part of the bank, leaves its nearest rows as 64-bit keys (distance
   bits above, row below: one integer comparison orders by distance, then row):
   - `nearest_kernel` with a tile of queries and rows on the vector units;
   - the same kernel with FEW, one query at a time and the features cut in slices, for small batches;
   - `candidates_kernel`, l2 and cosine on the tensor cores: the expanded form |q|^2 + |b|^2 - 2 q.b in 3xTF32
     selects by a *lower bound* of the distance.
3. `merge_kernel` joins the parts and averages; after the tensor cores `rescore_kernel` does, which computes
   the candidates' distances directly, proves by the bound that no other row can be nearer, and where it
   cannot prove it goes through the whole bank.

So each path gives the same bits: a pair's distance is summed in slices of 64 features, each from its first to
its last feature, and the slices from first to last, everywhere.

What is not ordinary (sums that overflow or lose terms below the smallest number, norms beyond float32) is
recomputed relative to the largest difference, for a tile at a time, by a branch that ordinary data never
take.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .configs import FEW_QUERIES, RESCORE, Config, bank_splits, distance_config, size_class
from .language import INTERPRETED, OPTIONS, cdiv, jit, jit_unspecialized, power_of_two, tl
from .numerics import half_power, is_finite, power

L1, L2, LP, COSINE = 0, 1, 2, 3
"""Codes of the metrics, as in `honeytrace.rule.METRICS`."""

LANES = 16
"""Rows of a panel: element d of row m lies at ((m // 16) * D + d) * 16 + m % 16 (ops/bank.py lays it out)."""

SLICE = 64
"""Features that are summed in one go before their sum joins the total."""

LARGEST_K = 64
"""Neighbours that one pass can keep. A larger k takes ceil(k / 64) passes, each past the last key of the one
before."""

LARGEST_DOT_K = 42
"""The tensor-core path keeps half as many candidates again as neighbours, 64 at most."""

MERGED_KEYS = 2048
"""Keys that one program of the second pass takes: parts of the bank times keys of a part."""

_L1: tl.constexpr = tl.constexpr(0)
_L2: tl.constexpr = tl.constexpr(1)
_LP: tl.constexpr = tl.constexpr(2)
_COSINE: tl.constexpr = tl.constexpr(3)
_SLICE: tl.constexpr = tl.constexpr(64)
_SLICES: tl.constexpr = tl.constexpr(8)
_LANES: tl.constexpr = tl.constexpr(16)
_NO_KEY: tl.constexpr = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_SMALLEST_SUM: tl.constexpr = tl.constexpr(2.0**-90)
_LARGEST_NORM: tl.constexpr = tl.constexpr(2.0**60)
_SMALLEST_NORM: tl.constexpr = tl.constexpr(2.0**-60)


# ------------------------------------------------------------------------------------------------------------
# Queries


@jit_unspecialized("batch")
def prepare_kernel(
    features_ptr: tl.tensor,
    stride: tl.tensor,
    packed_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    finite_ptr: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One program for each panel of 16 queries. Elements that are not finite become 0, their query is
    flagged."""
    panel = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, _LANES)
    row = panel * _LANES + lane
    valid = row < batch
    source = features_ptr + row[:, None] * stride
    target = packed_ptr + panel * width * _LANES + lane[:, None]
    step = tl.arange(0, BLOCK_D)
    broken = tl.zeros([_LANES], tl.int32)
    squares = tl.zeros([_LANES], tl.float64)
    for start in range(0, width, BLOCK_D):
        d = start + step
        inside = valid[:, None] & (d < width)[None, :]
        x = tl.load(source + d[None, :], mask=inside, other=0.0).to(tl.float32)
        finite = is_finite(x)
        x = tl.where(finite, x, 0.0)
        broken = tl.maximum(broken, tl.max(tl.where(finite, 0, 1), axis=1))
        wide = x.to(tl.float64)
        squares += tl.sum(wide * wide, axis=1)
        if not UNIT:
            tl.store(target + d[None, :] * _LANES, x, mask=(d < width)[None, :])
    norm = tl.sqrt(squares)
    if UNIT:
        safe = tl.where(norm > 0, norm, 1.0)
        for start in range(0, width, BLOCK_D):
            d = start + step
            inside = valid[:, None] & (d < width)[None, :]
            x = tl.load(source + d[None, :], mask=inside, other=0.0).to(tl.float32)
            x = tl.where(is_finite(x), x, 0.0)
            unit = (x.to(tl.float64) / safe[:, None]).to(tl.float32)
            tl.store(target + d[None, :] * _LANES, unit, mask=(d < width)[None, :])
    tl.store(norm_ptr + row, norm.to(tl.float32))
    tl.store(finite_ptr + row, tl.where(broken == 0, 1, 0).to(tl.int8))


# ------------------------------------------------------------------------------------------------------------
# Distances of a tile of pairs: METRIC, and for lp HALVES = 2p where products do, 0 where it takes a logarithm


@jit
def _add(
    difference: tl.tensor, total: tl.tensor, p: tl.tensor, METRIC: tl.constexpr, HALVES: tl.constexpr
) -> tl.tensor:
    if METRIC == _L1:
        total = total + tl.abs(difference)
    elif METRIC == _LP:
        if HALVES > 0:
            total = total + half_power(tl.abs(difference), HALVES)
        else:
            total = total + power(tl.abs(difference), p, 0.0)
    else:
        total = tl.fma(difference, difference, total)
    return total


@jit
def _split_queries(x: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """x [BQ, BM] as four [BQ / 4, BM]: queries 0, 4, 8 .. in the first."""
    apart = tl.permute(tl.reshape(x, [x.shape[0] // 4, 2, 2, x.shape[1]]), [0, 3, 1, 2])
    even, odd = tl.split(apart)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@jit
def _term(
    x: tl.tensor,
    row: tl.tensor,
    top: tl.tensor,
    part: tl.tensor,
    p: tl.tensor,
    METRIC: tl.constexpr,
    HALVES: tl.constexpr,
    RELATIVE: tl.constexpr,
) -> tl.tensor:
    difference = x[:, None] - row
    if RELATIVE:
        difference = tl.div_rn(difference, top)
    return _add(difference, part, p, METRIC, HALVES)


@jit
def _sum_tile(
    q_ptr: tl.tensor,
    b_ptr: tl.tensor,
    width: tl.tensor,
    inverse: tl.tensor,
    top: tl.tensor,
    p: tl.tensor,
    STRIDE: tl.constexpr,
    METRIC: tl.constexpr,
    HALVES: tl.constexpr,
    RELATIVE: tl.constexpr,
    UNROLL: tl.constexpr,
) -> tl.tensor:
    """Sums over features of pairs [BQ, BM]: pointers [BQ, 1] and [1, BM] at feature 0, STRIDE of the rows.

    inverse [1, BM] multiplies the rows (cosine); top [BQ, BM] divides the differences where RELATIVE.
    """
    fours: tl.constexpr = q_ptr.shape[0] // 4
    query = tl.reshape(q_ptr, [fours, 4])
    zero = tl.zeros([fours, b_ptr.shape[1]], tl.float32)
    top0, top1, top2, top3 = zero, zero, zero, zero
    if RELATIVE:
        top0, top1, top2, top3 = _split_queries(top)
    total0, total1, total2, total3 = zero, zero, zero, zero
    for start in range(0, width, _SLICE):
        part0, part1, part2, part3 = zero, zero, zero, zero
        for d in tl.range(start, tl.minimum(start + _SLICE, width), loop_unroll_factor=UNROLL):
            row = tl.load(b_ptr + d * STRIDE)
            if METRIC == _COSINE:
                row = row * inverse
            address = tl.max_contiguous(tl.multiple_of(query + d * _LANES, [16, 16]), [1, 4])
            even, odd = tl.split(tl.reshape(tl.load(address), [fours, 2, 2]))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            part0 = _term(x0, row, top0, part0, p, METRIC, HALVES, RELATIVE)
            part1 = _term(x1, row, top1, part1, p, METRIC, HALVES, RELATIVE)
            part2 = _term(x2, row, top2, part2, p, METRIC, HALVES, RELATIVE)
            part3 = _term(x3, row, top3, part3, p, METRIC, HALVES, RELATIVE)
        total0 = total0 + part0
        total1 = total1 + part1
        total2 = total2 + part2
        total3 = total3 + part3
    joined = tl.join(tl.join(total0, total2), tl.join(total1, total3))  # [fours, BM, 2, 2], the last is q % 2
    return tl.reshape(tl.permute(joined, [0, 2, 3, 1]), [q_ptr.shape[0], b_ptr.shape[1]])


@jit
def _sum_few(
    q_ptr: tl.tensor,
    b_ptr: tl.tensor,
    width: tl.tensor,
    inverse: tl.tensor,
    top: tl.tensor,
    p: tl.tensor,
    STRIDE: tl.constexpr,
    METRIC: tl.constexpr,
    HALVES: tl.constexpr,
    RELATIVE: tl.constexpr,
    UNROLL: tl.constexpr,
) -> tl.tensor:
    """As `_sum_tile` for one query, BQ = 1, with the slices side by side: the same sums in the same order."""
    rows = tl.reshape(b_ptr, [b_ptr.shape[1], 1])
    factor = tl.reshape(inverse, [b_ptr.shape[1], 1])
    divisor = tl.reshape(top, [b_ptr.shape[1], 1])
    query = tl.reshape(q_ptr, [1, 1])
    piece = tl.arange(0, _SLICES)[None, :]
    total = tl.zeros([b_ptr.shape[1]], tl.float32)
    for start in range(0, width, _SLICE * _SLICES):
        part = tl.zeros([b_ptr.shape[1], _SLICES], tl.float32)
        first = start + piece * _SLICE
        # From here on by steps of j: with d in the address, Triton 3.6 fails to compile the rescoring kernel.
        at_first = rows + first * STRIDE
        for j in tl.range(0, tl.minimum(_SLICE, width - start), loop_unroll_factor=UNROLL):
            d = first + j
            inside = d < width
            row = tl.load(at_first + j * STRIDE, mask=inside, other=0.0)
            if METRIC == _COSINE:
                row = row * factor
            difference = tl.load(query + d * _LANES, mask=inside, other=0.0) - row
            if RELATIVE:
                difference = tl.div_rn(difference, divisor)
            part = _add(difference, part, p, METRIC, HALVES)
        for s in tl.static_range(_SLICES):
            # All terms but one are 0, so the order within this sum is nothing; slices join from first to
            # last.
            total = total + tl.sum(tl.where(piece == s, part, 0.0), axis=1)
    return total[None, :]


@jit
def _sum(
    q_ptr: tl.tensor,
    b_ptr: tl.tensor,
    width: tl.tensor,
    inverse: tl.tensor,
    top: tl.tensor,
    p: tl.tensor,
    STRIDE: tl.constexpr,
    METRIC: tl.constexpr,
    HALVES: tl.constexpr,
    RELATIVE: tl.constexpr,
    FEW: tl.constexpr,
    UNROLL: tl.constexpr,
) -> tl.tensor:
    if FEW:
        total = _sum_few(q_ptr, b_ptr, width, inverse, top, p, STRIDE, METRIC, HALVES, RELATIVE, UNROLL)
    else:
        total = _sum_tile(q_ptr, b_ptr, width, inverse, top, p, STRIDE, METRIC, HALVES, RELATIVE, UNROLL)
    return total


@jit
def _root(
    total: tl.tensor, width: tl.tensor, inverse_p: tl.tensor, inverse_p_low: tl.tensor, METRIC: tl.constexpr
) -> tl.tensor:
    """From the sum over features to the distance."""
    if METRIC == _COSINE:
        distance = 0.5 * total
    else:
        mean = tl.div_rn(total, (width * 1.0))
        if METRIC == _L1:
            distance = mean
        elif METRIC == _L2:
            distance = tl.sqrt_rn(mean)
        else:
            distance = power(mean, inverse_p, inverse_p_low)
    return distance


@jit
def _largest_difference(
    q_ptr: tl.tensor, b_ptr: tl.tensor, width: tl.tensor, STRIDE: tl.constexpr
) -> tl.tensor:
    top = tl.zeros([q_ptr.shape[0], b_ptr.shape[1]], tl.float32)
    for d in range(width):
        difference = tl.load(q_ptr + d * _LANES) - tl.load(b_ptr + d * STRIDE)
        top = tl.maximum(top, tl.abs(difference))
    return top


@jit
def _distances(
    q_ptr: tl.tensor,
    b_ptr: tl.tensor,
    q_norm: tl.tensor,
    norm: tl.tensor,
    usable: tl.tensor,
    width: tl.tensor,
    p: tl.tensor,
    inverse_p: tl.tensor,
    inverse_p_low: tl.tensor,
    STRIDE: tl.constexpr,
    METRIC: tl.constexpr,
    HALVES: tl.constexpr,
    FEW: tl.constexpr,
    UNROLL: tl.constexpr,
) -> tl.tensor:
    """Distances [BQ, BM] of the pairs; those not `usable` hold anything.

    q_norm [BQ, 1] and norm [1, BM] are read for cosine only, where the queries are unit vectors, or 0.
    """
    one = tl.full([q_ptr.shape[0], b_ptr.shape[1]], 1.0, tl.float32)
    if METRIC == _COSINE:
        ordinary = (norm > _SMALLEST_NORM) & (norm < _LARGEST_NORM)
        inverse = tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), tl.where(ordinary, norm, 1.0))
        total = _sum(q_ptr, b_ptr, width, inverse, one, p, STRIDE, METRIC, HALVES, False, FEW, UNROLL)
        distance = _root(total, width, inverse_p, inverse_p_low, METRIC)
        strange = usable & (norm > 0) & (ordinary == 0)
        if tl.max(tl.max(strange.to(tl.int32), axis=1), axis=0) > 0:
            largest = tl.zeros([1, b_ptr.shape[1]], tl.float32)
            for d in range(width):
                largest = tl.maximum(largest, tl.abs(tl.load(b_ptr + d * STRIDE)))
            safe = tl.where(largest > 0, largest, 1.0)
            squares = tl.zeros([1, b_ptr.shape[1]], tl.float32)
            for d in range(width):
                relative = tl.div_rn(tl.load(b_ptr + d * STRIDE), safe)
                squares = tl.fma(relative, relative, squares)
            length = tl.sqrt_rn(tl.where(squares > 0, squares, 1.0))
            again = tl.zeros([q_ptr.shape[0], b_ptr.shape[1]], tl.float32)
            for d in range(width):
                unit = tl.div_rn(tl.div_rn(tl.load(b_ptr + d * STRIDE), safe), length)
                difference = tl.load(q_ptr + d * _LANES) - unit
                again = tl.fma(difference, difference, again)
            distance = tl.where(strange, 0.5 * again, distance)
        # A vector of norm 0 has no direction: 1 by definition.
        distance = tl.where((norm == 0) | (q_norm == 0), 1.0, distance)
    else:
        total = _sum(q_ptr, b_ptr, width, one, one, p, STRIDE, METRIC, HALVES, False, FEW, UNROLL)
        distance = _root(total, width, inverse_p, inverse_p_low, METRIC)
        if METRIC != _L1:
            strange = usable & ((total >= _SMALLEST_SUM) & is_finite(total) == 0)
            if tl.max(tl.max(strange.to(tl.int32), axis=1), axis=0) > 0:
                top = _largest_difference(q_ptr, b_ptr, width, STRIDE)
                fit = (top > 0) & is_finite(top)
                safe = tl.where(fit, top, 1.0)
                again = _sum(q_ptr, b_ptr, width, one, safe, p, STRIDE, METRIC, HALVES, True, FEW, UNROLL)
                again = _root(tl.where(fit, again, 1.0), width, inverse_p, inverse_p_low, METRIC)
                distance = tl.where(strange, tl.where(fit, top * again, top), distance)
    return distance


# ------------------------------------------------------------------------------------------------------------
# Keys


@jit
def _key(distance: tl.tensor, row: tl.tensor) -> tl.tensor:
    """Distance (not negative) and row in one int64 that orders by distance, then row."""
    return (distance.to(tl.int32, bitcast=True).to(tl.int64) << 32) | row.to(tl.int64)


@jit
def _distance_of(key: tl.tensor) -> tl.tensor:
    return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def _empty_keys(BLOCK_Q: tl.constexpr, SLOTS: tl.constexpr, k: tl.tensor) -> tl.tensor:
    """Slots [SLOTS, BQ] of `_insert`: all different and beyond any key; those from k on are negative and
    stay."""
    slot = tl.arange(0, SLOTS).to(tl.int64)[:, None] + tl.zeros([1, BLOCK_Q], tl.int64)
    return tl.where(slot < k, _NO_KEY - slot, -1 - slot)


@jit
def _insert(best: tl.tensor, keys: tl.tensor) -> tl.tensor:
    """The k smallest of best [SLOTS, BQ] and keys [BM, BQ]; one turn for each key that makes it in anywhere.

    A turn costs reductions over the first dimension: comparisons among the keys that a thread holds, then
    shuffles between the lanes and, through shared memory, the warps that share a query (resources.py counts
    them). Most tiles after the first take no turn, or one or two.
    """
    worst = tl.max(best, axis=0)
    nearest = tl.min(keys, axis=0)
    while tl.max((nearest < worst).to(tl.int32), axis=0) > 0:
        taken = (nearest < worst)[None, :]
        best = tl.where((best == worst[None, :]) & taken, nearest[None, :], best)
        keys = tl.where(keys == nearest[None, :], _NO_KEY, keys)
        worst = tl.max(best, axis=0)
        nearest = tl.min(keys, axis=0)
    return best


@jit
def _panel_offset(row: tl.tensor, rows: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Where row (a contiguous range) lies in packed rows; ranges past the end read the last panel."""
    panel = tl.minimum(row // _LANES, (rows - 1) // _LANES).to(tl.int64)
    return panel * (width * _LANES) + row % _LANES


@jit_unspecialized("batch", "k", "p", "inverse_p", "inverse_p_low", "tiles")
def nearest_kernel(
    q_ptr: tl.tensor,
    b_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    above_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    batch: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    k: tl.tensor,
    p: tl.tensor,
    inverse_p: tl.tensor,
    inverse_p_low: tl.tensor,
    tiles: tl.tensor,
    METRIC: tl.constexpr,
    HALVES: tl.constexpr,
    SLOTS: tl.constexpr,
    FEW: tl.constexpr,
    LATER: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """The k nearest of `tiles` tiles of rows: grid (tiles of queries, parts of the bank, groups).

    In a LATER pass only keys above those of the passes before (above [B, G]) count. Writes keys
    [B, G, parts, SLOTS] in no order.
    """
    part, group = tl.program_id(1), tl.program_id(2)
    groups, parts = tl.num_programs(2), tl.num_programs(1)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = query < batch
    q_tile = (q_ptr + _panel_offset(query, batch, width))[:, None]
    panels = (rows + _LANES - 1) // _LANES
    b_group = b_ptr + group.to(tl.int64) * panels * width * _LANES
    flat = query.to(tl.int64) * groups + group
    floor = tl.full([BLOCK_Q], -1, tl.int64)
    if LATER:
        floor = tl.load(above_ptr + flat, mask=inside, other=-1)
    best = _empty_keys(BLOCK_Q, SLOTS, k)
    q_norm = tl.load(q_norm_ptr + query, mask=inside, other=0.0)[:, None]
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, (rows + BLOCK_M - 1) // BLOCK_M)):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        usable = inside[:, None] & (row < rows)[None, :]
        b_tile = (b_group + _panel_offset(row, rows, width))[None, :]
        norm = tl.full([1, BLOCK_M], 1.0, tl.float32)
        if METRIC == _COSINE:
            norm = tl.load(norm_ptr + group * panels * _LANES + row, mask=row < rows, other=1.0)[None, :]
        distance = _distances(
            q_tile,
            b_tile,
            q_norm,
            norm,
            usable,
            width,
            p,
            inverse_p,
            inverse_p_low,
            _LANES,
            METRIC,
            HALVES,
            FEW,
            UNROLL,
        )
        keys = _key(tl.trans(distance), row[:, None])
        usable = (row < rows)[:, None] & inside[None, :]
        best = _insert(best, tl.where(usable & (keys > floor[None, :]), keys, _NO_KEY))
    slot = tl.arange(0, SLOTS)
    target = keys_ptr + (flat[None, :] * parts + part) * SLOTS + slot[:, None]
    tl.store(target, best, mask=inside[None, :])


# ------------------------------------------------------------------------------------------------------------
# Second pass


@jit
def _emit(
    keys: tl.tensor,
    finite: tl.tensor,
    flat: tl.tensor,
    distance_ptr: tl.tensor,
    index_ptr: tl.tensor,
    above_ptr: tl.tensor,
    k: tl.tensor,
    done: tl.tensor,
    neighbours: tl.tensor,
) -> tl.tensor:
    """Write the k smallest keys [N] as neighbours `done`.. of `neighbours`; the mean with the last of them.

    Returns the largest distance written.
    """
    index = index_ptr + flat * neighbours + done
    total = tl.load(distance_ptr + flat, mask=done > 0, other=0.0)
    last = tl.min(keys, axis=0)
    for i in range(k):
        last = tl.min(keys, axis=0)
        tl.store(index + i, tl.where(finite, (last & 0x7FFFFFFF).to(tl.int32), done + i))
        total = total + _distance_of(last)
        keys = tl.where(keys == last, _NO_KEY, keys)
    if done + k == neighbours:
        total = tl.div_rn(total, neighbours.to(tl.float32))
        total = tl.where(finite, total, float("inf"))
    tl.store(distance_ptr + flat, total)
    tl.store(above_ptr + flat, last)
    return _distance_of(last)


@jit_unspecialized("parts", "k", "done", "neighbours")
def merge_kernel(
    keys_ptr: tl.tensor,
    finite_ptr: tl.tensor,
    distance_ptr: tl.tensor,
    index_ptr: tl.tensor,
    above_ptr: tl.tensor,
    groups: tl.tensor,
    parts: tl.tensor,
    k: tl.tensor,
    done: tl.tensor,
    neighbours: tl.tensor,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Join the parts of one (query, group): keys [parts, SLOTS] to k neighbours."""
    flat = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, KEYS)
    keys = tl.load(keys_ptr + flat * parts * SLOTS + offset, mask=offset < parts * SLOTS, other=-1)
    keys = tl.where(keys < 0, _NO_KEY, keys)
    finite = tl.load(finite_ptr + flat // groups) != 0
    _emit(keys, finite, flat, distance_ptr, index_ptr, above_ptr, k, done, neighbours)


# ------------------------------------------------------------------------------------------------------------
# Tensor cores


@jit_unspecialized("batch", "k", "error", "tiles")
def candidates_kernel(
    features_ptr: tl.tensor,
    stride: tl.tensor,
    rows_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    batch: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    k: tl.tensor,
    error: tl.tensor,
    tiles: tl.tensor,
    METRIC: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """As `nearest_kernel`, by a lower bound of the squared distance (of the unit vectors, for cosine).

    |q|^2 + |b|^2 - 2 q.b less error * (|q| + |b|)^2; `error` bounds what 3xTF32 with float32 sums can be
    wrong.
    """
    part, group = tl.program_id(1), tl.program_id(2)
    groups, parts = tl.num_programs(2), tl.num_programs(1)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = query < batch
    q_norm = tl.load(q_norm_ptr + query, mask=inside, other=0.0)[:, None]
    q_rows = features_ptr + query.to(tl.int64)[:, None] * stride
    step = tl.arange(0, BLOCK_D)
    panels = (rows + _LANES - 1) // _LANES
    best = _empty_keys(BLOCK_Q, SLOTS, k)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, (rows + BLOCK_M - 1) // BLOCK_M)):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = row < rows
        b_rows = rows_ptr + (group.to(tl.int64) * rows + row)[:, None] * width
        dot = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
        for start in range(0, width, BLOCK_D):
            d = start + step
            q = tl.load(q_rows + d[None, :], mask=inside[:, None] & (d < width)[None, :], other=0.0)
            b = tl.load(b_rows + d[None, :], mask=valid[:, None] & (d < width)[None, :], other=0.0)
            dot = tl.dot(q.to(tl.float32), tl.trans(b), dot, input_precision="tf32x3")
        norm = tl.load(norm_ptr + group * panels * _LANES + row, mask=valid, other=0.0)[None, :]
        reach = q_norm + norm
        if METRIC == _COSINE:
            product = q_norm * norm
            bound = 2.0 - 2.0 * tl.div_rn(dot, tl.where(product > 0, product, 1.0)) - 4.0 * error
            bound = tl.where(product > 0, bound, tl.where((q_norm == 0) | (norm == 0), 2.0, 0.0))
        else:
            bound = (q_norm * q_norm + norm * norm - 2.0 * dot) - error * reach * reach
        # Sizes whose squares leave float32 give no bound, and a bound below 0 says nothing.
        known = (reach < _LARGEST_NORM) & (bound > 0)
        if METRIC == _COSINE:
            known = (
                known & ((q_norm == 0) | (q_norm > _SMALLEST_NORM)) & ((norm == 0) | (norm > _SMALLEST_NORM))
            )
        keys = _key(tl.trans(tl.where(known, bound, 0.0)), row[:, None])
        best = _insert(best, tl.where((row < rows)[:, None] & inside[None, :], keys, _NO_KEY))
    slot = tl.arange(0, SLOTS)
    flat = query.to(tl.int64) * groups + group
    target = keys_ptr + (flat[None, :] * parts + part) * SLOTS + slot[:, None]
    tl.store(target, best, mask=inside[None, :])


@jit
def _direct_distances(
    q_tile: tl.tensor,
    q_norm: tl.tensor,
    b_group: tl.tensor,
    norms: tl.tensor,
    row: tl.tensor,
    usable: tl.tensor,
    width: tl.tensor,
    METRIC: tl.constexpr,
    UNROLL: tl.constexpr,
) -> tl.tensor:
    """Distances [1, N] of one query to the rows [N] of a group that lies row by row, by l2 or cosine."""
    return _distances(
        q_tile,
        (b_group + row.to(tl.int64) * width)[None, :],
        q_norm,
        tl.load(norms + row)[None, :],
        usable[None, :],
        width,
        1.0,
        1.0,
        0.0,
        1,
        METRIC,
        0,
        True,
        UNROLL,
    )


@jit_unspecialized("batch", "parts", "k", "slack")
def rescore_kernel(
    q_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    finite_ptr: tl.tensor,
    distance_ptr: tl.tensor,
    index_ptr: tl.tensor,
    above_ptr: tl.tensor,
    exhaustive_ptr: tl.tensor,
    batch: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    groups: tl.tensor,
    parts: tl.tensor,
    k: tl.tensor,
    slack: tl.tensor,
    METRIC: tl.constexpr,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """Join the candidates of one (query, group) by their direct distances, and prove that they are the
    nearest.

    A row that no part kept has a bound of at least its part's largest kept bound. If the k-th direct
    distance, enlarged by the rounding (1 + slack), stays below the least of those, no such row is nearer or
    as near. Otherwise the bank is gone through. exhaustive [B, G] says which it was.
    """
    flat = tl.program_id(0).to(tl.int64)
    query, group = flat // groups, flat % groups
    finite = tl.load(finite_ptr + query) != 0
    offset = tl.arange(0, KEYS)
    keys = tl.load(keys_ptr + flat * parts * SLOTS + offset, mask=offset < parts * SLOTS, other=-1)
    # A slot that was never filled holds a key beyond all distances: its part dropped nothing.
    used = (keys >= 0) & (keys < 0x7F80000000000000)
    row = tl.where(used, (keys & 0x7FFFFFFF).to(tl.int32), 0)
    bound = float("inf")
    for part in range(parts):
        mine = (offset >= part * SLOTS) & (offset < (part + 1) * SLOTS)
        worst = tl.max(tl.where(mine, keys, -1), axis=0)
        bound = tl.minimum(bound, tl.where(worst < 0x7F80000000000000, _distance_of(worst), float("inf")))
    one = tl.zeros([1, 1], tl.int64) + query
    q_tile = q_ptr + (one // _LANES) * width * _LANES + one % _LANES
    q_norm = tl.load(q_norm_ptr + one)
    b_group = rows_ptr + group * rows * width
    norms = norm_ptr + group * ((rows + _LANES - 1) // _LANES) * _LANES
    distance = _direct_distances(q_tile, q_norm, b_group, norms, row, used, width, METRIC, UNROLL)
    exact = tl.where(used, tl.reshape(_key(distance, row[None, :]), [KEYS]), _NO_KEY)
    last = _emit(exact, finite, flat, distance_ptr, index_ptr, above_ptr, k, 0, k)
    squared = 2.0 * last if METRIC == _COSINE else last * last * (width * 1.0)
    # Below the guard the bound's own terms may have been lost to underflow.
    proven = (squared * (1.0 + slack) < bound) & ((bound > _SMALLEST_SUM) | (finite == 0))
    if (proven == 0) & finite:
        best = _empty_keys(1, SLOTS, k)
        for start in range(0, rows, KEYS):
            all_rows = start + offset
            inside = all_rows < rows
            row = tl.where(inside, all_rows, 0)
            distance = _direct_distances(q_tile, q_norm, b_group, norms, row, inside, width, METRIC, UNROLL)
            more = tl.where(inside[:, None], _key(tl.trans(distance), row[:, None]), _NO_KEY)
            best = _insert(best, more)
        best = tl.reshape(best, [SLOTS])
        best = tl.where(best < 0, _NO_KEY, best)
        _emit(best, finite, flat, distance_ptr, index_ptr, above_ptr, k, 0, k)
    tl.store(exhaustive_ptr + flat, ((proven == 0) & finite).to(tl.int8))


# ------------------------------------------------------------------------------------------------------------
# Launches


@dataclasses.dataclass(frozen=True)
class Queries:
    """What `prepare_kernel` made of the features: float32 panels, norms and flags of ceil(B / 16) * 16
    rows."""

    packed: Tensor
    norms: Tensor
    finite: Tensor


def prepare(features: Tensor, unit: bool) -> Queries:
    """features [B, D], adjacent columns, B >= 1."""
    batch, width = features.shape
    panels = cdiv(batch, LANES)
    packed = features.new_empty(panels * width * LANES, dtype=torch.float32)
    norms = features.new_empty(panels * LANES, dtype=torch.float32)
    finite = features.new_empty(panels * LANES, dtype=torch.int8)
    block = min(128, power_of_two(width))
    prepare_kernel[(panels,)](
        features,
        features.stride(0),
        packed,
        norms,
        finite,
        batch,
        width,
        UNIT=unit,
        BLOCK_D=block,
        num_warps=4,
        **OPTIONS,
    )
    return Queries(packed, norms, finite)


def _halves(metric: int, p: float) -> tuple[int, int]:
    """Metric and HALVES: lp with p = 1 or 2 is another metric, and p that products reach needs no
    logarithm."""
    if metric != LP:
        return metric, 0
    if p in (1.0, 2.0):
        return (L1, 0) if p == 1.0 else (L2, 0)
    return LP, int(2 * p) if p <= 16 and 2 * p == int(2 * p) else 0


def metric_name(metric: int, halves: int) -> str:
    """As the table of `configs` calls a metric and what `_halves` says of its exponent."""
    return ("l1", "l2", "lp" if halves else "lp any", "cosine")[metric]


def _float32(x: float) -> tuple[float, float]:
    """x as the sum of two float32."""
    high = torch.tensor(x, dtype=torch.float64, device="cpu").to(torch.float32).item()
    return high, x - high


def choose_path(metric: int, batch: int, rows: int, k: int) -> str:
    """ "few", "dot" or "tile" for a metric (after `_halves`) and sizes."""
    if batch < FEW_QUERIES:
        return "few"
    if metric in (L2, COSINE) and k <= LARGEST_DOT_K and rows > 2 * power_of_two(k):
        return "dot"
    return "tile"


def dot_error(width: int) -> float:
    """What the expanded form in 3xTF32 may be wrong by, as a share of (|q| + |b|)^2, with a margin.

    Splitting a float32 into two TF32, the lower truncated, loses at most 2^-21 of it: 2^-20 |q||b| for both
    factors, and the omitted product of the lower parts is another 2^-22. The D / 8 steps of the leading
    product add nine terms each (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores",
    2021: aligned to the largest and truncated), 2^-23 of sum |q_i b_i| <= |q||b| apiece: 1.125 D 2^-23
    |q||b|. The steps of the two lower products are 2^-10 of that. The dot product enters twice, and |q||b| is
    at most (|q| + |b|)^2 / 4: (0.29 D + 3) 2^-22 of (|q| + |b|)^2; norms, the last additions and the rounding
    of unit vectors add less than 8 * 2^-22. The result is nearly twice that for large D and more for small.
    """
    return (0.5 * width + 64) * 2.0**-22


def feature_distance(
    features: Tensor,
    rows: Tensor,
    packed: Tensor,
    norms: Tensor,
    k: int,
    metric: int,
    p: float,
    *,
    path: str | None = None,
    config: Config | None = None,
    parts: int | None = None,
    queries: Queries | None = None,
    statistics: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean of the k smallest distances, and which rows they are.

    Args:
        features: [B, D] float32, float16 or bfloat16 with adjacent columns.
        rows: [G, M, D] float32, contiguous, finite.
        packed, norms: of the rows, as `honeytrace.ops.bank.pack_panels` gives them.
        k, metric, p: as the op's schema.
        path: "few", "tile" or "dot" instead of the one `choose_path` takes ("dot": l2 and cosine, small k).
        config, parts: tile sizes and parts of the bank instead of those of `configs`.
        queries: what `prepare` gave for these features.
        statistics: receives "exhaustive" [B, G] int8: where the tensor-core path had to go through the bank.

    Returns:
        distance [B, G] float32 and indices [B, G, k] int32, as `honeytrace.ops.feature_distance` defines
        them.
    """
    batch, width = features.shape
    groups, size, _ = rows.shape
    distance = features.new_empty((batch, groups), dtype=torch.float32)
    index = features.new_empty((batch, groups, k), dtype=torch.int32)
    if batch == 0:
        return distance, index
    metric, halves = _halves(metric, p)
    # One query at a time is what the interpreter is slowest at; the tests ask for the other paths by name.
    path = path or ("tile" if INTERPRETED else choose_path(metric, batch, size, k))
    name = metric_name(metric, halves)
    size_of_problem = size_class(path, name, batch, groups, size, features.device)
    config = config or distance_config(path, name, size_of_problem)
    queries = queries or prepare(features, metric == COSINE)
    above = features.new_empty((batch, groups), dtype=torch.int64)

    tiles = cdiv(size, config.block_m)
    kept = min(64, power_of_two(k + max(6, k // 2))) if path == "dot" else min(LARGEST_K, k)
    slots = power_of_two(kept)
    blocks = cdiv(batch, config.block_q)
    most = max(1, min(MERGED_KEYS, 256 if path == "dot" else MERGED_KEYS) // slots)
    parts = min(parts, tiles, most) if parts else bank_splits(blocks * groups, tiles, features.device, most)
    tiles = cdiv(tiles, parts)
    keys = features.new_empty(batch * groups * parts * slots, dtype=torch.int64)
    merged = power_of_two(parts * slots)
    grid = (blocks, parts, groups)
    if path == "dot":
        candidates_kernel[grid](
            features,
            features.stride(0),
            rows,
            queries.norms,
            norms,
            keys,
            batch,
            size,
            width,
            kept,
            dot_error(width),
            tiles,
            METRIC=metric,
            SLOTS=slots,
            BLOCK_Q=config.block_q,
            BLOCK_M=config.block_m,
            BLOCK_D=config.block_d,
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
            **OPTIONS,
        )
        exhaustive = features.new_empty((batch, groups), dtype=torch.int8)
        rescore_kernel[(batch * groups,)](
            queries.packed,
            queries.norms,
            rows,
            norms,
            keys,
            queries.finite,
            distance,
            index,
            above,
            exhaustive,
            batch,
            size,
            width,
            groups,
            parts,
            k,
            (width + 64) * 2.0**-22,
            METRIC=metric,
            SLOTS=slots,
            KEYS=merged,
            UNROLL=config.unroll,
            num_warps=RESCORE.warps,
            maxnreg=RESCORE.registers,
            **OPTIONS,
        )
        if statistics is not None:
            statistics["exhaustive"] = exhaustive
        return distance, index

    exponent, (inverse, inverse_low) = float(p), _float32(1.0 / p)
    for done in range(0, k, LARGEST_K):
        taken = min(LARGEST_K, k - done)
        nearest_kernel[grid](
            queries.packed,
            packed,
            queries.norms,
            norms,
            above,
            keys,
            batch,
            size,
            width,
            taken,
            exponent,
            inverse,
            inverse_low,
            tiles,
            METRIC=metric,
            HALVES=halves,
            SLOTS=slots,
            FEW=path == "few",
            LATER=done > 0,
            BLOCK_Q=config.block_q,
            BLOCK_M=config.block_m,
            UNROLL=config.unroll,
            num_warps=config.warps,
            maxnreg=config.registers,
            **OPTIONS,
        )
        merge_kernel[(batch * groups,)](
            keys,
            queries.finite,
            distance,
            index,
            above,
            groups,
            parts,
            taken,
            done,
            k,
            SLOTS=slots,
            KEYS=merged,
            num_warps=4 if merged >= 512 else 1,
            **OPTIONS,
        )
    return distance, index
