// Matrix tiles (Intel AMX) for half types: what tile.h and turn.h are to vectors. One instruction
// multiplies up to 16 x 32 by 32 x 16 bfloat16 and adds to 16 x 16 float32. Terms
//
//   pair    two bfloat16 that are multiplied and added together. Of bfloat16, the elements of two
//           neighbouring output channels, zero where the group has no second one. Of float16, the
//           two parts of one element, which give it exactly (split)
//   factor  of bfloat16, a weight's pair. Of float16, a weight has two: its high part twice, its
//   low
//           part twice, so that each part meets each of the Linear's, and all products are exact
//   depth   the pairs of one instruction, at most kMostRows
//   line    one pair for all f of a panel; a position has a multiple of the depth of them, those
//           beyond the channels zero (and zero in the weight: nothing meets zero but zero)
//
// The sums are float32. The instructions take and leave numbers below 2^-126 as zero, which float16
// and its parts never are.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "turn.h"

namespace linfuse {

struct Pair {
  BFloat16 half[2];
};

// value = half[0] + half[1], exactly: the next smaller bfloat16 and what it leaves. Neither is zero
// unless the value is, and both have its sign: so infinity times the parts is infinity times it.
inline Pair split(Float16 value) {
  const float wide = static_cast<float>(value);
  const uint32_t bits = detail::bits_of(wide);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t smaller = magnitude == 0 ? 0 : magnitude - 1;
  const float high = detail::float_of((bits & 0x80000000) | (smaller & 0xffff0000));
  Pair pair;
  pair.half[0].bits = static_cast<uint16_t>(detail::bits_of(high) >> 16);
  pair.half[1].bits = static_cast<uint16_t>(detail::bits_of(wide - high) >> 16);
  return pair;
}

// Output channels of a pair, and factors of a weight.
template <typename T>
struct AmxPairs;
template <>
struct AmxPairs<BFloat16> {
  static constexpr int kChannels = 2;
  static constexpr int kFactors = 1;
};
template <>
struct AmxPairs<Float16> {
  static constexpr int kChannels = 1;
  static constexpr int kFactors = 2;
};

struct Amx {
  static constexpr int kMostRows = 16;
  static constexpr int kLanes = 16;     // f of a tile, and of a vector of float32
  static constexpr int kMostTiles = 2;  // of c_in, and of f
};

// The shapes of the tile registers, as the processor reads them: four for sums, [c_in][f], two for
// weights, [c_in][depth], two for the Linear, [depth][f]; columns of 32 bits.
struct alignas(64) AmxShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  AmxShapes(int64_t c_in_rows, int64_t depth) {
    const auto set = [&](int number, int64_t row_count, int64_t columns) {
      rows[number] = static_cast<uint8_t>(row_count);
      row_bytes[number] = static_cast<uint16_t>(columns * 4);
    };
    for (int n = 0; n < 4; ++n) set(n, c_in_rows, Amx::kLanes);
    for (int n = 4; n < 6; ++n) set(n, c_in_rows, depth);
    for (int n = 6; n < 8; ++n) set(n, depth, Amx::kLanes);
  }
};

// tile[c_in][f] = sum over the taps t and the lines of  linear[t][line][f] * weight[t][line][c_in]
struct AmxTask {
  const Pair* linear;           // a packed group of the Linear's weight
  const int64_t* linear_start;  // [taps] where [line][f] of a tap begins
  const Pair* weight;           // [k][part][factor][tile of c_in][c_in of the tile][depth]
  const int64_t* kernel;        // [taps] k of a tap
  int64_t weight_step;          // from one k to the next
  int64_t taps;
  int64_t parts;    // of a position: lines / depth
  int64_t factors;  // of a weight
  int64_t depth;
  int64_t rows;         // c_in of a tile
  int64_t linear_line;  // from one line to the next
  int64_t width;        // from one c_in of the result to the next
};

template <typename T>
struct AmxPackTask {
  const T* from;           // row 0, channel 0, position 0
  int64_t row_stride;      // in elements
  int64_t channel_stride;  // likewise
  int64_t position_stride;
  int64_t rows;      // that exist; what fills the last vector is never seen
  int vectors;       // of f
  int64_t count;     // positions
  int64_t channels;  // that exist
  int64_t lines;
  Pair* to;  // position n of a line goes to `to + n * step + line * width`; null: only the sums
  int64_t step;
  int64_t width;
  bool stream;  // whether to write past the caches
  // Where wanted, sums[f] += sum over channels and positions of scale[channel] * element: in
  // float32 over a few neighbours, then in double.
  double* sums;
  const T* scale;
};

// Two of them are for TurnSet.
template <typename T>
struct AmxTurns {
  // The pairs of a line's neighbouring positions, which lie side by side; `channels` exist.
  void (*pair)(const T* from, int64_t channel_stride, int64_t channels, int64_t count, Pair* to);
  void (*pack)(const AmxPackTask<T>& task);
  void (*unpack)(const UnpackTask<T>& task);
  void (*unpack_lines)(const UnpackTask<T>& task);
};

struct AmxKernels : AmxTurns<BFloat16>, AmxTurns<Float16> {
  // For the calling thread, before its first product and after its last.
  void (*start)(const AmxShapes& shapes);
  void (*stop)();
  // By (tiles of c_in, tiles of f).
  void (*multiply[Amx::kMostTiles + 1][Amx::kMostTiles + 1])(const AmxTask& task, float* tile);
};

// Null where the compiler knows no such instructions. Whether the machine does: SimdLevel::kAmx.
const AmxKernels* amx_kernels();

}  // namespace linfuse
