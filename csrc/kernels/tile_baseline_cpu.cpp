// SSE2 on x86-64, NEON on arm64: what every machine of the architecture has.
#include <cstring>
#include <type_traits>
#include <utility>

#include "tile.h"
#include "turn.h"

namespace linfuse {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kRegisters = 12;
#include "tile.inl"
#include "turn.inl"

}  // namespace

template <>
const TileSet<float>& tile_set_baseline<float>() {
  static const TileSet<float> set = make_tile_set<float>();
  return set;
}

template <>
const TileSet<double>& tile_set_baseline<double>() {
  static const TileSet<double> set = make_tile_set<double>();
  return set;
}

template <>
const TurnSet<float>& turn_set_baseline<float>() {
  static const TurnSet<float> set = make_turn_set<float>();
  return set;
}

template <>
const TurnSet<double>& turn_set_baseline<double>() {
  static const TurnSet<double> set = make_turn_set<double>();
  return set;
}

template <>
const TurnSet<Float16>& turn_set_baseline<Float16>() {
  static const TurnSet<Float16> set = make_turn_set<Float16>();
  return set;
}

template <>
const TurnSet<BFloat16>& turn_set_baseline<BFloat16>() {
  static const TurnSet<BFloat16> set = make_turn_set<BFloat16>();
  return set;
}

}  // namespace linfuse
