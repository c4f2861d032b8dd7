// Which vector instructions the machine has, asked when the program runs: one binary fits every
// x86-64 and arm64. The environment variable LINFUSE_SIMD (baseline, avx2, avx512, amx) forces a
// level that the machine has; anything else it says is an error.
#pragma once

#include <string>
#include <vector>

namespace linfuse {

// Each has all that the ones before it have. kAmx is AVX-512 and matrix tiles (amx.h).
enum class SimdLevel : int { kBaseline, kAvx2, kAvx512, kAmx };

// Decided at the first call. Throws std::invalid_argument for a level that is unknown or missing.
SimdLevel simd_level();

// From the lowest to the highest that this machine can run.
std::vector<SimdLevel> simd_levels_available();

// "baseline", "avx2", "avx512", "amx".
const char* simd_name(SimdLevel level);

}  // namespace linfuse
