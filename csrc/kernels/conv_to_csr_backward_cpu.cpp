// grad_weight[c_out, c_in, k] = sum over the output positions o that use k of
// grad_values[element ((c_out, o), (c_in, i))]
//
// A thread owns pairs (c_out, c_in) and their prod(kernel) sums, so nothing is shared and the
// result is the same for every number of threads. Each sum runs over ascending o.
#include "conv_to_csr_backward.h"

namespace linfuse {
namespace {

template <typename T>
Accumulate<T> gather(const ConvToCsrBackwardParams& params, const T* grad_values, int64_t first,
                     int64_t c_out, int64_t c_in, const Position& k) {
  const Geometry& g = params.geometry;
  const KernelTaps& taps = params.taps;
  const TapUse* const end0 = taps.end(0, k.at[0]);
  const TapUse* const end1 = taps.end(1, k.at[1]);
  const TapUse* const end2 = taps.end(2, k.at[2]);
  Accumulate<T> total = 0;
  for (const TapUse* use0 = taps.begin(0, k.at[0]); use0 != end0; ++use0) {
    for (const TapUse* use1 = taps.begin(1, k.at[1]); use1 != end1; ++use1) {
      const int64_t line =
          ((c_out * g.axis[0].out + use0->o) * g.axis[1].out + use1->o) * g.axis[2].out;
      for (const TapUse* use2 = taps.begin(2, k.at[2]); use2 != end2; ++use2) {
        const int64_t row = line + use2->o;
        if (row < params.row_start || row >= params.row_stop) continue;
        const Position o = {{use0->o, use1->o, use2->o}};
        const Position slot = {{use0->slot, use1->slot, use2->slot}};
        const int64_t at = taps.stored.index(g, c_out, c_in, o, slot) - first;
        total += static_cast<Accumulate<T>>(grad_values[at]);
      }
    }
  }
  return total;
}

template <typename T>
void run(const ConvToCsrBackwardParams& params, const ParallelFor& parallel_for) {
  const Geometry& g = params.geometry;
  const T* grad_values = static_cast<const T*>(params.grad_values);
  T* grad_weight = static_cast<T*>(params.grad_weight);
  const int64_t first = params.taps.stored.before(g, params.row_start);
  const int64_t in_channels = g.in_channels_per_group();
  const int64_t kernel_positions = g.kernel_positions();

  const int64_t pairs = g.out_channels * in_channels;
  for_each(parallel_for, pairs, kernel_positions * g.out_positions(), [&](int64_t pair) {
    const int64_t c_out = pair / in_channels;
    const int64_t c_in = pair % in_channels;
    T* sums = grad_weight + g.weight_index(c_out, c_in);
    for (int64_t k = 0; k < kernel_positions; ++k) {
      sums[k] =
          static_cast<T>(gather(params, grad_values, first, c_out, c_in, kernel_position(g, k)));
    }
  });
}

}  // namespace

void launch_conv_to_csr_backward_cpu(const ConvToCsrBackwardParams& params,
                                     const ParallelFor& parallel_for) {
  dispatch(params.dtype, [&](auto zero) { run<decltype(zero)>(params, parallel_for); });
}

}  // namespace linfuse
