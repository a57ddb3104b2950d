// The Python module honeytrace._C: addresses and sizes in, nothing of Torch or NumPy known.
//
// honeytrace/ops validates tensors before it gets here; the checks below only keep a wrong size or code from
// becoming a crash. The GIL is released while an operation runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "cpu/pool.h"

namespace py = pybind11;
using namespace honeytrace;

namespace {

using Address = uintptr_t;
using RuleTuple = std::tuple<double, double, double, double, int, double, double, double, int64_t>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

[[noreturn]] void refuse(const std::string& name, int64_t value, const std::string& expected) {
    throw std::invalid_argument(name + " must be " + expected + ", got " + name + "=" + std::to_string(value));
}

size_t at_least(int64_t least, const char* name, int64_t value) {
    if (value < least) refuse(name, value, "at least " + std::to_string(least));
    return static_cast<size_t>(value);
}

DType dtype_of(int code) {
    if (code < 0 || code > 2) refuse("dtype", code, "0 (float32), 1 (float16) or 2 (bfloat16)");
    return static_cast<DType>(code);
}

RowSource rows_of(Address data, int dtype, int64_t rows, int64_t columns, int64_t stride, const char* columns_name) {
    const RowSource source{at<const void>(data), dtype_of(dtype), at_least(0, "batch", rows),
                           at_least(1, columns_name, columns), static_cast<size_t>(stride)};
    // A stride of 0 is an expanded row. Nothing asks for rows that go backwards.
    if (stride < 0) refuse("row_stride", stride, "at least 0");
    return source;
}

Bank bank_of(Address packed, Address norms, int64_t groups, int64_t rows, size_t features) {
    return {at<const float>(packed), at<const float>(norms), at_least(1, "groups", groups), at_least(1, "rows", rows),
            features};
}

Neighbours neighbours_of(int64_t k, int64_t rows, int metric, double p) {
    if (k < 1 || k > rows) refuse("k", k, "between 1 and the number of bank rows M=" + std::to_string(rows));
    if (metric < 0 || metric > 3) refuse("metric", metric, "0 (l1), 1 (l2), 2 (lp) or 3 (cosine)");
    const auto code = static_cast<Metric>(metric);
    // As float32, like everything that is done with it; that refuses what only float64 can tell from infinity.
    if (code == Metric::kLp && !(p >= 1.0 && static_cast<float>(p) <= 3.4028235e38f))
        throw std::invalid_argument("p must be at least 1 and finite, got p=" + std::to_string(p));
    return {static_cast<size_t>(k), code, p};
}

size_t planes_of(int64_t n_planes) {
    if (n_planes < 1 || n_planes > 64) refuse("n_planes", n_planes, "between 1 and 64");
    return static_cast<size_t>(n_planes);
}

Mixing mixing_of(Address target_logits, size_t groups, const RuleTuple& rule, uint64_t seed, Address out, Address group,
                 Address flipped) {
    MixingRule mixing{};
    std::tie(mixing.low_confidence, mixing.low_power, mixing.high_confidence, mixing.high_power, mixing.space,
             mixing.strength, mixing.mixing_power, mixing.flip_power, mixing.flip_bins) = rule;
    if (mixing.space != 0 && mixing.space != 1) refuse("space", mixing.space, "0 (logits) or 1 (probabilities)");
    return {at<const float>(target_logits), groups, mixing, seed, at<void>(out), at<int64_t>(group), at<bool>(flipped)};
}

int64_t py_packed_size(int64_t groups, int64_t rows, int64_t features) {
    const Bank bank{nullptr, nullptr, at_least(1, "groups", groups), at_least(1, "rows", rows),
                    at_least(1, "features", features)};
    return static_cast<int64_t>(bank.packed_floats());
}

void py_pack_bank(Address rows_ptr, int64_t groups, int64_t rows, int64_t features, Address packed, Address norms) {
    py_packed_size(groups, rows, features);
    pack_bank(at<const float>(rows_ptr), static_cast<size_t>(groups), static_cast<size_t>(rows),
              static_cast<size_t>(features), at<float>(packed), at<float>(norms));
}

void py_feature_distance(Address features_ptr, int dtype, int64_t batch, int64_t features, int64_t row_stride,
                         Address packed, Address norms, int64_t groups, int64_t rows, int64_t k, int metric, double p,
                         Address distance, Address index, int64_t threads) {
    const RowSource source = rows_of(features_ptr, dtype, batch, features, row_stride, "features");
    feature_distance(source, bank_of(packed, norms, groups, rows, source.columns), neighbours_of(k, rows, metric, p),
                     at<float>(distance), at<int32_t>(index), at_least(1, "threads", threads));
}

void py_sign_hash(Address features_ptr, int dtype, int64_t batch, int64_t features, int64_t row_stride, Address planes,
                  int64_t n_planes, Address bucket, int64_t threads) {
    sign_hash(rows_of(features_ptr, dtype, batch, features, row_stride, "features"), at<const float>(planes),
              planes_of(n_planes), at<int64_t>(bucket), at_least(1, "threads", threads));
}

void py_watermark_mix(Address logits, int dtype, int64_t batch, int64_t classes, int64_t row_stride, Address similarity,
                      Address target_logits, Address bucket, int64_t groups, const RuleTuple& rule, uint64_t seed,
                      Address out, Address group, Address flipped, int64_t threads) {
    const Mixing mixing = mixing_of(target_logits, at_least(1, "groups", groups), rule, seed, out, group, flipped);
    watermark_mix(rows_of(logits, dtype, batch, classes, row_stride, "classes"), at<const float>(similarity),
                  at<const int64_t>(bucket), mixing, at_least(1, "threads", threads));
}

void py_watermark(Address features_ptr, int features_dtype, int64_t batch, int64_t features, int64_t features_stride,
                  Address logits_ptr, int logits_dtype, int64_t classes, int64_t logits_stride, Address packed,
                  Address norms, int64_t groups, int64_t rows, Address target_logits, Address planes, int64_t n_planes,
                  int64_t k, int metric, double p, Address offset, Address scale, double confidence_weight,
                  const RuleTuple& rule, uint64_t seed, Address out, Address similarity, Address group, Address flipped,
                  int64_t threads, bool constant_time) {
    const RowSource queries = rows_of(features_ptr, features_dtype, batch, features, features_stride, "features");
    const RowSource logits = rows_of(logits_ptr, logits_dtype, batch, classes, logits_stride, "classes");
    const Bank bank = bank_of(packed, norms, groups, rows, queries.columns);
    const SimilarityRule similarity_rule{at<const float>(offset), at<const float>(scale),
                                         static_cast<float>(confidence_weight)};
    watermark(queries, logits, bank, neighbours_of(k, rows, metric, p), at<const float>(planes), planes_of(n_planes),
              similarity_rule, mixing_of(target_logits, bank.groups, rule, seed, out, group, flipped),
              at<float>(similarity), at_least(1, "threads", threads), constant_time ? Effort::kEven : Effort::kLeast);
}

std::tuple<uint32_t, uint32_t, uint32_t, uint32_t> py_philox(std::tuple<uint32_t, uint32_t, uint32_t, uint32_t> counter,
                                                             std::tuple<uint32_t, uint32_t> key) {
    const auto [c0, c1, c2, c3] = counter;
    const baseline::PhiloxWords out = baseline::philox4x32_10({{c0, c1, c2, c3}}, std::get<0>(key), std::get<1>(key));
    return {out.word[0], out.word[1], out.word[2], out.word[3]};
}

py::dict py_build_info() {
    py::dict info;
    info["version"] = HONEYTRACE_VERSION;
    info["compiler"] = HONEYTRACE_COMPILER;
    info["flags"] = HONEYTRACE_FLAGS;
    info["levels"] = compiled_levels();
    info["sanitizers"] = HONEYTRACE_SANITIZERS;
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
    using Release = py::call_guard<py::gil_scoped_release>;
    module.doc() = "CPU kernels of honeytrace on raw addresses; use honeytrace.ops.";
    module.attr("LANES") = kLanes;
    module.def("packed_size", &py_packed_size, py::arg("groups"), py::arg("rows"), py::arg("features"));
    module.def("pack_bank", &py_pack_bank, Release(), py::arg("rows_ptr"), py::arg("groups"), py::arg("rows"),
               py::arg("features"), py::arg("packed_ptr"), py::arg("norms_ptr"));
    module.def("feature_distance", &py_feature_distance, Release(), py::arg("features_ptr"), py::arg("dtype"),
               py::arg("batch"), py::arg("features"), py::arg("row_stride"), py::arg("packed_ptr"),
               py::arg("norms_ptr"), py::arg("groups"), py::arg("rows"), py::arg("k"), py::arg("metric"), py::arg("p"),
               py::arg("distance_ptr"), py::arg("index_ptr"), py::arg("threads"));
    module.def("sign_hash", &py_sign_hash, Release(), py::arg("features_ptr"), py::arg("dtype"), py::arg("batch"),
               py::arg("features"), py::arg("row_stride"), py::arg("planes_ptr"), py::arg("n_planes"),
               py::arg("bucket_ptr"), py::arg("threads"));
    module.def("watermark_mix", &py_watermark_mix, Release(), py::arg("logits_ptr"), py::arg("dtype"), py::arg("batch"),
               py::arg("classes"), py::arg("row_stride"), py::arg("similarity_ptr"), py::arg("target_logits_ptr"),
               py::arg("bucket_ptr"), py::arg("groups"), py::arg("rule"), py::arg("seed"), py::arg("out_ptr"),
               py::arg("group_ptr"), py::arg("flipped_ptr"), py::arg("threads"));
    module.def("watermark", &py_watermark, Release(), py::arg("features_ptr"), py::arg("features_dtype"),
               py::arg("batch"), py::arg("features"), py::arg("features_stride"), py::arg("logits_ptr"),
               py::arg("logits_dtype"), py::arg("classes"), py::arg("logits_stride"), py::arg("packed_ptr"),
               py::arg("norms_ptr"), py::arg("groups"), py::arg("rows"), py::arg("target_logits_ptr"),
               py::arg("planes_ptr"), py::arg("n_planes"), py::arg("k"), py::arg("metric"), py::arg("p"),
               py::arg("offset_ptr"), py::arg("scale_ptr"), py::arg("confidence_weight"), py::arg("rule"),
               py::arg("seed"), py::arg("out_ptr"), py::arg("similarity_ptr"), py::arg("group_ptr"),
               py::arg("flipped_ptr"), py::arg("threads"), py::arg("constant_time") = false);
    module.def("philox4x32_10", &py_philox, py::arg("counter"), py::arg("key"));
    module.def("simd_levels", &usable_levels);
    module.def("simd_level", [] { return std::string(kernels().name); });
    module.def("set_simd_level", &set_level, py::arg("name"));
    module.def("pool_workers", &pool_workers);
    module.def(
        "_ceiling",
        [](int metric, double p, uint64_t repeats, bool scores) {
            const Metric code = neighbours_of(1, 1, metric, p).metric;
            if (scores && code == Metric::kLp) throw std::invalid_argument("scores must be False for lp, got True");
            return scores ? kernels().score_ceiling(code, repeats) : kernels().ceiling(code, p, repeats);
        },
        Release(), py::arg("metric"), py::arg("p"), py::arg("repeats"), py::arg("scores") = false);
    module.def(
        "_set_preselection",
        [](const std::string& when) {
            if (when != "auto" && when != "never" && when != "always")
                throw std::invalid_argument("when must be 'auto', 'never' or 'always', got '" + when + "'");
            set_preselection(when == "auto"    ? Preselection::kAuto
                             : when == "never" ? Preselection::kNever
                                               : Preselection::kAlways);
        },
        py::arg("when"));
    module.def("_preselected", &preselected);
    module.def(
        "_preselection_pays", [](int metric) { return preselection_pays(neighbours_of(1, 1, metric, 2.0).metric); },
        Release(), py::arg("metric"));
    module.def("_set_exhaustive", &set_exhaustive, py::arg("on"));
    module.def("_forget_bounds", &forget_bounds);
    module.def("_bounded_counts", [] {
        const BoundedCounts counts = bounded_counts();
        return std::make_tuple(counts.without_looking, counts.by_bounds, counts.finished);
    });
    module.def("build_info", &py_build_info);
}
