// SSE2 on x86-64, NEON on arm64: what every machine of the architecture has.
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "simd_kernels.h"

namespace linfuse {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kRegisters = 12;
#include "simd_kernels.inl"

}  // namespace

const SimdKernels& simd_kernels_baseline() {
  static const SimdKernels kernels = make_simd_kernels();
  return kernels;
}

}  // namespace linfuse
