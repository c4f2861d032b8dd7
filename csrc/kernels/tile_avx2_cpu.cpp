// Haswell and later: 16 registers, 12 of them for sums.
#include <cstring>
#include <type_traits>
#include <utility>

#include "tile.h"
#include "turn.h"

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
#include "turn.inl"

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

template <>
const TurnSet<float>& turn_set_avx2<float>() {
  static const TurnSet<float> set = make_turn_set<float>();
  return set;
}

template <>
const TurnSet<double>& turn_set_avx2<double>() {
  static const TurnSet<double> set = make_turn_set<double>();
  return set;
}

template <>
const TurnSet<Float16>& turn_set_avx2<Float16>() {
  static const TurnSet<Float16> set = make_turn_set<Float16>();
  return set;
}

template <>
const TurnSet<BFloat16>& turn_set_avx2<BFloat16>() {
  static const TurnSet<BFloat16> set = make_turn_set<BFloat16>();
  return set;
}

}  // namespace linfuse

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
