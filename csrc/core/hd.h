// The two macros every shared header opens with.
//
// HONEYTRACE_HD marks a function that runs on the host and, under nvcc, on the device as well. It is always inlined,
// unless HONEYTRACE_COMPILER_INLINES leaves that to the compiler: instrumented code (csrc/fuzz) grows beyond reason.
// HONEYTRACE_LEVEL names the instruction set a translation unit is compiled for. Everything here lives in
// honeytrace::<level>, because an inline function that is compiled once with AVX-512 and once without is two
// functions: with one name the linker would keep either, and a machine without AVX-512 would run the wrong one.
#pragma once

#if defined(__CUDACC__)
#define HONEYTRACE_HD __host__ __device__ __forceinline__
#elif defined(HONEYTRACE_COMPILER_INLINES)
#define HONEYTRACE_HD inline
#else
#define HONEYTRACE_HD inline __attribute__((always_inline))
#endif

#ifndef HONEYTRACE_LEVEL
#define HONEYTRACE_LEVEL baseline
#endif
