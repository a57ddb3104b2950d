"""Powers and finiteness, for tiles of float32, and powers of float64 scalars for the mixing decisions."""

from __future__ import annotations

from .language import jit, tl


@jit
def is_finite(x: tl.tensor) -> tl.tensor:
    return tl.abs(x) < float("inf")


@jit
def power_of_two_float(n: tl.tensor) -> tl.tensor:
    """2^n for int32 n in [-126, 127], by its bits."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@jit
def power(x: tl.tensor, exponent: tl.tensor, exponent_low: tl.tensor) -> tl.tensor:
    """x ^ (exponent + exponent_low) for float32 x >= 0; 0 below the normal numbers.

    The binary exponent of x goes through the product apart from the mantissa, so that the relative error
    stays near 2^-23 * (1 + exponent) however far x is from 1. One logarithm and one exponential, both of base
    2.
    """
    bits = x.to(tl.int32, bitcast=True)
    whole = ((bits + 0x00400000) >> 23) - 127
    mantissa = (bits - (whole << 23)).to(tl.float32, bitcast=True)  # in [0.75, 1.5)
    e = whole.to(tl.float32)
    high = e * exponent
    low = tl.fma(e, exponent, -high)
    low = tl.fma(e, exponent_low, low)
    tail = tl.fma(tl.log2(mantissa), exponent, low)
    n = tl.floor(high + tail + 0.5)
    fraction = (high - n) + tail
    clamped = tl.minimum(tl.maximum(n, -252.0), 254.0).to(tl.int32)
    half = clamped >> 1
    # 2^n in two factors: n may lie beyond the normal exponents, where the product over- or underflows as it
    # should.
    result = tl.exp2(fraction) * power_of_two_float(half) * power_of_two_float(clamped - half)
    return tl.where(bits < 0x00800000, 0.0, result)


@jit
def half_power(x: tl.tensor, HALVES: tl.constexpr) -> tl.tensor:
    """x ^ (HALVES / 2) for x >= 0 and HALVES <= 32: by squaring, and a root where the exponent ends in a
    half."""
    product = tl.sqrt_rn(x) if HALVES % 2 == 1 else tl.full(x.shape, 1.0, tl.float32)
    base = x
    for bit in tl.static_range(1, 6):
        if (HALVES >> bit) & 1:
            product = product * base
        if (HALVES >> (bit + 1)) > 0:
            base = base * base
    return product


@jit
def shaped_power(base: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """base ^ exponent in float64 for base in [0, 1]; the small exponents by products and the square root.

    Those are equal bit by bit to the reference and the compiled core. The others, exp(exponent * log(base)),
    are within some tens of units in the last place; `is_product` tells which it was.
    """
    safe = tl.where(base > 0, base, 1.0)
    general = tl.exp(exponent * tl.log(safe))
    result = tl.where(base > 0, general, 0.0)
    result = tl.where(exponent == 0.5, tl.sqrt(base), result)
    result = tl.where(exponent == 1.0, base, result)
    result = tl.where(exponent == 2.0, base * base, result)
    return tl.where(exponent == 3.0, base * base * base, result)


@jit
def is_product(exponent: tl.tensor) -> tl.tensor:
    """Whether `shaped_power` with this exponent is exact to the last bit."""
    return (exponent == 0.5) | (exponent == 1.0) | (exponent == 2.0) | (exponent == 3.0)
