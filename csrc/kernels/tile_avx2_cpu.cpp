// Haswell and later: 16 registers, 12 of them for sums.
#include "tile.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace linfuse {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kRegisters = 12;
#include "tile.inl"

}  // namespace

template <>
const TileSet<float>& tile_set_avx2<float>() {
  static const TileSet<float> set = make_tile_set<float>();
  return set;
}

template <>
const TileSet<double>& tile_set_avx2<double>() {
  static const TileSet<double> set = make_tile_set<double>();
  return set;
}

}  // namespace linfuse

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
