#include <cstdlib>
#include <stdexcept>

#include "simd.h"

namespace linfuse {
namespace {

SimdLevel decide() {
  const std::vector<SimdLevel> available = simd_levels_available();
  const char* forced = std::getenv("LINFUSE_SIMD");
  if (forced == nullptr || *forced == '\0') return available.back();
  std::string names;
  for (SimdLevel level : available) {
    if (std::string(forced) == simd_name(level)) return level;
    names += std::string(names.empty() ? "" : ", ") + simd_name(level);
  }
  throw std::invalid_argument("LINFUSE_SIMD must be one of the levels of this machine (" + names +
                              "), got '" + forced + "'");
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = decide();
  return level;
}

std::vector<SimdLevel> simd_levels_available() {
  std::vector<SimdLevel> levels = {SimdLevel::kBaseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    levels.push_back(SimdLevel::kAvx2);
    if (__builtin_cpu_supports("avx512f")) levels.push_back(SimdLevel::kAvx512);
  }
#endif
  return levels;
}

const char* simd_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::kAvx2:
      return "avx2";
    case SimdLevel::kAvx512:
      return "avx512";
    case SimdLevel::kBaseline:
      break;
  }
  return "baseline";
}

}  // namespace linfuse
