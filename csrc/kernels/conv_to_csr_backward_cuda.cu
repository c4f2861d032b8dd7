// grad_weight[c_out, c_in, k] = sum over the output positions o that use k of
// grad_values[element ((c_out, o), (c_in, i))]
//
// Who computes what: one block makes one element of grad_weight at a time; its threads share the
// output positions that use k, each in ascending order, and add up in a tree in shared memory. The
// order is fixed, so the bits are the same in every run; there are no atomics. Memory: each stored
// element is read once per kernel element that it is a sum of.
#include "block_sum.h"
#include "conv_to_csr_backward.h"
#include "grid_size.h"

namespace linfuse {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    conv_to_csr_backward_kernel(Geometry g, KernelTaps taps, const T* grad_values, T* grad_weight,
                                int64_t row_start, int64_t row_stop, int64_t elements) {
  __shared__ Accumulate<T> sums[kThreads];
  const int64_t first = taps.stored.before(g, row_start);
  const int64_t in_channels = g.in_channels_per_group();
  const int64_t kernel_positions = g.kernel_positions();

  for (int64_t element = blockIdx.x; element < elements; element += gridDim.x) {
    const Position k = kernel_position(g, element % kernel_positions);
    const int64_t c_in = element / kernel_positions % in_channels;
    const int64_t c_out = element / kernel_positions / in_channels;

    int64_t uses = 1;
    for (int a = 0; a < kAxes; ++a) uses *= taps.end(a, k.at[a]) - taps.begin(a, k.at[a]);
    Accumulate<T> total = 0;
    for (int64_t n = threadIdx.x; n < uses; n += kThreads) {
      Position o;
      Position slot;
      int64_t rest = n;
      for (int a = kAxes - 1; a >= 0; --a) {
        const int64_t count = taps.end(a, k.at[a]) - taps.begin(a, k.at[a]);
        const TapUse use = taps.begin(a, k.at[a])[rest % count];
        rest /= count;
        o.at[a] = use.o;
        slot.at[a] = use.slot;
      }
      const int64_t line = (c_out * g.axis[0].out + o.at[0]) * g.axis[1].out + o.at[1];
      const int64_t row = line * g.axis[2].out + o.at[2];
      if (row < row_start || row >= row_stop) continue;
      const int64_t at = taps.stored.index(g, c_out, c_in, o, slot) - first;
      total += static_cast<Accumulate<T>>(grad_values[at]);
    }

    total = block_sum<kThreads>(total, sums);
    if (threadIdx.x == 0) {
      grad_weight[g.weight_index(c_out, c_in) + element % kernel_positions] = static_cast<T>(total);
    }
  }
}

template <typename T>
cudaError_t launch(const ConvToCsrBackwardParams& params, cudaStream_t stream) {
  const Geometry& g = params.geometry;
  const int64_t elements = g.out_channels * g.in_channels_per_group() * g.kernel_positions();
  conv_to_csr_backward_kernel<T><<<grid_of(elements), kThreads, 0, stream>>>(
      g, params.taps, static_cast<const T*>(params.grad_values),
      static_cast<T*>(params.grad_weight), params.row_start, params.row_stop, elements);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_conv_to_csr_backward_cuda(const ConvToCsrBackwardParams& params,
                                             cudaStream_t stream) {
  return dispatch(params.dtype, [&](auto zero) { return launch<decltype(zero)>(params, stream); });
}

}  // namespace linfuse
