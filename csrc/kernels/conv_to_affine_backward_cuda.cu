// grad_weight[c_out, c_in, k] = sum over the positions q that k ties of
//                               grad_matrix[(c_out, o), (c_in, i)]
//
// Who computes what: one block makes one element of grad_weight at a time; its threads share the
// coarse positions q (geometry.h), each in ascending order, and add up in a tree in shared memory.
// The order is fixed, so the bits are the same in every run; there are no atomics.
// Memory: each tap is read once, from a row of its own; nothing else of grad_matrix is touched.
#include "block_sum.h"
#include "conv_to_affine_backward.h"
#include "grid_size.h"

namespace linfuse {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    conv_to_affine_backward_kernel(Geometry g, const T* grad_matrix, T* grad_weight,
                                   int64_t row_start, int64_t rows, int64_t elements) {
  __shared__ Accumulate<T> sums[kThreads];
  const int64_t cols = g.cols();
  const int64_t in_channels = g.in_channels_per_group();
  const int64_t kernel_positions = g.kernel_positions();
  const int64_t coarse_positions = g.coarse_size(0) * g.coarse_size(1) * g.coarse_size(2);

  for (int64_t element = blockIdx.x; element < elements; element += gridDim.x) {
    const Position k = kernel_position(g, element % kernel_positions);
    const int64_t c_in = element / kernel_positions % in_channels;
    const int64_t c_out = element / kernel_positions / in_channels;
    const int64_t global_c_in = g.group_of_out_channel(c_out) * in_channels + c_in;
    const T* plane = grad_matrix + global_c_in * g.in_positions();

    Accumulate<T> total = 0;
    for (int64_t q = threadIdx.x; q < coarse_positions; q += kThreads) {
      const Position coarse = unravel(q, g.coarse_size(1), g.coarse_size(2));
      int64_t fine = 0;
      bool tied = true;
      for (int a = 0; a < kAxes; ++a) {
        const int64_t position = g.fine_position(a, coarse.at[a], k.at[a]);
        tied = tied && position >= 0;
        fine = fine * g.fine_size(a) + position;
      }
      if (!tied) continue;
      const int64_t row = c_out * g.out_positions() + (g.transposed ? fine : q) - row_start;
      if (row < 0 || row >= rows) continue;
      total += static_cast<Accumulate<T>>(plane[row * cols + (g.transposed ? q : fine)]);
    }

    total = block_sum<kThreads>(total, sums);
    if (threadIdx.x == 0) {
      grad_weight[g.weight_index(c_out, c_in) + element % kernel_positions] = static_cast<T>(total);
    }
  }
}

template <typename T>
cudaError_t launch(const ConvToAffineBackwardParams& params, cudaStream_t stream) {
  const Geometry& g = params.geometry;
  const int64_t elements = g.out_channels * g.in_channels_per_group() * g.kernel_positions();
  const int64_t rows = params.row_stop - params.row_start;
  conv_to_affine_backward_kernel<T><<<grid_of(elements), kThreads, 0, stream>>>(
      g, static_cast<const T*>(params.grad_matrix), static_cast<T*>(params.grad_weight),
      params.row_start, rows, elements);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_conv_to_affine_backward_cuda(const ConvToAffineBackwardParams& params,
                                                cudaStream_t stream) {
  return dispatch(params.dtype, [&](auto zero) { return launch<decltype(zero)>(params, stream); });
}

}  // namespace linfuse
