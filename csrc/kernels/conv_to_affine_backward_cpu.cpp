// grad_weight[c_out, c_in, k] = sum over the positions q that k ties of
//                               grad_matrix[(c_out, o), (c_in, i)]
//
// A thread owns pairs (c_out, c_in) and their prod(kernel) sums, so nothing is shared and the
// result is the same for every number of threads. Each sum runs over q, the coarse position
// (geometry.h).
#include "../geometry/stored_taps.h"
#include "conv_to_affine_backward.h"

namespace linfuse {
namespace {

template <typename T>
Accumulate<T> gather(const ConvToAffineBackwardParams& params, const T* grad_matrix, int64_t c_out,
                     int64_t global_c_in, const Position& k, const Range (&coarse_range)[kAxes]) {
  const Geometry& g = params.geometry;
  const int64_t cols = g.cols();
  const int64_t first_row = c_out * g.out_positions() - params.row_start;
  const int64_t rows = params.row_stop - params.row_start;
  const T* plane = grad_matrix + global_c_in * g.in_positions();
  Accumulate<T> total = 0;
  for (int64_t q0 = coarse_range[0].first; q0 < coarse_range[0].last; ++q0) {
    const int64_t fine0 = g.fine_position(0, q0, k.at[0]);
    if (fine0 < 0) continue;
    for (int64_t q1 = coarse_range[1].first; q1 < coarse_range[1].last; ++q1) {
      const int64_t fine1 = g.fine_position(1, q1, k.at[1]);
      if (fine1 < 0) continue;
      const int64_t coarse_line = (q0 * g.coarse_size(1) + q1) * g.coarse_size(2);
      const int64_t fine_line = (fine0 * g.fine_size(1) + fine1) * g.fine_size(2);
      for (int64_t q2 = coarse_range[2].first; q2 < coarse_range[2].last; ++q2) {
        const int64_t fine2 = g.fine_position(2, q2, k.at[2]);
        if (fine2 < 0) continue;
        const int64_t coarse = coarse_line + q2;
        const int64_t fine = fine_line + fine2;
        const int64_t row = first_row + (g.transposed ? fine : coarse);
        if (row < 0 || row >= rows) continue;
        total += static_cast<Accumulate<T>>(plane[row * cols + (g.transposed ? coarse : fine)]);
      }
    }
  }
  return total;
}

template <typename T>
void run(const ConvToAffineBackwardParams& params, const ParallelFor& parallel_for) {
  const Geometry& g = params.geometry;
  const T* grad_matrix = static_cast<const T*>(params.grad_matrix);
  T* grad_weight = static_cast<T*>(params.grad_weight);
  const int64_t in_channels = g.in_channels_per_group();
  const int64_t kernel_positions = g.kernel_positions();

  // Rows of a block lie in few positions; of a transposed convolution they are the fine ones.
  Range coarse_range[kAxes];
  positions_of_rows(g, params.row_start, params.row_stop, coarse_range);
  if (g.transposed) {
    for (int a = 0; a < kAxes; ++a) coarse_range[a] = {0, g.coarse_size(a)};
  }
  const int64_t pairs = g.out_channels * in_channels;
  for_each(parallel_for, pairs, kernel_positions * g.out_positions(), [&](int64_t pair) {
    const int64_t c_out = pair / in_channels;
    const int64_t c_in = pair % in_channels;
    const int64_t global_c_in = g.group_of_out_channel(c_out) * in_channels + c_in;
    T* sums = grad_weight + g.weight_index(c_out, c_in);
    for (int64_t k = 0; k < kernel_positions; ++k) {
      sums[k] = static_cast<T>(
          gather(params, grad_matrix, c_out, global_c_in, kernel_position(g, k), coarse_range));
    }
  });
}

}  // namespace

void launch_conv_to_affine_backward_cpu(const ConvToAffineBackwardParams& params,
                                        const ParallelFor& parallel_for) {
  dispatch(params.dtype, [&](auto zero) { run<decltype(zero)>(params, parallel_for); });
}

}  // namespace linfuse
