// 32 registers, 24 of them for sums.
#include <cstring>
#include <type_traits>
#include <utility>

#include "simd_kernels.h"

#if defined(__x86_64__)

#if !defined(__clang__)
// GCC 12 says so of its own intrinsics, which leave a masked operand open on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma")
#endif

namespace linfuse {
namespace {

#define LINFUSE_AVX512
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 24;
#include "simd_kernels.inl"

}  // namespace

const SimdKernels& simd_kernels_avx512() {
  static const SimdKernels kernels = make_simd_kernels();
  return kernels;
}

}  // namespace linfuse

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
