// fused[f, (c_in, i)] = sum over the taps (o, k) of i and over c_out of
//                       linear[f, (c_out, o)] * weight[c_out, c_in, k]
//
// for groups of few channels, where a tile would be mostly empty: depthwise convolutions, first
// layers.
//
// Terms
//   run   on one axis, the kernel elements that tie a position to an output: they and the outputs
//         lie in equal steps, so that nothing is divided or asked once a run is known
//
// Who computes what: one thread makes the elements of up to kFeatures neighbouring f and kChannels
// neighbouring c_in at one i, so that a weight is read once for all of those f, an element of the
// Linear once for all of those c_in, and the runs are found once for all. Neighbouring threads have
// neighbouring i: what they read of the Linear and write lies side by side, and the weights are the
// same for all of them. Taps are gone through for some output channels, then for the next: as many
// as have their lines in the first-level cache when a neighbouring tap reads them again. Each
// element is written once, by one thread, in a fixed order.
#include "fuse_conv_linear.h"
#include "fuse_conv_linear_classes.h"
#include "grid_size.h"

namespace linfuse {
namespace {

constexpr int kThreads = 128;
constexpr int kOutAtOnce = 16;  // output channels
constexpr int kBlocks = 3;  // on a multiprocessor at least; asks for few registers, and none spill

// Kernel elements k, k + step, ... and the outputs o, o + step, ... that they tie a position to.
struct Run {
  int64_t k;
  int64_t o;
  int64_t count;
};

// From one element of a run to the next.
struct RunStep {
  int64_t k;
  int64_t o;
};

RunStep step_of(const Geometry& g, int a) {
  const Axis& axis = g.axis[a];
  if (g.transposed) return {1, axis.dilation};
  const int64_t k = kernel_step(g, a);
  return {k, -(axis.dilation / (axis.stride / k))};  // the divisor of both is stride / k
}

// The run of a copy of input position i.
LINFUSE_HD inline Run run_of(const Geometry& g, int a, int64_t i, int64_t copy,
                             const RunStep& step) {
  const Axis& axis = g.axis[a];
  int64_t k = 0;
  int64_t o = 0;
  int64_t skipped = 0;  // elements that reach nothing yet
  int64_t stop = 0;     // of those from k on, as many as do not reach too far
  if (g.transposed) {
    o = i * axis.stride - axis.pad_low;
    skipped = o < 0 ? (-o - 1) / step.o + 1 : 0;
    stop = o < axis.out ? (axis.out - 1 - o) / step.o + 1 : 0;
  } else {
    const int64_t at = g.unfold(a, i, copy) + axis.pad_low;  // below 0 where there is no such copy
    while (k < step.k && k < axis.kernel && (at - k * axis.dilation) % axis.stride != 0) ++k;
    if (k >= step.k) return {0, 0, 0};
    const int64_t reach = at - k * axis.dilation;
    if (reach < 0) return {0, 0, 0};
    o = reach / axis.stride;
    skipped = o < axis.out ? 0 : (o - axis.out) / -step.o + 1;
    stop = o / -step.o + 1;
  }
  const int64_t kernels = k < axis.kernel ? (axis.kernel - 1 - k) / step.k + 1 : 0;
  if (stop > kernels) stop = kernels;
  return {k + skipped * step.k, o + skipped * step.o, stop > skipped ? stop - skipped : 0};
}

struct Steps {
  RunStep axis[kAxes];
};

template <typename T, int kFeatures, int kChannels>
__global__ void __launch_bounds__(kThreads, kBlocks)
    by_element_kernel(Geometry g, Steps steps, const T* linear, int64_t feature_stride,
                      int64_t row_stride, const T* weight, T* fused, int64_t features,
                      int64_t items) {
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
    const int64_t first_f = item / in_positions / chunks / g.groups * kFeatures;
    const Position i = in_position(g, position);
    const int64_t first_c_in = chunk * kChannels;
    const int64_t first_c_out = group * out_channels;
    const T* rows = linear + first_f * feature_stride + first_c_out * linear_step;
    const T* kernels = weight + g.weight_index(first_c_out, first_c_in);
    const auto features_here =
        static_cast<int>(features - first_f < kFeatures ? features - first_f : int64_t{kFeatures});
    const auto channels = static_cast<int>(
        in_channels - first_c_in < kChannels ? in_channels - first_c_in : int64_t{kChannels});

    A sums[kFeatures][kChannels] = {};
    int64_t first_out = 0;
    const auto add_tap = [&](int64_t o, int64_t k) {
      const int64_t left = out_channels - first_out;
      const int count = left < kOutAtOnce ? static_cast<int>(left) : kOutAtOnce;
      const T* at = rows + first_out * linear_step + o * row_stride;
      k += first_out * out_step;
#pragma unroll 1
      for (int c_out = 0; c_out < count; ++c_out) {
        A values[kChannels];
#pragma unroll
        for (int n = 0; n < kChannels; ++n) {
          values[n] = n < channels ? static_cast<A>(kernels[k + n * in_step]) : A{0};
        }
#pragma unroll
        for (int m = 0; m < kFeatures; ++m) {
          if (m >= features_here) continue;
          const A value = static_cast<A>(at[m * feature_stride]);
#pragma unroll
          for (int n = 0; n < kChannels; ++n) {
            if (n < channels) sums[m][n] += value * values[n];
          }
        }
        at += linear_step;
        k += out_step;
      }
    };
    const auto add_box = [&](const Run& run0, const Run& run1, const Run& run2) {
#pragma unroll 1
      for (int64_t n0 = 0; n0 < run0.count; ++n0) {
        const int64_t o0 = run0.o + n0 * steps.axis[0].o;
        const int64_t k0 = run0.k + n0 * steps.axis[0].k;
#pragma unroll 1
        for (int64_t n1 = 0; n1 < run1.count; ++n1) {
          const int64_t o1 = o0 * g.axis[1].out + run1.o + n1 * steps.axis[1].o;
          const int64_t k1 = k0 * g.axis[1].kernel + run1.k + n1 * steps.axis[1].k;
          int64_t o = o1 * g.axis[2].out + run2.o;
          int64_t k = k1 * g.axis[2].kernel + run2.k;
#pragma unroll 1
          for (int64_t n2 = 0; n2 < run2.count; ++n2) {
            add_tap(o, k);
            o += steps.axis[2].o;
            k += steps.axis[2].k;
          }
        }
      }
    };
#pragma unroll 1
    for (; first_out < out_channels; first_out += kOutAtOnce) {
#pragma unroll 1
      for (int64_t copy0 = 0; copy0 < g.copies(0); ++copy0) {
        const Run run0 = run_of(g, 0, i.at[0], copy0, steps.axis[0]);
        if (run0.count == 0) continue;
#pragma unroll 1
        for (int64_t copy1 = 0; copy1 < g.copies(1); ++copy1) {
          const Run run1 = run_of(g, 1, i.at[1], copy1, steps.axis[1]);
          if (run1.count == 0) continue;
#pragma unroll 1
          for (int64_t copy2 = 0; copy2 < g.copies(2); ++copy2) {
            add_box(run0, run1, run_of(g, 2, i.at[2], copy2, steps.axis[2]));
          }
        }
      }
    }

    T* to =
        fused + first_f * g.cols() + (group * in_channels + first_c_in) * in_positions + position;
#pragma unroll
    for (int m = 0; m < kFeatures; ++m) {
#pragma unroll
      for (int n = 0; n < kChannels; ++n) {
        if (m < features_here && n < channels) {
          to[m * g.cols() + n * in_positions] = static_cast<T>(sums[m][n]);
        }
      }
    }
  }
}

template <typename T, int kFeatures, int kChannels>
cudaError_t launch(const FuseConvLinearParams& params, cudaStream_t stream) {
  const Geometry& g = params.geometry;
  const int64_t chunks = (g.in_channels_per_group() + kChannels - 1) / kChannels;
  const int64_t rows = (params.features + kFeatures - 1) / kFeatures;
  const int64_t items = rows * g.groups * chunks * g.in_positions();
  if (items == 0) return cudaSuccess;
  Steps steps;
  for (int a = 0; a < kAxes; ++a) steps.axis[a] = step_of(g, a);
  by_element_kernel<T, kFeatures, kChannels><<<grid_of(items, kThreads), kThreads, 0, stream>>>(
      g, steps, static_cast<const T*>(params.linear_weight), params.linear_stride.row,
      params.linear_stride.position, static_cast<const T*>(params.conv_weight),
      static_cast<T*>(params.weight), params.features, items);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_fuse_conv_linear_by_element_cuda(const FuseConvLinearParams& params,
                                                    cudaStream_t stream) {
  return dispatch(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    return params.geometry.in_channels_per_group() == 1 ? launch<T, 8, 1>(params, stream)
                                                        : launch<T, 4, 4>(params, stream);
  });
}

}  // namespace linfuse
