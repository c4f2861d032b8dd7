// SSE2 on x86-64, NEON on arm64: what every machine of the architecture has.
#include "tile.h"

namespace linfuse {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kRegisters = 12;
#include "tile.inl"

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

}  // namespace linfuse
