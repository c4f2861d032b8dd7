// fused[f, (c_in, first + n * stride)] = what the convolution on the subgrid gives to n; the rest
// is zero
//
// On an axis where the kernel has one element, a stride of s reads every s-th position. These are a
// grid of their own, on which the convolution has no stride there. Some rows of the result are made
// on it, by whichever way suits it, and then spread over zeros: the holes, most of the result, are
// cleared and not computed.
#include <algorithm>
#include <cstring>
#include <vector>

#include "fuse_conv_linear_by_subgrid.h"
#include "memory.h"

namespace linfuse {
namespace {

// Rows at a time: as many as stay in a cache, but enough for the way that makes them.
constexpr int64_t kCachedBytes = int64_t{4} << 20;
constexpr int64_t kMostBytes = int64_t{16} << 20;
constexpr int64_t kFewRows = 64;
// Positions for each of the subgrid: with fewer, spreading costs what it saves.
constexpr int64_t kLeastPositions = 2;

struct AxisGrid {
  int64_t first = 0;  // position of the subgrid's first
  int64_t step = 1;
};

struct Subgrid {
  Geometry geometry;  // of the convolution on it
  AxisGrid axis[kAxes];
};

bool has_holes(const Axis& axis) { return axis.kernel == 1 && axis.stride > 1; }

// With no positions on an axis where all outputs read padding.
Subgrid make_subgrid(const Geometry& g) {
  Subgrid grid = {g, {}};
  for (int a = 0; a < kAxes; ++a) {
    Axis& axis = grid.geometry.axis[a];
    if (!has_holes(axis)) continue;
    // Output positions [first, last) read no padding.
    const int64_t first = std::min(axis.out, divide_up(axis.pad_low, axis.stride));
    const int64_t last = std::min(axis.out, divide_up(axis.pad_low + axis.in, axis.stride));
    grid.axis[a] = {first * axis.stride - axis.pad_low, axis.stride};
    axis.in = last - first;
    axis.stride = axis.dilation = 1;
    axis.pad_low = first;
    axis.pad_high = axis.out - last;
  }
  return grid;
}

// Gives the same memory to every call of a launcher that asks for the same.
class ReusedScratch {
 public:
  explicit ReusedScratch(const Allocate& allocate) : allocate_(allocate) {}

  void start() { next_ = 0; }
  void* operator()(int64_t bytes) {
    if (next_ == blocks_.size()) blocks_.push_back({nullptr, 0});
    Block& block = blocks_[next_++];
    if (block.bytes < bytes) block = {allocate_(bytes), bytes};
    return block.data;
  }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };

  const Allocate& allocate_;
  std::vector<Block> blocks_;
  size_t next_ = 0;
};

// One channel of a row: `from` on the subgrid, `to` with the holes.
template <typename T>
void spread(const Geometry& g, const Subgrid& grid, const T* from, T* to) {
  std::memset(static_cast<void*>(to), 0, static_cast<size_t>(g.in_positions()) * sizeof(T));
  const Axis(&axis)[kAxes] = grid.geometry.axis;
  for (int64_t n0 = 0; n0 < axis[0].in; ++n0) {
    const int64_t i0 = grid.axis[0].first + n0 * grid.axis[0].step;
    for (int64_t n1 = 0; n1 < axis[1].in; ++n1, from += axis[2].in) {
      const int64_t i1 = grid.axis[1].first + n1 * grid.axis[1].step;
      T* const line = to + (i0 * g.axis[1].in + i1) * g.axis[2].in + grid.axis[2].first;
      const int64_t step = grid.axis[2].step;
      if (step == 1) {
        std::copy(from, from + axis[2].in, line);
      } else {
        for (int64_t n = 0; n < axis[2].in; ++n) line[n * step] = from[n];
      }
    }
  }
}

template <typename T>
void run(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
         const Allocate& allocate) {
  constexpr int64_t kSize = sizeof(T);
  const Geometry& g = params.geometry;
  const Subgrid grid = make_subgrid(g);
  const int64_t cols = grid.geometry.cols();
  const int64_t row_bytes = cols * kSize;
  const int64_t least = std::min(kFewRows, kMostBytes / row_bytes);
  const int64_t most = std::max<int64_t>(1, std::max(least, kCachedBytes / row_bytes));
  const int64_t at_once = divide_up(params.features, divide_up(params.features, most));
  T* const made = static_cast<T*>(allocate(at_once * row_bytes));
  T* const fused = static_cast<T*>(params.weight);
  advise_result(fused, params.features * g.cols() * kSize);

  ReusedScratch scratch(allocate);
  FuseConvLinearParams part = params;
  part.geometry = grid.geometry;
  part.weight = made;
  part.weight_stride =
      ImageStrides::of_matrix(cols, 1, g.in_channels_per_group(), grid.geometry.in_positions());
  for (int64_t f = 0; f < params.features; f += at_once) {
    part.features = std::min(at_once, params.features - f);
    part.linear_weight = static_cast<const T*>(params.linear_weight) + f * params.linear_stride.row;
    if (params.linear_bias != nullptr) {
      part.linear_bias = static_cast<const T*>(params.linear_bias) + f;
    }
    if (params.bias != nullptr) part.bias = static_cast<T*>(params.bias) + f;
    scratch.start();
    launch_fuse_conv_linear_cpu(part, parallel_for, std::ref(scratch));
    for_each(parallel_for, part.features * g.in_channels, g.in_positions(), [&](int64_t n) {
      spread(g, grid, made + n * grid.geometry.in_positions(),
             fused + f * g.cols() + n * g.in_positions());
    });
  }
}

}  // namespace

// Where the result is a contiguous matrix, half of it or more holes, and a row of the subgrid fits.
bool fits_by_subgrid(const FuseConvLinearParams& params) {
  const Geometry& g = params.geometry;
  if (g.transposed || g.taps_may_collide() || std::none_of(g.axis, g.axis + kAxes, has_holes) ||
      params.weight_stride.position != 1 || params.weight_stride.channel != g.in_positions() ||
      params.weight_stride.group != g.in_channels_per_group() * g.in_positions() ||
      params.weight_stride.row != g.cols()) {
    return false;
  }
  const Geometry grid = make_subgrid(g).geometry;
  const int64_t positions = grid.in_positions();
  return positions > 0 && positions <= g.in_positions() / kLeastPositions &&
         grid.cols() <= kMostBytes / element_size(params.dtype);
}

void fuse_conv_linear_by_subgrid(const FuseConvLinearParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate) {
  dispatch(params.dtype, [&](auto zero) { run<decltype(zero)>(params, parallel_for, allocate); });
}

}  // namespace linfuse
