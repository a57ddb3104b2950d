// What a kernel may ask of the machine: its place in the grid, barriers, warp exchange, copies to shared memory.
//
// Under nvcc each name is one instruction or built-in. Under a host compiler the same names come from simt_host.h
// (tests/simt), which runs every thread of a block as a fibre: so the tests execute these very kernels, launchers
// included, where there is no GPU. Nothing in csrc/cuda uses a CUDA built-in but through this header.
#pragma once

#include "cuda/level.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define HT_DEVICE __device__ __forceinline__
#define HT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define HT_UNROLL(n) _Pragma("unroll")
#define HT_UNROLL_BY(n) HT_PRAGMA(unroll n)
#define HT_PRAGMA(text) _Pragma(#text)
#define HT_LAUNCH(kernel, grid, threads, shared, stream, ...) \
    kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

namespace honeytrace::device {

constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

HT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
HT_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
HT_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
HT_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
HT_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }

HT_DEVICE char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

HT_DEVICE void sync_block() { __syncthreads(); }
HT_DEVICE bool sync_block_and(bool value) { return __syncthreads_and(value) != 0; }
HT_DEVICE bool sync_block_or(bool value) { return __syncthreads_or(value) != 0; }
HT_DEVICE void sync_warp() { __syncwarp(); }
HT_DEVICE uint32_t ballot(bool value) { return __ballot_sync(kWholeWarp, value); }
// T: 4 or 8 bytes. The value of another lane.
template <class T>
HT_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(kWholeWarp, value, lane);
}
HT_DEVICE int count_bits(uint32_t word) { return __popc(word); }
HT_DEVICE int lowest_bit(uint32_t word) { return __ffs(static_cast<int>(word)) - 1; }

struct Float4 {
    float x, y, z, w;
};
HT_DEVICE Float4 load4(const float* p) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    return {v.x, v.y, v.z, v.w};
}
HT_DEVICE void store4(float* p, Float4 v) { *reinterpret_cast<float4*>(p) = make_float4(v.x, v.y, v.z, v.w); }
struct Words4 {
    uint32_t word[4];
};
HT_DEVICE Words4 load_words4(const void* p) {
    const uint4 v = *static_cast<const uint4*>(p);
    return {{v.x, v.y, v.z, v.w}};
}
HT_DEVICE void store_words4(void* p, Words4 v) {
    *static_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

// 16 bytes from global to shared memory, past the registers; 16 zero bytes unless `there`.
HT_DEVICE void copy_async(float* shared, const float* global, bool there) {
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
}
HT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last `pending` groups of this thread's copies have landed.
template <int pending>
HT_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace honeytrace::device

#else

#include "simt_host.h"

#endif
