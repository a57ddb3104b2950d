"""Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011)."""

from __future__ import annotations

from torch import Tensor

from .language import OPTIONS, jit, power_of_two, tl


@jit
def philox4x32_10(
    c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Four uint32 words from a counter of four and a key of two, of equal shapes."""
    zero = tl.zeros_like(c0)
    multiplier0 = zero + tl.full((), 0xD2511F53, tl.uint32)
    multiplier1 = zero + tl.full((), 0xCD9E8D57, tl.uint32)
    weyl0 = zero + tl.full((), 0x9E3779B9, tl.uint32)
    weyl1 = zero + tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(multiplier0, c0)
        low0 = multiplier0 * c0
        high1 = tl.umulhi(multiplier1, c2)
        low1 = multiplier1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = k0 + weyl0
        k1 = k1 + weyl1
    return c0, c1, c2, c3


@jit
def low_word(x: tl.tensor) -> tl.tensor:
    """The lower 32 bits of an int64."""
    return (x & 0xFFFFFFFF).to(tl.uint32)


@jit
def high_word(x: tl.tensor) -> tl.tensor:
    """The upper 32 bits of an int64."""
    return ((x >> 32) & 0xFFFFFFFF).to(tl.uint32)


@jit
def flip_uniform(seed: tl.tensor, bucket: tl.tensor, group: tl.tensor) -> tl.tensor:
    """The number in [0, 1), float64, that decides the flip of a bucket in a group."""
    zero = tl.zeros_like(low_word(bucket))
    words = philox4x32_10(
        low_word(bucket),
        high_word(bucket),
        zero + group.to(tl.uint32),
        zero,
        zero + low_word(seed),
        zero + high_word(seed),
    )
    return words[0].to(tl.float64) * (1.0 / 4294967296.0)


@jit
def philox_kernel(words_ptr: tl.tensor, out_ptr: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    """out[4, count] from words[6, count] (counter and key), all int64 that hold 32-bit words; for the
    tests."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    c0 = tl.load(words_ptr + offset, mask=inside, other=0).to(tl.uint32)
    c1 = tl.load(words_ptr + count + offset, mask=inside, other=0).to(tl.uint32)
    c2 = tl.load(words_ptr + 2 * count + offset, mask=inside, other=0).to(tl.uint32)
    c3 = tl.load(words_ptr + 3 * count + offset, mask=inside, other=0).to(tl.uint32)
    k0 = tl.load(words_ptr + 4 * count + offset, mask=inside, other=0).to(tl.uint32)
    k1 = tl.load(words_ptr + 5 * count + offset, mask=inside, other=0).to(tl.uint32)
    c0, c1, c2, c3 = philox4x32_10(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + offset, c0.to(tl.int64), mask=inside)
    tl.store(out_ptr + count + offset, c1.to(tl.int64), mask=inside)
    tl.store(out_ptr + 2 * count + offset, c2.to(tl.int64), mask=inside)
    tl.store(out_ptr + 3 * count + offset, c3.to(tl.int64), mask=inside)


def philox(words: Tensor) -> Tensor:
    """Words [6, N] int64 (counter, key) -> [4, N] int64."""
    out = words.new_empty(4, words.shape[1])
    block = min(1024, power_of_two(words.shape[1]))
    grid = (-(-words.shape[1] // block),)
    philox_kernel[grid](words.contiguous(), out, words.shape[1], BLOCK=block, **OPTIONS)
    return out
