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
    product = tl.sqrt(x) if HALVES % 2 == 1 else tl.full(x.shape, 1.0, tl.float32)
    base = x
    for bit in tl.static_range(1, 6):
        if (HALVES >> bit) & 1:
            product = product * base
        if (HALVES >> (bit + 1)) > 0:
            base = base * base
    return product


# Powers of float64 scalars. A flip compares floor(s ^ power * bins) with a uniform number, and every backend
# must decide alike, so the last bit counts: the C library's pow, which the others use, is right to the last
# bit but for a few per cent of a unit. The steps below carry a value as the sum of two float64 to the same
# end. They hold as written only if nothing is contracted to multiply-adds (`language.OPTIONS`), and use none
# themselves, so that the interpreter computes the same.


@jit
def _two_sum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@jit
def _two_product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    product = a * b
    a_wide, b_wide = a * 134217729.0, b * 134217729.0  # 2^27 + 1: halves of 26 bits (Dekker, 1971)
    a_high, b_high = a_wide - (a_wide - a), b_wide - (b_wide - b)
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@jit
def _add_pairs(a: tl.tensor, a_low: tl.tensor, b: tl.tensor, b_low: tl.tensor) -> tl.tensor:
    total, rest = _two_sum(a, b)
    return _two_sum(total, rest + (a_low + b_low))


@jit
def _multiply_pairs(a: tl.tensor, a_low: tl.tensor, b: tl.tensor, b_low: tl.tensor) -> tl.tensor:
    product, rest = _two_product(a, b)
    return _two_sum(product, rest + (a * b_low + a_low * b))


@jit
def _constant(value: tl.constexpr) -> tl.tensor:
    return tl.full((), value, tl.float64)


@jit
def _log_pair(x: tl.tensor) -> tl.tensor:
    """log x of a positive normal float64, to about 2^-68 of it: 2 atanh((m - 1) / (m + 1)) and the
    exponent."""
    bits = x.to(tl.int64, bitcast=True)
    whole = (bits - 0x3FE6A09E667F3BCD) >> 52
    mantissa = (bits - (whole << 52)).to(tl.float64, bitcast=True)  # in [sqrt(1/2), sqrt(2))
    above = mantissa - 1.0
    below, below_low = _two_sum(mantissa, _constant(1.0))
    t = above / below
    product, rest = _two_product(t, below)
    t, t_low = _two_sum(t, (((above - product) - rest) - t * below_low) / below)
    square, square_low = _multiply_pairs(t, t_low, t, t_low)
    # 1/7 + t^2/9 + ... : from here on one float64 is enough
    tail = square * 0.0
    for i in tl.static_range(12):
        tail = tail * square + 1.0 / (29 - 2 * i)
    series, series_low = _add_pairs(
        _constant(0.2), _constant(-1.1102230246251566e-17), square * tail, square * 0.0
    )
    series, series_low = _multiply_pairs(series, series_low, square, square_low)
    series, series_low = _add_pairs(
        _constant(0.3333333333333333), _constant(1.850371707708594e-17), series, series_low
    )
    series, series_low = _multiply_pairs(series, series_low, square, square_low)
    series, series_low = _add_pairs(_constant(1.0), _constant(0.0), series, series_low)
    log, log_low = _multiply_pairs(2.0 * t, 2.0 * t_low, series, series_low)
    e = whole.to(tl.float64)
    return _add_pairs(e * 0.6931471803691238, e * 1.9082149292705877e-10, log, log_low)


@jit
def _exp_pair(x: tl.tensor, x_low: tl.tensor) -> tl.tensor:
    """exp of x + x_low <= 0, rounded to float64; 0 below the smallest normal number."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r, r_low = _add_pairs(x, x_low, -n * 0.6931471803691238, x * 0.0)
    r, r_low = _add_pairs(r, r_low, -n * 1.9082149292705877e-10, x * 0.0)
    r, r_low = r * 0.0625, r_low * 0.0625
    tail = r * 0.0
    for i in tl.static_range(8):  # 1/3! + r/4! + ... + r^7/10!, by Horner on reciprocal factors
        tail = (tail * r + 1.0) / (10 - i)
    tail = tail * 0.5 * r * r * r
    square, square_low = _multiply_pairs(r, r_low, r, r_low)
    y, y_low = _add_pairs(r, r_low, 0.5 * square, 0.5 * square_low)
    y, y_low = _add_pairs(y, y_low, tail, x * 0.0)
    for _ in tl.static_range(4):  # e^2r - 1 = 2 y + y^2
        square, square_low = _multiply_pairs(y, y_low, y, y_low)
        y, y_low = _add_pairs(2.0 * y, 2.0 * y_low, square, square_low)
    y, y_low = _add_pairs(_constant(1.0), _constant(0.0), y, y_low)
    exponent = tl.maximum(n, -1022.0).to(tl.int64)
    scale = ((exponent + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(n < -1022.0, 0.0, (y + y_low) * scale)


@jit
def shaped_power(base: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """base ^ exponent of float64 scalars, base in [0, 1], exponent > 0.

    The small exponents by products and the square root as the other backends have them, the rest correctly
    rounded but for one case in thousands.
    """
    result = base
    if exponent == 0.5:
        result = tl.sqrt(base)
    elif exponent == 2.0:
        result = base * base
    elif exponent == 3.0:
        result = base * base * base
    elif exponent != 1.0:
        usable = base > 2.2250738585072014e-308
        log, log_low = _log_pair(tl.where(usable, base, 1.0))
        log, log_low = _multiply_pairs(log, log_low, exponent, exponent * 0.0)
        result = tl.where(usable, _exp_pair(log, log_low), 0.0)
    return result
