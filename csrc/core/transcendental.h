// exp, log(1 + x), and powers with any positive exponent, for a value type V with the operations of cpu/vec.h and V(x)
// for a constant. The polynomials are minimax fits made for this file (Lawson's iteration, error noted at each).
#pragma once

#include "hd.h"

namespace honeytrace::HONEYTRACE_LEVEL {

// e^x for x <= 0, within 2 units in the last place; 0 below -87.3, where the result would be subnormal.
template <class V>
HONEYTRACE_HD V exp_negative(V x) {
    const V lowest = V(-87.33654f);
    const V clamped = maximum(x, lowest);
    const V n = round_even(mul(clamped, V(1.44269504f)));
    // ln 2 in two parts: the first has few enough bits that n times it is exact.
    V r = fma(n, V(-0.693145752f), clamped);
    r = fma(n, V(-1.42860677e-6f), r);
    // (e^r - 1 - r) / r^2 on [-ln2/2, ln2/2]; error of e^r: 3.2e-9.
    V p = V(1.39504788e-3f);
    p = fma(p, r, V(8.368882239e-3f));
    p = fma(p, r, V(4.166620599e-2f));
    p = fma(p, r, V(0.166665189f));
    p = fma(p, r, V(0.5000000095f));
    p = add(fma(mul(p, r), r, r), V(1.0f));
    // n reaches -126 only with r >= 0 after the clamp, so the result stays normal.
    return select(less(x, lowest), V(0.0f), mul(p, power_of_two(maximum(n, V(-126.0f)))));
}

// log(1 + x) for x in [0, 1], absolute error 1e-7 (of the polynomial alone: 5e-9).
template <class V>
HONEYTRACE_HD V log1p_unit(V x) {
    V p = V(3.930455539e-3f);
    p = fma(p, x, V(-2.385544963e-2f));
    p = fma(p, x, V(6.808467954e-2f));
    p = fma(p, x, V(-0.1269088686f));
    p = fma(p, x, V(0.1856981665f));
    p = fma(p, x, V(-0.2467268705f));
    p = fma(p, x, V(0.3328966796f));
    p = fma(p, x, V(-0.4999709427f));
    p = fma(p, x, V(0.9999993443f));
    return mul(p, x);
}

// log2 of a positive normal x as whole + fraction, the fraction in [-0.5, 0.5], absolute error 7e-9.
template <class V>
HONEYTRACE_HD void log2_parts(V x, V* whole, V* fraction) {
    V mantissa;
    split_exponent(x, &mantissa, whole);
    const V f = sub(mantissa, V(1.0f));
    V p = V(0.1254124131f);
    p = fma(p, f, V(-0.2103033333f));
    p = fma(p, f, V(0.2173793882f));
    p = fma(p, f, V(-0.2385194386f));
    p = fma(p, f, V(0.2876566745f));
    p = fma(p, f, V(-0.3607211953f));
    p = fma(p, f, V(0.4809225289f));
    p = fma(p, f, V(-0.7213471285f));
    p = fma(p, f, V(1.442694869f));
    *fraction = mul(p, f);
}

// x^exponent for x >= 0. Relative error about 2^-24 * (1 + |log2 result|); 0 for x below 2^-126, infinity above
// the range. The exponent is exponent + exponent_low, so that a reciprocal loses nothing.
template <class V>
HONEYTRACE_HD V power(V x, float exponent, float exponent_low) {
    V whole, fraction;
    log2_parts(maximum(x, V(1.17549435e-38f)), &whole, &fraction);
    const V product = mul(whole, V(exponent));
    const V product_low = fma(whole, V(exponent), sub(V(0.0f), product));
    const V tail = fma(fraction, V(exponent), fma(whole, V(exponent_low), product_low));
    const V n = round_even(add(product, tail));
    const V r = add(sub(product, n), tail);
    // (2^r - 1) / r on [-0.5, 0.5]; error of 2^r: 1.9e-9.
    V p = V(1.547630019e-4f);
    p = fma(p, r, V(1.340026967e-3f));
    p = fma(p, r, V(9.61800389e-3f));
    p = fma(p, r, V(5.550327791e-2f));
    p = fma(p, r, V(0.2402265135f));
    p = fma(p, r, V(0.6931472062f));
    p = fma(p, r, V(1.0f));
    // In two factors, for 2^n alone may leave the range where 2^n * p does not.
    const V bounded = minimum(maximum(n, V(-150.0f)), V(130.0f));
    const V half = round_even(mul(bounded, V(0.5f)));
    const V result = mul(mul(p, power_of_two(half)), power_of_two(sub(bounded, half)));
    return select(less(x, V(1.17549435e-38f)), V(0.0f), result);
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
