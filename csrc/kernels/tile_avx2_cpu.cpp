// Haswell and later: 16 registers, 12 of them for sums.
#include <cstring>
#include <type_traits>
#include <utility>

#include "simd_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace linfuse {
namespace {

#define LINFUSE_F16C
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 12;
#include "simd_kernels.inl"

}  // namespace

const SimdKernels& simd_kernels_avx2() {
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
