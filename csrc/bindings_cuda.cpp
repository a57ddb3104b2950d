// The Python module honeytrace._cuda: addresses, sizes and a stream in, nothing of Torch known.
//
// honeytrace/ops/cuda_backend.py gives it device addresses of tensors that honeytrace/ops has validated, and a
// workspace. Every operation returns a cudaError_t as an integer, 0 for success.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/launch.h"

namespace py = pybind11;
using namespace honeytrace::device;

namespace {

using Address = uintptr_t;
using RuleTuple = std::tuple<double, double, double, double, int, double, double, double, int64_t>;
// data, dtype, rows, columns, row stride in elements
using RowsTuple = std::tuple<Address, int, int64_t, int64_t, int64_t>;
using BankTuple = std::tuple<Address, Address, int64_t, int64_t>;  // packed, norms, groups, rows
using NeighboursTuple = std::tuple<int64_t, int, double>;          // k, metric, p
using PlanesTuple = std::tuple<Address, int64_t>;                  // planes, count
using DeviceTuple = std::tuple<int, int, Address, Address>;        // index, multiprocessors, stream, workspace
using SimilarityTuple = std::tuple<Address, Address, double>;      // offset, scale, confidence weight

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

[[noreturn]] void refuse(const std::string& name, int64_t value, const std::string& expected) {
    throw std::invalid_argument(name + " must be " + expected + ", got " + name + "=" + std::to_string(value));
}

int between(int64_t least, int64_t most, const char* name, int64_t value) {
    if (value < least || value > most)
        refuse(name, value, "between " + std::to_string(least) + " and " + std::to_string(most));
    return static_cast<int>(value);
}

constexpr int64_t kMost = std::numeric_limits<int>::max() - 256;  // room to round up
constexpr int64_t kMostFeatures = 1 << 24;                        // 64 rows of them are counted in 32 bits
constexpr int64_t kMostGroups = 65535;                            // of a grid's third dimension

RowsView rows_of(const RowsTuple& tuple, const char* rows_name, const char* columns_name) {
    const auto [data, dtype, rows, columns, stride] = tuple;
    if (stride < 0) refuse("row_stride", stride, "at least 0");
    const Type type = static_cast<Type>(between(0, 2, "dtype", dtype));
    RowsView view{at<const void>(data),
                  type,
                  between(0, kMost, rows_name, rows),
                  between(1, kMostFeatures, columns_name, columns),
                  stride,
                  false};
    view.aligned = data % 16 == 0 && stride * size_of(type) % 16 == 0;
    return view;
}

Bank bank_of(const BankTuple& tuple) {
    const auto [packed, norms, groups, rows] = tuple;
    return {at<const float>(packed), at<const float>(norms), between(1, kMostGroups, "groups", groups),
            between(1, kMost, "rows", rows)};
}

Neighbours neighbours_of(const NeighboursTuple& tuple, int rows) {
    const auto [k, metric, p] = tuple;
    const auto code = static_cast<Metric>(between(0, 3, "metric", metric));
    if (code == Metric::kLp && !(p >= 1.0 && static_cast<float>(p) <= 3.4028235e38f))
        throw std::invalid_argument("p must be at least 1 and finite, got p=" + std::to_string(p));
    return {between(1, rows, "k", k), code, p};
}

Planes planes_of(const PlanesTuple& tuple) {
    return {at<const float>(std::get<0>(tuple)), between(1, 64, "n_planes", std::get<1>(tuple))};
}

Device device_of(const DeviceTuple& tuple) {
    const auto [index, multiprocessors, stream, workspace] = tuple;
    return {between(0, 1 << 16, "device", index), between(1, 1 << 16, "multiprocessors", multiprocessors),
            at<void>(stream), at<void>(workspace)};
}

// What mixing takes beside its source of similarities.
MixTask mixing_of(const RowsTuple& logits, Address target_logits, int64_t groups, const RuleTuple& rule, uint64_t seed,
                  Address out, Address group, Address flipped) {
    MixTask task{};
    task.logits = rows_of(logits, "batch", "classes");
    task.out = at<void>(out);
    task.out_aligned = out % 16 == 0 && int64_t{task.logits.columns} * size_of(task.logits.type) % 16 == 0;
    task.target_logits = at<const float>(target_logits);
    task.targets_aligned = target_logits % 16 == 0 && task.logits.columns % 4 == 0;
    task.groups = between(1, kMostGroups, "groups", groups);
    std::tie(task.rule.low_confidence, task.rule.low_power, task.rule.high_confidence, task.rule.high_power,
             task.rule.space, task.rule.strength, task.rule.mixing_power, task.rule.flip_power, task.rule.flip_bins) =
        rule;
    between(0, 1, "space", task.rule.space);
    task.seed = seed;
    task.group = at<int64_t>(group);
    task.flipped = at<bool>(flipped);
    return task;
}

int64_t py_workspace_bytes(int64_t batch, int64_t features, int64_t groups, int64_t rows, int64_t k,
                           int multiprocessors) {
    return static_cast<int64_t>(
        plan_of(between(0, kMost, "batch", batch), between(1, kMostFeatures, "features", features),
                between(1, kMostGroups, "groups", groups), between(1, kMost, "rows", rows), between(1, kMost, "k", k),
                between(1, 1 << 16, "multiprocessors", multiprocessors))
            .bytes);
}

py::dict py_plan(int64_t batch, int64_t features, int64_t groups, int64_t rows, int64_t k, int multiprocessors) {
    py_workspace_bytes(batch, features, groups, rows, k, multiprocessors);
    const Plan plan = plan_of(static_cast<int>(batch), static_cast<int>(features), static_cast<int>(groups),
                              static_cast<int>(rows), static_cast<int>(k), multiprocessors);
    py::dict out;
    out["few"] = plan.few;
    out["parts"] = plan.parts;
    out["part_rows"] = plan.part_panels * kPanel;
    out["skipped"] = plan.skipped;
    out["exhaustive"] = plan.exhaustive;
    out["bytes"] = plan.bytes;
    return out;
}

int py_feature_distance(const RowsTuple& features, const BankTuple& bank_tuple, const NeighboursTuple& neighbours,
                        Address distance, Address index, const DeviceTuple& device) {
    const Bank bank = bank_of(bank_tuple);
    return (feature_distance(rows_of(features, "batch", "features"), bank, neighbours_of(neighbours, bank.rows),
                             at<float>(distance), at<int32_t>(index), device_of(device)));
}

int py_sign_hash(const RowsTuple& features, const PlanesTuple& planes, Address bucket, const DeviceTuple& device) {
    return (
        sign_hash(rows_of(features, "batch", "features"), planes_of(planes), at<int64_t>(bucket), device_of(device)));
}

int py_watermark_mix(const RowsTuple& logits, Address similarity, Address target_logits, Address bucket, int64_t groups,
                     const RuleTuple& rule, uint64_t seed, Address out, Address group, Address flipped,
                     const DeviceTuple& device) {
    MixTask task = mixing_of(logits, target_logits, groups, rule, seed, out, group, flipped);
    task.source = at<const float>(similarity);
    task.bucket = at<const int64_t>(bucket);
    return (watermark_mix(task, device_of(device)));
}

int py_watermark(const RowsTuple& features, const RowsTuple& logits, const BankTuple& bank_tuple, Address target_logits,
                 const PlanesTuple& planes, const NeighboursTuple& neighbours, const SimilarityTuple& similarity_rule,
                 const RuleTuple& rule, uint64_t seed, Address out, Address similarity, Address group, Address flipped,
                 const DeviceTuple& device) {
    const Bank bank = bank_of(bank_tuple);
    MixTask task = mixing_of(logits, target_logits, bank.groups, rule, seed, out, group, flipped);
    task.far.offset = at<const float>(std::get<0>(similarity_rule));
    task.far.scale = at<const float>(std::get<1>(similarity_rule));
    task.far.confidence_weight = static_cast<float>(std::get<2>(similarity_rule));
    task.similarity = at<float>(similarity);
    return (watermark(rows_of(features, "batch", "features"), bank, neighbours_of(neighbours, bank.rows),
                      planes_of(planes), task, device_of(device)));
}

int py_compose(Address a, Address b, Address mask, Address out, int dtype, int mask_dtype, int64_t count,
               const std::tuple<int64_t, int64_t>& inner_sizes, const std::tuple<int64_t, int64_t, int64_t>& steps,
               const DeviceTuple& device) {
    ComposeTask task{};
    task.a = at<const void>(a);
    task.b = at<const void>(b);
    task.mask = at<const void>(mask);
    task.out = at<void>(out);
    task.type = static_cast<Type>(between(0, 2, "dtype", dtype));
    task.mask_type = static_cast<Type>(between(0, 2, "mask_dtype", mask_dtype));
    task.count = count;
    std::tie(task.middle, task.inner) = inner_sizes;
    if (task.middle < 1 || task.inner < 1) refuse("sizes", std::min(task.middle, task.inner), "at least 1");
    std::tie(task.outer_step, task.middle_step, task.inner_step) = steps;
    return (compose(task, device_of(device)));
}

py::dict py_build_info() {
    py::dict info;
    info["version"] = HONEYTRACE_VERSION;
    info["compiler"] = HONEYTRACE_COMPILER;
    info["architectures"] = HONEYTRACE_ARCHITECTURES;
    return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
    using Release = py::call_guard<py::gil_scoped_release>;
    module.doc() = "CUDA kernels of honeytrace on raw addresses; use honeytrace.ops.";
    module.def("workspace_bytes", &py_workspace_bytes, py::arg("batch"), py::arg("features"), py::arg("groups"),
               py::arg("rows"), py::arg("k"), py::arg("multiprocessors"));
    module.def("plan", &py_plan, py::arg("batch"), py::arg("features"), py::arg("groups"), py::arg("rows"),
               py::arg("k"), py::arg("multiprocessors"));
    module.def("feature_distance", &py_feature_distance, Release(), py::arg("features"), py::arg("bank"),
               py::arg("neighbours"), py::arg("distance_ptr"), py::arg("index_ptr"), py::arg("device"));
    module.def("sign_hash", &py_sign_hash, Release(), py::arg("features"), py::arg("planes"), py::arg("bucket_ptr"),
               py::arg("device"));
    module.def("watermark_mix", &py_watermark_mix, Release(), py::arg("logits"), py::arg("similarity_ptr"),
               py::arg("target_logits_ptr"), py::arg("bucket_ptr"), py::arg("groups"), py::arg("rule"), py::arg("seed"),
               py::arg("out_ptr"), py::arg("group_ptr"), py::arg("flipped_ptr"), py::arg("device"));
    module.def("watermark", &py_watermark, Release(), py::arg("features"), py::arg("logits"), py::arg("bank"),
               py::arg("target_logits_ptr"), py::arg("planes"), py::arg("neighbours"), py::arg("similarity"),
               py::arg("rule"), py::arg("seed"), py::arg("out_ptr"), py::arg("similarity_ptr"), py::arg("group_ptr"),
               py::arg("flipped_ptr"), py::arg("device"));
    module.def("compose", &py_compose, Release(), py::arg("a_ptr"), py::arg("b_ptr"), py::arg("mask_ptr"),
               py::arg("out_ptr"), py::arg("dtype"), py::arg("mask_dtype"), py::arg("count"), py::arg("inner_sizes"),
               py::arg("steps"), py::arg("device"));
    module.def("error_name", [](int code) { return std::string(error_name(code)); });
    module.def("error_text", [](int code) { return std::string(error_text(code)); });
    module.def("build_info", &py_build_info);
}
