// matrix[row, col] = sum over the taps k that tie (o, i) of weight[c_out, c_in, k]
//
// A thread owns whole rows. It clears one plane [prod(in)] of a row, writes that plane's taps while
// the lines are still in its first-level cache, and goes on: memory sees each element once, in
// order. All index arithmetic comes from three small tables (axis_taps.h), one per axis; the
// innermost loop copies kernel elements to ascending positions.
#include <cstring>

#include "../geometry/axis_taps.h"
#include "conv_to_affine.h"
#include "memory.h"

namespace linfuse {
namespace {

template <typename T>
struct RowWriter {
  const Geometry& g;
  const AxisTaps& taps0;
  const AxisTaps& taps1;
  const AxisTaps& taps2;
  const T* weight;

  // The sum of all taps between one output and one input position.
  T sum(const T* kernel, const TapGroup& group0, const TapGroup& group1,
        const TapGroup& group2) const {
    Accumulate<T> total = 0;
    for (int64_t n0 = group0.first; n0 < group0.last; ++n0) {
      for (int64_t n1 = group1.first; n1 < group1.last; ++n1) {
        const T* line = kernel + (taps0.kernel[static_cast<size_t>(n0)] * g.axis[1].kernel +
                                  taps1.kernel[static_cast<size_t>(n1)]) *
                                     g.axis[2].kernel;
        for (int64_t n2 = group2.first; n2 < group2.last; ++n2) {
          total += static_cast<Accumulate<T>>(line[taps2.kernel[static_cast<size_t>(n2)]]);
        }
      }
    }
    return static_cast<T>(total);
  }

  void write_plane(T* plane, const T* kernel, const Position& o) const {
    for (const TapGroup* group0 = taps0.begin(o.at[0]); group0 != taps0.end(o.at[0]); ++group0) {
      for (const TapGroup* group1 = taps1.begin(o.at[1]); group1 != taps1.end(o.at[1]); ++group1) {
        T* line = plane + (group0->position * g.axis[1].in + group1->position) * g.axis[2].in;
        const T* kernel_line =
            kernel + (taps0.kernel[static_cast<size_t>(group0->first)] * g.axis[1].kernel +
                      taps1.kernel[static_cast<size_t>(group1->first)]) *
                         g.axis[2].kernel;
        const bool outer_single =
            group0->last - group0->first == 1 && group1->last - group1->first == 1;
        for (const TapGroup* group2 = taps2.begin(o.at[2]); group2 != taps2.end(o.at[2]);
             ++group2) {
          const bool single = outer_single && group2->last - group2->first == 1;
          line[group2->position] =
              single ? kernel_line[taps2.kernel[static_cast<size_t>(group2->first)]]
                     : sum(kernel, *group0, *group1, *group2);
        }
      }
    }
  }

  void write_row(T* row, int64_t row_index) const {
    const int64_t in_positions = g.in_positions();
    const int64_t in_channels = g.in_channels_per_group();
    const int64_t c_out = row_index / g.out_positions();
    const Position o = out_position(g, row_index % g.out_positions());
    const int64_t before = g.group_of_out_channel(c_out) * in_channels;
    const int64_t after = g.in_channels - before - in_channels;

    T* plane = row + before * in_positions;
    std::memset(static_cast<void*>(row), 0, static_cast<size_t>(before * in_positions) * sizeof(T));
    for (int64_t c_in = 0; c_in < in_channels; ++c_in, plane += in_positions) {
      std::memset(static_cast<void*>(plane), 0, static_cast<size_t>(in_positions) * sizeof(T));
      write_plane(plane, weight + g.weight_index(c_out, c_in), o);
    }
    std::memset(static_cast<void*>(plane), 0,
                static_cast<size_t>(after * in_positions) * sizeof(T));
  }
};

template <typename T>
void run(const ConvToAffineParams& params, const ParallelFor& parallel_for) {
  const Geometry& g = params.geometry;
  const int64_t rows = params.row_stop - params.row_start;
  if (rows <= 0) return;
  const AxisTaps taps[kAxes] = {taps_by_row(g, 0), taps_by_row(g, 1), taps_by_row(g, 2)};
  const RowWriter<T> writer{g, taps[0], taps[1], taps[2], static_cast<const T*>(params.weight)};
  const T* bias = static_cast<const T*>(params.bias);
  T* matrix = static_cast<T*>(params.matrix);
  T* offset = static_cast<T*>(params.offset);
  const int64_t cols = g.cols();
  const int64_t out_positions = g.out_positions();

  advise_huge_pages(matrix, rows * cols * static_cast<int64_t>(sizeof(T)));
  for_each(parallel_for, rows, cols, [&](int64_t n) {
    const int64_t row = params.row_start + n;
    writer.write_row(matrix + n * cols, row);
    offset[n] = bias != nullptr ? bias[row / out_positions] : T(0.0f);
  });
}

}  // namespace

void launch_conv_to_affine_cpu(const ConvToAffineParams& params, const ParallelFor& parallel_for) {
  dispatch(params.dtype, [&](auto zero) { run<decltype(zero)>(params, parallel_for); });
}

}  // namespace linfuse
