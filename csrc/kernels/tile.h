// The inner loop of fuse_conv_linear: one small matrix product that stays in registers.
//
//   tile[n][f] = sum over taps t, channels c of  linear[t][c][f] * weight[t][c][n]
//
//   f  a row of the Linear, `width` of them innermost, one vector register after the other
//   n  an input channel, at most TileSet::most_channels at a time, its weights broadcast
//   t  a valid tap of one input position;  c  an output channel of the group
//
// tile.inl is the one source of it, compiled once per SIMD level and element type.
#pragma once

#include <cstdint>

#include "simd.h"

namespace linfuse {

template <typename A>
struct TileTask {
  const A* linear;              // a packed group of the Linear's weight
  const int64_t* linear_start;  // [taps] where [c][f] of a tap begins
  int64_t linear_line;          // from one c to the next: the tile's width, or more
  const A* weight;              // packed weights of the n at hand, [k][c][n]
  const int64_t* kernel;        // [taps] k of a tap
  int64_t weight_step;          // from one k to the next
  int64_t weight_line;          // from one c to the next: n, or more
  int64_t taps;
  int64_t channels;
  int64_t tile_line;  // from one n to the next in the tile; 0 for its width
};

// A running sum of n products is off by up to n roundings; sums of sums are not. So the registers
// are added to the tile, and start again from zero, after this many products.
constexpr int64_t kFlushAfter = 512;

template <typename A>
using Tile = void (*)(const TileTask<A>& task, A* tile);

// The tiles of one level, by (vectors of f, channels n).
template <typename A>
struct TileSet {
  static constexpr int kMostVectors = 8;
  static constexpr int kMostChannels = 12;
  static constexpr int kMostLanes = 16;

  int lanes;          // of one vector
  int registers;      // for sums: vectors * channels of a tile never exceed it
  int most_channels;  // n of the widest tile with two vectors

  // Vectors of the widest tile with so many channels.
  int64_t most_vectors(int64_t channels) const {
    return registers / channels < kMostVectors ? registers / channels : kMostVectors;
  }

  Tile<A> tile[kMostVectors + 1][kMostChannels + 1];

  // Adds line n of a tile to to[n], for every n where that is not null.
  void (*add_lines)(const A* tile, int64_t width, int64_t lines, A* const* to);
};

}  // namespace linfuse
