// One struct for each metric: `accumulate` takes one feature of query and row into the running sum, `finish` turns
// the sum over D features into the distance. V is a value type with the operations of cpu/vec.h and V(x) for a
// constant; Q is what stands for the query's feature, anything that sub(V, Q) takes.
//
// Formulas (DESIGN section 3): l1 sum|d|/D, l2 sqrt(sum d^2/D), lp (sum |d|^p/D)^(1/p), cosine 1 - q.b/(|q||b|)
// with q and b already divided by their norms, where it equals |q - b|^2 / 2 and near rows do not cancel.
//
// `unfinish` is the inverse of `finish`, times kUnfinishMargin large enough that a sum above it cannot finish below the
// distance again, whatever was rounded. kRootError bounds the relative error of `finish` where it is not monotone.
//
// kSmallestSum: below it terms may have been lost to underflow and the sum is taken again on |d| divided by the
// largest |d| (see distance.inl.h), as it is when the sum has overflowed. So lp holds for every p and every
// finite difference, not for ordinary magnitudes only.
#pragma once

#include "hd.h"
#include "transcendental.h"

namespace honeytrace::HONEYTRACE_LEVEL {

constexpr float kUnderflowGuard = 0x1p-90f;

struct L1 {
    static constexpr float kSmallestSum = 0.0f;
    static constexpr bool kCosine = false;
    static constexpr float kUnfinishMargin = 1.0f + 0x1p-12f, kRootError = 0.0f;
    template <class Q, class V>
    HONEYTRACE_HD V accumulate(Q q, V b, V sum) const {
        return add_abs(sub(b, q), sum);
    }
    template <class V>
    HONEYTRACE_HD V finish(V sum, float features) const {
        return divide(sum, V(features));
    }
    template <class V>
    HONEYTRACE_HD V unfinish(V distance, float features) const {
        return mul(distance, V(features));
    }
};

struct L2 {
    static constexpr float kSmallestSum = kUnderflowGuard;
    static constexpr bool kCosine = false;
    static constexpr float kUnfinishMargin = 1.0f + 0x1p-12f, kRootError = 0.0f;
    template <class Q, class V>
    HONEYTRACE_HD V accumulate(Q q, V b, V sum) const {
        const V d = sub(b, q);
        return fma(d, d, sum);
    }
    template <class V>
    HONEYTRACE_HD V finish(V sum, float features) const {
        return square_root(divide(sum, V(features)));
    }
    template <class V>
    HONEYTRACE_HD V unfinish(V distance, float features) const {
        return mul(mul(distance, distance), V(features));
    }
};

struct Cosine {
    static constexpr float kSmallestSum = 0.0f;  // of unit vectors: nothing overflows, and what underflows is nothing
    static constexpr bool kCosine = true;
    static constexpr float kUnfinishMargin = 1.0f + 0x1p-12f, kRootError = 0.0f;
    template <class Q, class V>
    HONEYTRACE_HD V accumulate(Q q, V b, V sum) const {
        const V d = sub(b, q);
        return fma(d, d, sum);
    }
    template <class V>
    HONEYTRACE_HD V finish(V sum, float) const {
        return mul(sum, V(0.5f));
    }
    template <class V>
    HONEYTRACE_HD V unfinish(V distance, float) const {
        return mul(distance, V(2.0f));
    }
};

// The root that closes every lp sum.
struct LpRoot {
    static constexpr float kUnfinishMargin = 1.0f + 0x1p-8f, kRootError = 0x1p-14f;
    float inverse, inverse_low, exponent;
    template <class V>
    HONEYTRACE_HD V finish(V sum, float features) const {
        return power(divide(sum, V(features)), inverse, inverse_low);
    }
    // Above p = 16 the margin would have to be larger: infinity, which says nothing.
    template <class V>
    HONEYTRACE_HD V unfinish(V distance, float features) const {
        return exponent <= 16.0f ? mul(power(distance, exponent, 0.0f), V(features)) : V(__builtin_inff());
    }
};

struct L3 : LpRoot {
    static constexpr float kSmallestSum = kUnderflowGuard;
    static constexpr bool kCosine = false;
    template <class Q, class V>
    HONEYTRACE_HD V accumulate(Q q, V b, V sum) const {
        const V d = absolute(sub(b, q));
        return fma(mul(d, d), d, sum);
    }
};

struct L4 : LpRoot {
    static constexpr float kSmallestSum = kUnderflowGuard;
    static constexpr bool kCosine = false;
    template <class Q, class V>
    HONEYTRACE_HD V accumulate(Q q, V b, V sum) const {
        const V d = sub(b, q);
        const V square = mul(d, d);
        return fma(square, square, sum);
    }
};

// p = 3/2
struct LpThreeHalves : LpRoot {
    static constexpr float kSmallestSum = kUnderflowGuard;
    static constexpr bool kCosine = false;
    template <class Q, class V>
    HONEYTRACE_HD V accumulate(Q q, V b, V sum) const {
        const V d = absolute(sub(b, q));
        return fma(square_root(d), d, sum);
    }
};

// p = twice / 2 by squaring and multiplying, and a square root where p ends in a half.
struct LpHalves : LpRoot {
    static constexpr float kSmallestSum = kUnderflowGuard;
    static constexpr bool kCosine = false;
    unsigned twice;
    template <class Q, class V>
    HONEYTRACE_HD V accumulate(Q q, V b, V sum) const {
        V base = absolute(sub(b, q));
        V product = (twice & 1u) ? square_root(base) : V(1.0f);
        for (unsigned whole = twice >> 1; whole != 0; whole >>= 1) {
            if (whole & 1u) product = mul(product, base);
            base = mul(base, base);
        }
        return add(product, sum);
    }
};

struct LpAny : LpRoot {
    static constexpr float kSmallestSum = kUnderflowGuard;
    static constexpr bool kCosine = false;
    template <class Q, class V>
    HONEYTRACE_HD V accumulate(Q q, V b, V sum) const {
        return add(power(absolute(sub(b, q)), exponent, 0.0f), sum);
    }
};

}  // namespace honeytrace::HONEYTRACE_LEVEL
