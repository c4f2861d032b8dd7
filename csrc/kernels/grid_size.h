// How many blocks a launch has.
#pragma once

#include <algorithm>
#include <cstdint>

namespace linfuse {

// Enough to keep a large card busy: about eight for each of its multiprocessors.
constexpr int64_t kManyBlocks = 1 << 10;

// One for every per_block items, up to more than any card runs at a time: a kernel's blocks go on
// with what is left.
inline unsigned grid_of(int64_t items, int64_t per_block = 1) {
  constexpr int64_t kMostBlocks = int64_t{1} << 20;
  return static_cast<unsigned>(std::min((items + per_block - 1) / per_block, kMostBlocks));
}

}  // namespace linfuse
