// Matrix tiles (Intel AMX) for bfloat16: what tile.h and turn.h are to vectors. One instruction
// multiplies up to 16 x 32 by 32 x 16 bfloat16 and adds to 16 x 16 float32. Terms
//
//   pair   two neighbouring output channels of one element of the Linear, the lower one first;
//   where
//          the group has no second one it is zero
//   depth  the pairs of one instruction, at most kMostRows
//   line   one pair for all f of a panel; a position has as many as are a multiple of the depth,
//          those beyond the channels zero (and zero in the weight: nothing meets zero but zero)
//
// The sums are float32, but the instructions take and leave numbers below 2^-126 as zero.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "turn.h"

namespace linfuse {

struct Pair {
  BFloat16 channel[2];
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
  const Pair* weight;           // [k][part of a position][tile of c_in][c_in of the tile][depth]
  const int64_t* kernel;        // [taps] k of a tap
  int64_t weight_step;          // from one k to the next
  int64_t taps;
  int64_t parts;  // of a position: lines / depth
  int64_t depth;
  int64_t rows;   // c_in of a tile
  int64_t width;  // f of a line of the panel, and of the result
};

struct AmxPackTask {
  const BFloat16* from;    // row 0, channel 0, position 0
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
  // Where wanted, sums[f] += sum over channels and positions of scale[channel] * element: in
  // float32 over a few neighbours, then in double.
  double* sums;
  const BFloat16* scale;
};

struct AmxKernels {
  // For the calling thread, before its first product and after its last.
  void (*start)(const AmxShapes& shapes);
  void (*stop)();
  // By (tiles of c_in, tiles of f).
  void (*multiply[Amx::kMostTiles + 1][Amx::kMostTiles + 1])(const AmxTask& task, float* tile);
  void (*pack)(const AmxPackTask& task);
  void (*unpack)(const UnpackTask<BFloat16>& task);
};

// Null where the compiler knows no such instructions. Whether the machine does: SimdLevel::kAmx.
const AmxKernels* amx_kernels();

}  // namespace linfuse
