// fused_bias[f] = linear_bias[f] + sum over c_out of bias[c_out] * (sum over o of
//                 linear[f, (c_out, o)])
//
// and the choice between the three ways to make the weight, of which one makes the bias as well.
//
// Who computes what: one block makes one f at a time; its threads read the row in turn, each in
// ascending order, and add up in a tree. No atomics: the bits are the same in every run.
// Memory: one more pass over the Linear's weight, in neighbouring elements, which the products of
// unpacked operands cannot spare us: they skip the outputs that read padding alone. Without a
// convolution's bias there is no pass.
#include "block_sum.h"
#include "fuse_conv_linear.h"
#include "grid_size.h"

namespace linfuse {
namespace {

constexpr int kThreads = 256;
// A tile's smaller sides would be mostly empty below this.
constexpr int64_t kFewChannels = 8;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    fused_bias_kernel(int64_t features, int64_t channels, int64_t positions, const T* conv_bias,
                      const T* linear, int64_t feature_stride, int64_t row_stride,
                      const T* linear_bias, T* bias) {
  using A = Accumulate<T>;
  __shared__ A sums[kThreads];
  // A thread goes on by kThreads rows, which are so many channels and positions.
  const int64_t channel_step = kThreads / positions;
  const int64_t position_step = kThreads % positions;
  for (int64_t f = blockIdx.x; f < features; f += gridDim.x) {
    A total = 0;
    if (conv_bias != nullptr) {
      const T* at = linear + f * feature_stride;
      int64_t row = threadIdx.x;
      int64_t position = row % positions;
      for (int64_t c_out = row / positions; c_out < channels; c_out += channel_step) {
        total += static_cast<A>(at[row * row_stride]) * static_cast<A>(conv_bias[c_out]);
        row += kThreads;
        position += position_step;
        if (position >= positions) {
          position -= positions;
          ++c_out;
        }
      }
    }
    total = block_sum<kThreads>(total, sums);
    if (threadIdx.x == 0) {
      bias[f] =
          static_cast<T>(total + (linear_bias != nullptr ? static_cast<A>(linear_bias[f]) : A{0}));
    }
  }
}

template <typename T>
cudaError_t launch_bias(const FuseConvLinearParams& params, cudaStream_t stream) {
  fused_bias_kernel<T><<<grid_of(params.features), kThreads, 0, stream>>>(
      params.features, params.geometry.out_channels, params.geometry.out_positions(),
      static_cast<const T*>(params.conv_bias), static_cast<const T*>(params.linear_weight),
      params.linear_stride.row, params.linear_stride.position,
      static_cast<const T*>(params.linear_bias), static_cast<T*>(params.bias));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_fuse_conv_linear_cuda(const FuseConvLinearParams& params, cudaStream_t stream,
                                         const Allocate& allocate) {
  if (params.features == 0) return cudaSuccess;
  if (goes_by_packed_cuda(params)) {
    return launch_fuse_conv_linear_by_packed_cuda(params, stream, allocate);
  }
  const Geometry& g = params.geometry;
  const bool has_few_channels =
      g.in_channels_per_group() < kFewChannels || g.out_channels_per_group() < kFewChannels;
  const cudaError_t error = has_few_channels
                                ? launch_fuse_conv_linear_by_element_cuda(params, stream)
                                : launch_fuse_conv_linear_by_tile_cuda(params, stream);
  if (error != cudaSuccess) return error;
  return dispatch(params.dtype,
                  [&](auto zero) { return launch_bias<decltype(zero)>(params, stream); });
}

}  // namespace linfuse
