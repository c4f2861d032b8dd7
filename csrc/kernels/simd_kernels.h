// Everything that is compiled once per SIMD level, by level.
#pragma once

#include "move.h"
#include "tile.h"
#include "turn.h"

namespace linfuse {

// Converts to any of the sets: `const TileSet<float>& tiles = simd_kernels(level)`.
struct SimdKernels : TileSet<float>,
                     TileSet<double>,
                     TurnSet<float>,
                     TurnSet<double>,
                     TurnSet<Float16>,
                     TurnSet<BFloat16>,
                     MoveSet<int32_t>,
                     MoveSet<int64_t> {};

const SimdKernels& simd_kernels_baseline();
const SimdKernels& simd_kernels_avx2();
const SimdKernels& simd_kernels_avx512();
const SimdKernels& simd_kernels_amx();

inline const SimdKernels& simd_kernels(SimdLevel level) {
#if defined(__x86_64__)
  if (level == SimdLevel::kAmx) return simd_kernels_amx();
  if (level == SimdLevel::kAvx512) return simd_kernels_avx512();
  if (level == SimdLevel::kAvx2) return simd_kernels_avx2();
#endif
  (void)level;
  return simd_kernels_baseline();
}

}  // namespace linfuse
