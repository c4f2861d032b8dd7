// fused[f, (c_in, i)] = sum over the taps (o, k) of i and over c_out of
//                       linear[f, (c_out, o)] * weight[c_out, c_in, k]
//
// for groups of few channels, where a tile would be mostly empty: depthwise convolutions, first
// layers.
//
// Who computes what: one thread makes the elements of up to kChannels neighbouring c_in at one
// (f, i), so that an element of the Linear is read once for all of them. Neighbouring threads have
// neighbouring i: what they read of the Linear and write lies side by side, and the weights are the
// same for all of them. Each element is written once, by one thread, in a fixed order.
#include "fuse_conv_linear.h"

namespace linfuse {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 3;  // on a multiprocessor at least; asks for few registers, and none spill
constexpr int kChannels = 4;

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    by_element_kernel(Geometry g, const T* linear, int64_t feature_stride, int64_t row_stride,
                      const T* weight, T* fused, int64_t items) {
  using A = Accumulate<T>;
  const int64_t in_channels = g.in_channels_per_group();
  const int64_t out_channels = g.out_channels_per_group();
  const int64_t in_positions = g.in_positions();
  const int64_t chunks = (in_channels + kChannels - 1) / kChannels;
  const int64_t linear_step = g.out_positions() * row_stride;
  const int64_t out_step = g.weight_step_out();
  const int64_t in_step = g.weight_step_in();

  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; item < items;
       item += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t position = item % in_positions;
    const int64_t chunk = item / in_positions % chunks;
    const int64_t group = item / in_positions / chunks % g.groups;
    const int64_t f = item / in_positions / chunks / g.groups;
    const Position i = in_position(g, position);
    const int64_t first_c_in = chunk * kChannels;
    const int64_t first_c_out = group * out_channels;
    const T* row = linear + f * feature_stride;
    const T* kernels = weight + g.weight_index(first_c_out, first_c_in);
    const auto channels = static_cast<int>(
        in_channels - first_c_in < kChannels ? in_channels - first_c_in : int64_t{kChannels});

    A sums[kChannels] = {};
    const auto add_tap = [&](int64_t o, int64_t k) {
      int64_t from = (first_c_out * g.out_positions() + o) * row_stride;
#pragma unroll 2
      for (int64_t c_out = 0; c_out < out_channels; ++c_out) {
        const A value = static_cast<A>(row[from]);
#pragma unroll
        for (int n = 0; n < kChannels; ++n) {
          if (n < channels) sums[n] += value * static_cast<A>(kernels[k + n * in_step]);
        }
        from += linear_step;
        k += out_step;
      }
    };
#pragma unroll 1
    for (int64_t tap0 = 0; tap0 < g.copies(0) * g.axis[0].kernel; ++tap0) {
      const int64_t k0 = tap0 % g.axis[0].kernel;
      const int64_t o0 = g.out_of_tap(0, i.at[0], tap0 / g.axis[0].kernel, k0);
      if (o0 < 0) continue;
#pragma unroll 1
      for (int64_t tap1 = 0; tap1 < g.copies(1) * g.axis[1].kernel; ++tap1) {
        const int64_t k1 = tap1 % g.axis[1].kernel;
        const int64_t o1 = g.out_of_tap(1, i.at[1], tap1 / g.axis[1].kernel, k1);
        if (o1 < 0) continue;
#pragma unroll 1
        for (int64_t tap2 = 0; tap2 < g.copies(2) * g.axis[2].kernel; ++tap2) {
          const int64_t k2 = tap2 % g.axis[2].kernel;
          const int64_t o2 = g.out_of_tap(2, i.at[2], tap2 / g.axis[2].kernel, k2);
          if (o2 < 0) continue;
          add_tap((o0 * g.axis[1].out + o1) * g.axis[2].out + o2,
                  (k0 * g.axis[1].kernel + k1) * g.axis[2].kernel + k2);
        }
      }
    }

    T* to = fused + f * g.cols() + (group * in_channels + first_c_in) * in_positions + position;
    for (int n = 0; n < kChannels; ++n) {
      if (n < channels) to[n * in_positions] = static_cast<T>(sums[n]);
    }
  }
}

template <typename T>
cudaError_t launch(const FuseConvLinearParams& params, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = int64_t{1} << 20;
  const Geometry& g = params.geometry;
  const int64_t chunks = (g.in_channels_per_group() + kChannels - 1) / kChannels;
  const int64_t items = params.features * g.groups * chunks * g.in_positions();
  if (items == 0) return cudaSuccess;
  const int64_t blocks = (items - 1) / kThreads + 1;
  by_element_kernel<T>
      <<<static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), kThreads, 0, stream>>>(
          g, static_cast<const T*>(params.linear_weight), params.linear_stride.row,
          params.linear_stride.position, static_cast<const T*>(params.conv_weight),
          static_cast<T*>(params.weight), items);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_fuse_conv_linear_by_element_cuda(const FuseConvLinearParams& params,
                                                    cudaStream_t stream) {
  return dispatch(params.dtype, [&](auto zero) { return launch<decltype(zero)>(params, stream); });
}

}  // namespace linfuse
