#include <cstdlib>
#include <stdexcept>

#include "amx.h"
#include "simd.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace linfuse {
namespace {

#if defined(__x86_64__)
// Not a name that every compiler knows.
bool f16c_available() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & 1u << 29) != 0;
}

// Whether the compiler, the processor and the system have what amx.h needs. The state of the tiles
// is large, so Linux wants to be asked for it; what it grants holds for all threads of the process.
bool amx_available() {
#if defined(__linux__)
  if (amx_kernels() == nullptr) return false;
  unsigned a, b, c, d;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kBFloat16) == 0 || (d & kTile) == 0) return false;
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512bf16")) {
    return false;
  }
  // These names are newer than some headers.
  constexpr long kGetPermission = 0x1022, kRequestPermission = 0x1023, kTileData = 18;
  unsigned long permitted = 0;
  syscall(SYS_arch_prctl, kRequestPermission, kTileData);
  return syscall(SYS_arch_prctl, kGetPermission, &permitted) == 0 &&
         (permitted >> kTileData & 1) != 0;
#else
  return false;
#endif
}
#endif

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
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c_available()) {
    levels.push_back(SimdLevel::kAvx2);
    if (__builtin_cpu_supports("avx512f")) {
      levels.push_back(SimdLevel::kAvx512);
      if (amx_available()) levels.push_back(SimdLevel::kAmx);
    }
  }
#endif
  return levels;
}

const char* simd_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::kAmx:
      return "amx";
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
