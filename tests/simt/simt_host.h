// csrc/cuda/simt.h for a host compiler: each thread of a block is a fibre, and blocks run one after the other.
//
// It is stricter than a GPU. A barrier that some thread of its block or warp does not reach aborts, copies to shared
// memory land only when they are waited for (HT_SIMT_COPIES=early: at once), loads of 16 bytes must be aligned, shared
// memory starts as NaNs, and HT_SIMT_ORDER=reverse|shuffle runs the fibres in another order: an answer that hangs on a
// missing barrier changes.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define HT_DEVICE inline
#define HT_KERNEL(threads, blocks) void
#define HT_UNROLL(n)
#define HT_UNROLL_BY(n)
#define HT_LAUNCH(kernel, grid, threads, shared, stream, ...) \
    ::simt::run(grid, threads, shared, [=] { kernel(__VA_ARGS__); })

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t code) { return code == 0 ? "cudaSuccess" : "cudaErrorUnknown"; }
inline const char* cudaGetErrorString(cudaError_t code) { return code == 0 ? "no error" : "unknown error"; }

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "simt: %s\n", what);
    std::abort();
}

struct Barrier {
    int size = 0, arrived = 0;
    unsigned generation = 0;
    int total = 0, result = 0;  // what sync_block_and and sync_block_or count
};

struct Copy {
    float* target;
    float value[4];
};

struct Fibre {
    ucontext_t start;
    jmp_buf point;
    bool started = false, done = false;
    std::unique_ptr<char[]> stack{new char[kStack]};
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> open;
};

struct Block {
    std::vector<Fibre> fibres;
    std::vector<int> order;
    std::vector<Barrier> warps;
    Barrier all;
    uint64_t exchange[1024];
    std::vector<char> shared;
    int current = 0;
    unsigned steps = 0;  // counts what could let another fibre go on
    jmp_buf scheduler;
    const std::function<void()>* body = nullptr;
    dim3 index, grid;
};

inline Block*& block() {
    static Block* current = nullptr;
    return current;
}
inline uint64_t& launches() {
    static uint64_t count = 0;
    return count;
}

inline void yield() {
    Block& b = *block();
    if (_setjmp(b.fibres[b.current].point) == 0) _longjmp(b.scheduler, 1);
}

inline void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    ++block()->steps;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        barrier.result = barrier.total;
        barrier.total = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
}

inline int thread() { return block()->current; }
inline Barrier& warp() { return block()->warps[thread() / kWarp]; }

inline void enter() {
    (*block()->body)();
    Block& b = *block();
    Fibre& fibre = b.fibres[b.current];
    if (!fibre.open.empty() || !fibre.groups.empty()) fail("a thread ended with copies that it never waited for");
    fibre.done = true;
    ++b.steps;
    _longjmp(b.scheduler, 1);
}

inline void resume(Fibre& fibre) {
    if (_setjmp(block()->scheduler) != 0) return;
    if (fibre.started) _longjmp(fibre.point, 1);
    fibre.started = true;
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get();
    fibre.start.uc_stack.ss_size = kStack;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, enter, 0);
    setcontext(&fibre.start);
}

inline void order_fibres(Block& b, unsigned salt) {
    const char* name = std::getenv("HT_SIMT_ORDER");
    const int count = static_cast<int>(b.order.size());
    for (int i = 0; i < count; ++i) b.order[i] = name && name[0] == 'r' ? count - 1 - i : i;
    if (!name || name[0] != 's') return;
    uint32_t state = 12345u + salt;
    for (int i = count - 1; i > 0; --i) {
        state = state * 1664525u + 1013904223u;
        std::swap(b.order[i], b.order[(state >> 8) % static_cast<unsigned>(i + 1)]);
    }
}

inline void run_block(Block& b) {
    for (Fibre& fibre : b.fibres) fibre.started = fibre.done = false;
    b.all = Barrier{static_cast<int>(b.fibres.size())};
    b.warps.assign((b.fibres.size() + kWarp - 1) / kWarp, Barrier{kWarp});
    std::memset(b.shared.data(), 0xFF, b.shared.size());
    for (bool more = true; more;) {
        const unsigned before = b.steps;
        more = false;
        for (int i : b.order) {
            if (b.fibres[i].done) continue;
            b.current = i;
            resume(b.fibres[i]);
            more = more || !b.fibres[i].done;
        }
        if (more && b.steps == before) fail("threads wait at barriers that the others never reach");
    }
}

