// matrix[row, col] = sum over the taps k that tie (o, i) of weight[c_out, c_in, k]
//
// A thread owns whole rows. It clears one plane [prod(in)] of a row, writes that plane's taps while
// the lines are still in its first-level cache, and goes on: memory sees each element once, in
// order. All index arithmetic comes from three small tables (stored_taps.h), one per axis, of the
// positions that the rows have; the innermost loop (row_taps.h) copies kernel elements to ascending
// positions.
#include <cstring>

#include "conv_to_affine.h"
#include "memory.h"
#include "row_taps.h"

namespace linfuse {
namespace {

template <typename T>
void write_row(const Geometry& g, const RowTaps& taps, const T* weight, int64_t row_index, T* row) {
  const auto clear = [](T* from, int64_t count) {
    std::memset(static_cast<void*>(from), 0, static_cast<size_t>(count) * sizeof(T));
  };
  const int64_t in_positions = g.in_positions();
  const int64_t in_channels = g.in_channels_per_group();
  const int64_t c_out = row_index / g.out_positions();
  const Position o = out_position(g, row_index % g.out_positions());
  const int64_t before = g.group_of_out_channel(c_out) * in_channels;
  const int64_t after = g.in_channels - before - in_channels;

  T* plane = row + before * in_positions;
  clear(row, before * in_positions);
  for (int64_t c_in = 0; c_in < in_channels; ++c_in, plane += in_positions) {
    clear(plane, in_positions);
    visit_plane(g, taps, weight + g.weight_index(c_out, c_in), o,
                [plane](int64_t position, T value) { plane[position] = value; });
  }
  clear(plane, after * in_positions);
}

template <typename T>
void run(const ConvToAffineParams& params, const ParallelFor& parallel_for) {
  const Geometry& g = params.geometry;
  const int64_t rows = params.row_stop - params.row_start;
  if (rows <= 0) return;
  const RowTables tables(g, params.row_start, params.row_stop);
  const RowTaps taps = tables.view();
  const T* weight = static_cast<const T*>(params.weight);
  const T* bias = static_cast<const T*>(params.bias);
  T* matrix = static_cast<T*>(params.matrix);
  T* offset = static_cast<T*>(params.offset);
  const int64_t cols = g.cols();
  const int64_t out_positions = g.out_positions();

  advise_huge_pages(matrix, rows * cols * static_cast<int64_t>(sizeof(T)));
  for_each(parallel_for, rows, cols, [&](int64_t n) {
    const int64_t row = params.row_start + n;
    write_row(g, taps, weight, row, matrix + n * cols);
    offset[n] = bias != nullptr ? bias[row / out_positions] : T(0.0f);
  });
}

}  // namespace

void launch_conv_to_affine_cpu(const ConvToAffineParams& params, const ParallelFor& parallel_for) {
  dispatch(params.dtype, [&](auto zero) { run<decltype(zero)>(params, parallel_for); });
}

}  // namespace linfuse
