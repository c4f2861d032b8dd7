// to[n] = from[n] + shift: the columns of a row from those of another, or of another channel.
//
// move.inl is the one source, compiled once per SIMD level and type.
#pragma once

#include <cstdint>

namespace linfuse {

template <typename Index>
struct MoveSet {
  void (*move)(const Index* from, Index shift, int64_t count, Index* to);
};

}  // namespace linfuse
