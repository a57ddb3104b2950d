// Fuzz bytes read as sizes, choices and rows of numbers. Where the bytes end, a generator seeded by all of them goes
// on, so that short inputs reach large problems and every input is reproducible.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#include "core/halves.h"
#include "cpu/kernels.h"

namespace honeytrace::fuzz {

class Bytes {
public:
    Bytes(const uint8_t* data, size_t size) : next_(data), left_(size), state_(0xcbf29ce484222325u) {
        for (size_t i = 0; i < size; ++i) state_ = (state_ ^ data[i]) * 0x100000001b3u;
    }

    uint8_t byte() {
        if (left_ == 0) return static_cast<uint8_t>(random());
        --left_;
        return *next_++;
    }
    bool flag() { return byte() & 1u; }
    size_t below(size_t limit) { return limit <= 256 ? byte() % limit : (byte() * 256u + byte()) % limit; }
    // In [least, most], the ends and the tails of a panel more often than others.
    size_t size(size_t least, size_t most) {
        const size_t choice = byte(), span = most - least + 1;
        const size_t corners[] = {least, least + 1, most, 15, 16, 17, 31, 33};
        const size_t corner = corners[choice % 8];
        return choice < 96 && corner >= least && corner <= most ? corner : least + below(span);
    }
    uint32_t word() {
        uint32_t out = 0;
        for (int i = 0; i < 4; ++i) out = out << 8 | byte();
        return out;
    }

    // splitmix64
    uint64_t random() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    double uniform() { return static_cast<double>(random() >> 11) * 0x1p-53; }

private:
    const uint8_t* next_;
    size_t left_;
    uint64_t state_;
};

// What a row of numbers is made of.
enum class Kind : int { kOrdinary, kQuarters, kTiny, kHuge, kSpecial, kRaw, kMixed };
constexpr size_t kKinds = 7;

inline float number(Bytes& bytes, Kind kind) {
    constexpr float special[] = {
        0.0f,          -0.0f,          0x1p-149f,        -0x1p-149f,         0x1p-126f, 1.0f,     -1.0f,  0x1p127f,
        3.4028235e38f, -3.4028235e38f, __builtin_inff(), __builtin_nanf(""), 65504.0f,  0x1p-60f, 0x1p60f};
    const float plain = static_cast<float>(bytes.uniform() + bytes.uniform() + bytes.uniform() - 1.5);
    switch (kind) {
        case Kind::kOrdinary: return plain;
        case Kind::kQuarters: return static_cast<float>(static_cast<int>(bytes.random() % 9) - 4) * 0.25f;
        case Kind::kTiny: return std::ldexp(plain, -140 + static_cast<int>(bytes.random() % 40));
        case Kind::kHuge: return std::ldexp(plain, 90 + static_cast<int>(bytes.random() % 37));
        case Kind::kSpecial: return special[bytes.byte() % (sizeof special / sizeof special[0])];
        case Kind::kRaw: return baseline::float_of(bytes.word());
        case Kind::kMixed: return std::ldexp(plain, static_cast<int>(bytes.random() % 280) - 140);
    }
    return 0.0f;
}

// Exactly as large as it must be, so that reading one element too many is found.
template <class T>
class Exactly {
public:
    explicit Exactly(size_t size) : data_(new T[size]), size_(size) {}
    T* get() const { return data_.get(); }
    size_t size() const { return size_; }
    T& operator[](size_t i) const { return data_[i]; }

private:
    std::unique_ptr<T[]> data_;
    size_t size_;
};

inline Exactly<float> finite_numbers(Bytes& bytes, size_t size) {
    const Kind kind = static_cast<Kind>(bytes.byte() % kKinds);
    Exactly<float> out(size);
    for (size_t i = 0; i < size; ++i) {
        const float value = number(bytes, kind);
        out[i] = std::isfinite(value) ? value : 1.0f;
    }
    return out;
}

// Rows in one of the dtypes, at a stride of their own, with a NaN between them wherever there is room.
class Rows {
public:
    Rows(Bytes& bytes, size_t rows, size_t columns)
        : dtype(static_cast<DType>(bytes.byte() % 3)),
          rows_(rows),
          columns_(columns),
          stride_(columns + (bytes.byte() % 4 == 0 ? bytes.below(5) : 0)),
          wide_(elements()),
          half_(elements()) {
        const Kind kind = static_cast<Kind>(bytes.byte() % kKinds);
        const bool repeats = bytes.byte() % 8 == 0;
        for (size_t i = 0; i < wide_.size(); ++i) {
            const bool between = i % stride_ >= columns_;
            put(i, between ? __builtin_nanf("") : number(bytes, kind));
            if (repeats && !between && i >= stride_) copy(i, i - stride_);
        }
    }

    const DType dtype;

    const void* data() const { return dtype == DType::kFloat32 ? static_cast<const void*>(wide_.get()) : half_.get(); }
    RowSource source() const { return {data(), dtype, rows_, columns_, stride_}; }
    RowSource row(size_t i) const {
        const size_t bytes = i * stride_ * element();
        return {static_cast<const char*>(data()) + bytes, dtype, 1, columns_, stride_};
    }
    size_t element() const { return dtype == DType::kFloat32 ? 4 : 2; }
    float at(size_t row, size_t column) const { return value(dtype, data(), row * stride_ + column); }
    bool finite(size_t row) const {
        for (size_t c = 0; c < columns_; ++c)
            if (!std::isfinite(at(row, c))) return false;
        return true;
    }

    static float value(DType dtype, const void* data, size_t i) {
        if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
        const uint16_t half = static_cast<const uint16_t*>(data)[i];
        return dtype == DType::kFloat16 ? baseline::float_from_float16(half) : baseline::float_from_bfloat16(half);
    }

private:
    size_t elements() const { return rows_ == 0 ? 0 : (rows_ - 1) * stride_ + columns_; }
    void put(size_t i, float value) {
        uint32_t bits = baseline::bits_of(value);
        wide_[i] = value;
        if (dtype == DType::kBfloat16) half_[i] = static_cast<uint16_t>(bits >> 16 | (std::isnan(value) ? 1u : 0u));
        if (dtype == DType::kFloat16) {
            const uint16_t beyond =
                std::isnan(value) ? 0x7E00u : static_cast<uint16_t>((bits >> 16 & 0x8000u) | 0x7C00u);
            half_[i] = std::isfinite(value) ? baseline::float16_from_float(value) : beyond;
        }
    }
    void copy(size_t to, size_t from) {
        wide_[to] = wide_[from];
        half_[to] = half_[from];
    }

    size_t rows_, columns_, stride_;
    Exactly<float> wide_;
    Exactly<uint16_t> half_;
};

}  // namespace honeytrace::fuzz
