// What the ways of fuse_conv_linear cost on a CPU, for the choice among them
// (fuse_conv_linear_cpu.cpp). Each way has its formula beside it, counted in products: of one
// vector, multiplied and added. Beside those of its tiles a way has weights: what each other thing
// that it does costs. They come from the times of layers at random, on all ways (bench/NOTES.md).
// Costs are of the geometry, the number of rows and the type, not of where the Linear lies: no bits
// may depend on that.
#pragma once

#include <algorithm>
#include <limits>

#include "fuse_conv_linear.h"
#include "tile.h"

namespace linfuse {

// Of a way that cannot make a layer, or only with more memory than it may take.
constexpr double kNever = std::numeric_limits<double>::infinity();

// Weights as they were measured with vectors of up to 32 bytes, and of 64, which hold twice as much
// to read and write. Zero: not seen in the times there.
template <typename Weights>
struct Measured {
  Weights narrow;
  Weights wide;

  const Weights& now() const { return simd_level() < SimdLevel::kAvx512 ? narrow : wide; }
};

// Whether rows are turned: in memory neighbours are positions, as a Linear has them, and not rows,
// as with fuse_linear_conv.
inline bool turns_rows(const FuseConvLinearParams& params) {
  return params.weight_stride.position == 1;
}

// How so many vectors and columns are cut into tiles.
struct Tiling {
  double tiles;
  double rows;     // of tiles: those that have the same columns
  double columns;  // of a tile
  double product;  // what one costs there: sums that wait for each other leave units idle

  template <typename A>
  Tiling(const TileSet<A>& set, int64_t vectors, int64_t all_columns) {
    constexpr double kBusy = 12;  // sums
    constexpr Measured<double> kIdle = {.narrow = 0.8, .wide = 0.2};
    const int64_t blocks = divide_up(all_columns, set.most_channels);
    const int64_t of_tile = divide_up(all_columns, blocks);
    const int64_t most = std::min(vectors, set.most_vectors(of_tile));
    rows = static_cast<double>(divide_up(vectors, most));
    tiles = rows * static_cast<double>(blocks);
    columns = static_cast<double>(of_tile);
    product = 1 + kIdle.now() * std::max(0.0, kBusy / static_cast<double>(most * of_tile) - 1);
  }

  // With what its share of a vector costs that is read for all columns of a tile.
  double product_with(double load) const { return product + load / columns; }
};

inline int64_t weights_of(const Geometry& g) {
  return g.out_channels * g.in_channels_per_group() * g.kernel_positions();
}

// Taps of all positions that do not fall on padding, for an output and an input channel.
inline double valid_taps(const Geometry& g) {
  double taps = 1;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = g.axis[a];
    const int64_t coarse = g.coarse_size(a);
    int64_t of_axis = 0;
    for (int64_t k = 0; k < axis.kernel; ++k) {
      if (g.padding_mode != PaddingMode::kZeros) {
        of_axis += coarse;
        continue;
      }
      // Fine positions are coarse ones times the stride, from `first` on.
      const int64_t first = k * axis.dilation - axis.pad_low;
      const int64_t off = first < 0 ? divide_up(-first, axis.stride) : 0;
      const int64_t most = g.fine_size(a) - 1 - first;
      if (most >= 0)
        of_axis += std::max<int64_t>(0, std::min(coarse, most / axis.stride + 1) - off);
    }
    taps *= static_cast<double>(of_axis);
  }
  return taps;
}

}  // namespace linfuse