inline void run(dim3 grid, int threads, size_t shared, const std::function<void()>& body) {
    if (threads % kWarp != 0) fail("a block must be whole warps");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) fail("no such grid");
    ++launches();
    static Block storage;
    Block& b = storage;
    block() = &b;
    if (static_cast<int>(b.fibres.size()) != threads) b.fibres = std::vector<Fibre>(threads);
    b.order.resize(threads);
    b.shared.resize(shared + 16);
    b.body = &body;
    b.grid = grid;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                b.index = dim3(x, y, z);
                order_fibres(b, x + 31 * y + 997 * z);
                run_block(b);
            }
}

// Copies may land at once or when they are waited for; by default the latter.
inline bool early_copies() {
    const char* name = std::getenv("HT_SIMT_COPIES");
    return name && name[0] == 'e';
}

inline void check_aligned(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail("16 bytes at an address that is not a multiple of 16");
}

}  // namespace simt

namespace honeytrace::device {

inline int thread_index() { return simt::thread(); }
inline int block_x() { return static_cast<int>(simt::block()->index.x); }
inline int block_y() { return static_cast<int>(simt::block()->index.y); }
inline int block_z() { return static_cast<int>(simt::block()->index.z); }
inline int grid_x() { return static_cast<int>(simt::block()->grid.x); }

inline char* shared_memory() {
    const auto address = reinterpret_cast<uintptr_t>(simt::block()->shared.data());
    return reinterpret_cast<char*>((address + 15) / 16 * 16);
}

inline void sync_block() { simt::wait(simt::block()->all); }
inline bool sync_block_and(bool value) {
    simt::Barrier& all = simt::block()->all;
    all.total += value;
    simt::wait(all);
    const bool result = all.result == all.size;
    return result;
}
inline bool sync_block_or(bool value) {
    simt::Barrier& all = simt::block()->all;
    all.total += value;
    simt::wait(all);
    return all.result != 0;
}
inline void sync_warp() { simt::wait(simt::warp()); }
inline uint32_t ballot(bool value) {
    simt::block()->exchange[simt::thread()] = value;
    sync_warp();
    uint32_t word = 0;
    const int first = simt::thread() / simt::kWarp * simt::kWarp;
    for (int lane = 0; lane < simt::kWarp; ++lane)
        word |= static_cast<uint32_t>(simt::block()->exchange[first + lane]) << lane;
    sync_warp();
    return word;
}
template <class T>
inline T shuffle(T value, int lane) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    uint64_t* mine = &simt::block()->exchange[simt::thread()];
    std::memcpy(mine, &value, sizeof value);
    sync_warp();
    const int first = simt::thread() / simt::kWarp * simt::kWarp;
    T out;
    std::memcpy(&out, &simt::block()->exchange[first + (lane & (simt::kWarp - 1))], sizeof out);
    sync_warp();
    return out;
}
inline int count_bits(uint32_t word) { return __builtin_popcount(word); }
inline int lowest_bit(uint32_t word) { return __builtin_ffs(static_cast<int>(word)) - 1; }

struct Float4 {
    float x, y, z, w;
};
inline Float4 load4(const float* p) {
    simt::check_aligned(p);
    return {p[0], p[1], p[2], p[3]};
}
inline void store4(float* p, Float4 v) {
    simt::check_aligned(p);
    std::memcpy(p, &v, sizeof v);
}
struct Words4 {
    uint32_t word[4];
};
inline Words4 load_words4(const void* p) {
    simt::check_aligned(p);
    Words4 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store_words4(void* p, Words4 v) {
    simt::check_aligned(p);
    std::memcpy(p, &v, sizeof v);
}

inline void copy_async(float* shared, const float* global, bool there) {
    simt::check_aligned(shared);
    if (there) simt::check_aligned(global);
    simt::Copy copy{shared, {0.0f, 0.0f, 0.0f, 0.0f}};
    if (there) std::memcpy(copy.value, global, sizeof copy.value);
    if (simt::early_copies()) std::memcpy(shared, copy.value, sizeof copy.value);
    simt::block()->fibres[simt::thread()].open.push_back(copy);
}
inline void commit_copies() {
    simt::Fibre& fibre = simt::block()->fibres[simt::thread()];
    fibre.groups.push_back(std::move(fibre.open));
    fibre.open.clear();
}
template <int pending>
inline void wait_copies() {
    auto& groups = simt::block()->fibres[simt::thread()].groups;
    while (groups.size() > static_cast<size_t>(pending)) {
        for (const simt::Copy& copy : groups.front()) std::memcpy(copy.target, copy.value, sizeof copy.value);
        groups.erase(groups.begin());
    }
}

}  // namespace honeytrace::device
