// fused_bias[f] = linear_bias[f] + sum over c_out of bias[c_out] * (sum over o of
//                 linear[f, (c_out, o)])
//
// Terms
//   slice   neighbouring rows of the convolution; several of a feature where features are few
//
// Who computes what: one block makes a part, one slice of one f, at a time; its threads read the
// slice in turn, each in ascending order, and add up in a tree. Then one block adds up the parts of
// one f, likewise. No atomics: the bits are the same in every run.
// Memory: one more pass over the Linear's weight, in neighbouring elements, which the products of
// unpacked operands cannot spare us: they skip the outputs that read padding alone. Without a
// convolution's bias there is no pass.
#include <algorithm>

#include "block_sum.h"
#include "fuse_conv_linear_bias.h"
#include "grid_size.h"

namespace linfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kAddThreads = 64;
constexpr int64_t kLeastOfSlice = 1 << 12;  // rows; fewer are read before another block has begun

template <typename T>
__global__ void __launch_bounds__(kThreads)
    parts_kernel(int64_t features, int64_t slices, int64_t rows, int64_t positions,
                 const T* conv_bias, const T* linear, int64_t feature_stride, int64_t row_stride,
                 Accumulate<T>* parts) {
  using A = Accumulate<T>;
  __shared__ A sums[kThreads];
  // A thread goes on by kThreads rows, which are so many channels and positions.
  const int64_t channel_step = kThreads / positions;
  const int64_t position_step = kThreads % positions;
  for (int64_t part = blockIdx.x; part < features * slices; part += gridDim.x) {
    const int64_t slice = part % slices;
    const int64_t stop = (slice + 1) * rows / slices;
    int64_t row = slice * rows / slices + threadIdx.x;
    int64_t c_out = row / positions;
    int64_t position = row % positions;
    const T* at = linear + part / slices * feature_stride;
    A total = 0;
#pragma unroll 4
    for (; row < stop; row += kThreads) {
      total += static_cast<A>(at[row * row_stride]) * static_cast<A>(conv_bias[c_out]);
      position += position_step;
      c_out += channel_step;
      if (position >= positions) {
        position -= positions;
        ++c_out;
      }
    }
    total = block_sum<kThreads>(total, sums);
    if (threadIdx.x == 0) parts[part] = total;
  }
}

template <typename T>
__global__ void __launch_bounds__(kAddThreads)
    add_parts_kernel(int64_t features, int64_t slices, const Accumulate<T>* parts,
                     const T* linear_bias, T* bias) {
  using A = Accumulate<T>;
  __shared__ A sums[kAddThreads];
  for (int64_t f = blockIdx.x; f < features; f += gridDim.x) {
    A total = 0;
    for (int64_t n = threadIdx.x; n < slices; n += kAddThreads) total += parts[f * slices + n];
    total = block_sum<kAddThreads>(total, sums);
    if (threadIdx.x == 0) {
      bias[f] =
          static_cast<T>(total + (linear_bias != nullptr ? static_cast<A>(linear_bias[f]) : A{0}));
    }
  }
}

template <typename T>
cudaError_t launch(const FuseConvLinearParams& params, cudaStream_t stream,
                   const Allocate& allocate) {
  using A = Accumulate<T>;
  FusedBias job;
  job.features = params.features;
  job.linear_bias = params.linear_bias;
  job.bias = params.bias;
  if (params.conv_bias != nullptr) {
    const int64_t rows = params.geometry.rows();
    const int64_t most = std::min(kManyBlocks / params.features, rows / kLeastOfSlice);
    job.slices = std::max<int64_t>(1, most);
    const int64_t count = job.features * job.slices;
    auto* const parts = static_cast<A*>(allocate(count * static_cast<int64_t>(sizeof(A))));
    job.parts = parts;
    parts_kernel<T><<<grid_of(count), kThreads, 0, stream>>>(
        job.features, job.slices, rows, params.geometry.out_positions(),
        static_cast<const T*>(params.conv_bias), static_cast<const T*>(params.linear_weight),
        params.linear_stride.row, params.linear_stride.position, parts);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return launch_add_parts_cuda(params.dtype, job, stream);
}

}  // namespace

cudaError_t launch_add_parts_cuda(DType dtype, const FusedBias& job, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    add_parts_kernel<T><<<grid_of(job.features), kAddThreads, 0, stream>>>(
        job.features, job.slices, static_cast<const Accumulate<T>*>(job.parts),
        static_cast<const T*>(job.linear_bias), static_cast<T*>(job.bias));
    return cudaGetLastError();
  });
}

cudaError_t launch_fuse_conv_linear_bias_cuda(const FuseConvLinearParams& params,
                                              cudaStream_t stream, const Allocate& allocate) {
  return dispatch(params.dtype,
                  [&](auto zero) { return launch<decltype(zero)>(params, stream, allocate); });
}

}  // namespace linfuse
