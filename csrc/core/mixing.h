// What happens to one answer once its similarities are known: group, shaping, flip and mixing (DESIGN section 3).
// Decisions and mixing weights are computed in double from float32 similarity and confidence, so that every
// backend that does the same agrees on them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "double_power.h"
#include "hd.h"
#include "philox.h"

namespace honeytrace::HONEYTRACE_LEVEL {

// Rule as the bindings receive it, validated in Python.
struct MixingRule {
    double low_confidence, low_power, high_confidence, high_power;
    int space;  // 0 logits, 1 probabilities
    double strength, mixing_power, flip_power;
    int64_t flip_bins;

    // By plain comparison these switch shaping off: a confidence is in (0, 1].
    HONEYTRACE_HD bool needs_confidence() const { return low_confidence > 0.0 || high_confidence < 1.0; }
};

struct Decision {
    bool flipped;
    double weight;
};

// base^exponent for base in [0, 1]. Small exponents as products and roots, in the order that torch.pow uses for a
// scalar exponent, so that the flip decision of the reference is met bit for bit.
HONEYTRACE_HD double shaped_power(double base, double exponent) {
    if (exponent == 0.5) return sqrt(base);
    if (exponent == 1.0) return base;
    if (exponent == 2.0) return base * base;
    if (exponent == 3.0) return base * base * base;
    return double_power(base, exponent);
}

// clip((offset - distance - confidence_weight * confidence) / scale, 0, 1), all in float32; NaN gives 0.
HONEYTRACE_HD float similarity_of(float distance, float confidence, float offset, float scale,
                                  float confidence_weight) {
    const float value = (offset - distance - confidence_weight * confidence) / scale;
    return value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f;
}

// Index of the first largest similarity; NaN counts as 0, and so does anything negative.
HONEYTRACE_HD size_t strongest_group(const float* similarity, size_t groups) {
    size_t best = 0;
    float largest = 0.0f;
    for (size_t g = 0; g < groups; ++g) {
        if (similarity[g] > largest) {
            largest = similarity[g];
            best = g;
        }
    }
    return best;
}

// similarity in (0, 1]; confidence is read only where the rule needs it.
HONEYTRACE_HD Decision decide(const MixingRule& rule, float similarity, float confidence, uint64_t seed,
                              uint64_t bucket, uint32_t group) {
    double s = similarity;
    if (rule.needs_confidence()) {
        const double c = confidence;
        if (c < rule.low_confidence) s = shaped_power(s, rule.low_power);
        if (c > rule.high_confidence) s = shaped_power(s, rule.high_power);
    }
    Decision out{false, rule.strength * shaped_power(s, rule.mixing_power)};
    if (rule.flip_bins > 0) {
        const double bins = static_cast<double>(rule.flip_bins);
        const double probability = floor(shaped_power(s, rule.flip_power) * bins) / bins;
        out.flipped = flip_uniform(seed, bucket, group) < probability;
    }
    return out;
}

HONEYTRACE_HD double logaddexp(double a, double b) {
    const double high = a > b ? a : b;
    const double low = a > b ? b : a;
    if (low == -INFINITY) return high;
    return high + log1p(exp(low - high));
}

// One class of a mixed answer in probability space; the logs are of 1 - w and w, -infinity allowed.
HONEYTRACE_HD double mix_probability(double logit, double log_keep, double logit_lse, double log_weight,
                                     double target_log_softmax) {
    return logaddexp(logit + log_keep, logit_lse + log_weight + target_log_softmax);
}

// One class of a mixed answer in logit space.
HONEYTRACE_HD float mix_logit(float logit, float target, float weight) {
    return (1.0f - weight) * logit + weight * target;
}

}  // namespace honeytrace::HONEYTRACE_LEVEL
