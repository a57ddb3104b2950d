// base^exponent in double, for the mixing decisions: a flip compares floor(s^power * bins) with a uniform number, so
// the last bit counts, and every backend must decide alike. The C library's pow is right to the last bit but for a few
// per cent of a unit; CUDA's may be wrong by a unit and more. So on the device (and in its emulation, which tests it)
// the value is carried as the sum of two doubles, which rounds correctly but for one case in thousands.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "hd.h"

namespace honeytrace::HONEYTRACE_LEVEL {

struct DoublePair {
    double high, low;
};

HONEYTRACE_HD DoublePair two_sum(double a, double b) {
    const double total = a + b, of_b = total - a;
    return {total, (a - (total - of_b)) + (b - of_b)};
}
HONEYTRACE_HD DoublePair two_product(double a, double b) {
    const double product = a * b;
    return {product, ::fma(a, b, -product)};
}
HONEYTRACE_HD DoublePair add_pairs(DoublePair a, DoublePair b) {
    const DoublePair sum = two_sum(a.high, b.high);
    return two_sum(sum.high, sum.low + (a.low + b.low));
}
HONEYTRACE_HD DoublePair multiply_pairs(DoublePair a, DoublePair b) {
    const DoublePair product = two_product(a.high, b.high);
    return two_sum(product.high, product.low + (a.high * b.low + a.low * b.high));
}

HONEYTRACE_HD uint64_t double_bits(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
HONEYTRACE_HD double double_of(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// ln 2 in two parts; the first has few enough bits that a whole number below 2^11 times it is exact.
constexpr double kLn2High = 0.6931471803691238, kLn2Low = 1.9082149292705877e-10;

// log x of a positive normal x, to about 2^-68 of it: 2 atanh((m - 1) / (m + 1)) and the exponent.
HONEYTRACE_HD DoublePair log_pair(double x) {
    const int64_t whole = static_cast<int64_t>(double_bits(x) - 0x3FE6A09E667F3BCDu) >> 52;
    const double mantissa = double_of(double_bits(x) - (static_cast<uint64_t>(whole) << 52));  // [sqrt(1/2), sqrt(2))
    const double above = mantissa - 1.0;
    const DoublePair below = two_sum(mantissa, 1.0);
    const double quotient = above / below.high;
    const DoublePair product = two_product(quotient, below.high);
    const double rest = (((above - product.high) - product.low) - quotient * below.low) / below.high;
    const DoublePair t = two_sum(quotient, rest);
    const DoublePair square = multiply_pairs(t, t);
    double tail = 0.0;  // 1/7 + t^2/9 + ...: from here on one double is enough
    for (int i = 0; i < 12; ++i) tail = tail * square.high + 1.0 / (29 - 2 * i);
    DoublePair series = add_pairs({0.2, -1.1102230246251566e-17}, {square.high * tail, 0.0});
    series = add_pairs({0.3333333333333333, 1.850371707708594e-17}, multiply_pairs(series, square));
    series = add_pairs({1.0, 0.0}, multiply_pairs(series, square));
    const double exponent = static_cast<double>(whole);
    return add_pairs({exponent * kLn2High, exponent * kLn2Low}, multiply_pairs({2.0 * t.high, 2.0 * t.low}, series));
}

// exp of x <= 0, rounded to double; 0 below the smallest normal number.
HONEYTRACE_HD double exp_pair(DoublePair x) {
    const double n = floor(x.high * 1.4426950408889634 + 0.5);
    if (!(n >= -1022.0)) return 0.0;
    DoublePair r = add_pairs(x, {-n * kLn2High, 0.0});
    r = add_pairs(r, {-n * kLn2Low, 0.0});
    r = {r.high * 0.0625, r.low * 0.0625};
    double tail = 0.0;
    for (int i = 0; i < 8; ++i) tail = (tail * r.high + 1.0) / (10 - i);  // 1/3! + r/4! + ... + r^7/10!
    tail = tail * 0.5 * r.high * r.high * r.high;
    const DoublePair square = multiply_pairs(r, r);
    DoublePair y = add_pairs(r, {0.5 * square.high, 0.5 * square.low});
    y = add_pairs(y, {tail, 0.0});
    for (int i = 0; i < 4; ++i)  // e^2r - 1 = 2 y + y^2
        y = add_pairs({2.0 * y.high, 2.0 * y.low}, multiply_pairs(y, y));
    y = add_pairs({1.0, 0.0}, y);
    return (y.high + y.low) * double_of(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
}

// base in [0, 1], exponent > 0.
HONEYTRACE_HD double paired_power(double base, double exponent) {
    if (!(base > 2.2250738585072014e-308)) return 0.0;
    return exp_pair(multiply_pairs(log_pair(base), {exponent, 0.0}));
}

HONEYTRACE_HD double double_power(double base, double exponent) {
#if defined(HONEYTRACE_PAIRED_POWER)
    return paired_power(base, exponent);
#else
    return pow(base, exponent);
#endif
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
