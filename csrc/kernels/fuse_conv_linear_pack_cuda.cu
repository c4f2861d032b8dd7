// Packs the operands of fuse_conv_linear on a card, for fuse_conv_linear_by_packed_cuda.cu.
//
//   line   the output channels of one group at one place, filled up with zeros to `depth`
//   tile   kPackPositions positions by kDepth channels
//   slice  of a feature: neighbouring tiles, a block's work
//
// Who computes what. pack_weight_kernel: a thread makes a piece of weight[group, k, c_in] at a
// time. pack_linear_kernel: a block makes a slice of the lines [group, o] of one feature at a time,
// through shared memory, and with that part of the Linear's row in hand also its part of the fused
// bias.
#include "block_sum.h"
#include "fuse_conv_linear_pack.h"
#include "grid_size.h"
#include "warp_product.h"

namespace linfuse {
namespace {

constexpr int kPackThreads = 256;

// packed[group, k, c_in, c_out]
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_weight_kernel(Geometry g, const T* weight, T* packed, int64_t depth, int64_t pieces) {
  const int64_t in_channels = g.in_channels_per_group();
  const int64_t out_channels = g.out_channels_per_group();
  const int64_t step = g.weight_step_out();
  for (int64_t piece = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
       piece < pieces; piece += static_cast<int64_t>(gridDim.x) * kPackThreads) {
    const int64_t line = piece / (depth / kPiece<T>);
    const int64_t c_out = piece % (depth / kPiece<T>)*kPiece<T>;
    const int64_t c_in = line % in_channels;
    const int64_t k = line / in_channels % g.kernel_positions();
    const int64_t group = line / in_channels / g.kernel_positions();
    const T* from = weight + g.weight_index(group * out_channels, c_in) + k + c_out * step;
    T values[kPiece<T>];
#pragma unroll
    for (int n = 0; n < kPiece<T>; ++n) {
      values[n] = c_out + n < out_channels ? from[n * step] : T{};
    }
    store_together<kPiece<T>>(packed + piece * kPiece<T>, values);
  }
}

template <typename T>
struct LinearToPack {
  const T* linear;  // of the chunk's first feature
  int64_t feature_stride;
  int64_t row_stride;
  T* packed;
  int64_t depth;
  int64_t features;
  int64_t groups;
  int64_t channels;  // of a group
  int64_t positions;
  int64_t slices;        // of a feature, each a block's work
  const T* conv_bias;    // or null
  Accumulate<T>* parts;  // [features, slices], of the fused bias
};

// packed[f, group, o, c_out], and what each slice adds to the fused bias.
template <typename T>
__global__ void __launch_bounds__(kPackThreads) pack_linear_kernel(LinearToPack<T> job) {
  using A = Accumulate<T>;
  constexpr int kStride = kPackPositions + 2;  // a warp that reads a column meets no bank twice
  constexpr int kThreadsDown = kPackThreads / kPackPositions;
  constexpr int kLoads = kDepth<T> / kThreadsDown;
  static_assert(kPackThreads == kPackPositions * 4, "a thread stores one of a line's four pieces");
  __shared__ T tile[kDepth<T>][kStride];
  __shared__ A sums[kPackThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / kPackPositions;
  const int column = thread % kPackPositions;
  const int64_t tiles_across = (job.positions - 1) / kPackPositions + 1;
  const int64_t tiles_down = job.depth / kDepth<T>;
  const int64_t tiles = job.groups * tiles_down * tiles_across;

  for (int64_t block = blockIdx.x; block < job.features * job.slices; block += gridDim.x) {
    const int64_t f = block / job.slices;
    const int64_t first = block % job.slices * tiles / job.slices;
    const int64_t stop = (block % job.slices + 1) * tiles / job.slices;
    int64_t o = first % tiles_across * kPackPositions;
    int64_t c_out = first / tiles_across % tiles_down * kDepth<T>;
    int64_t group = first / tiles_across / tiles_down;
    A total = 0;
    for (int64_t n = first; n < stop; ++n) {
      const int64_t first_channel = group * job.channels + c_out;
      const auto channels = static_cast<int>(job.channels - c_out < kDepth<T> ? job.channels - c_out
                                                                              : int64_t{kDepth<T>});
      const bool is_position = o + column < job.positions;
      const T* from = job.linear + f * job.feature_stride +
                      ((first_channel + row) * job.positions + o + column) * job.row_stride;
      T values[kLoads];
#pragma unroll
      for (int m = 0; m < kLoads; ++m) {
        const bool is_there = is_position && row + m * kThreadsDown < channels;
        values[m] = is_there ? *from : T{};
        from += kThreadsDown * job.positions * job.row_stride;
      }
      __syncthreads();  // the tile before has been read
#pragma unroll
      for (int m = 0; m < kLoads; ++m) {
        const int channel = row + m * kThreadsDown;
        tile[channel][column] = values[m];
        if (job.conv_bias != nullptr && is_position && channel < channels) {
          total +=
              static_cast<A>(values[m]) * static_cast<A>(job.conv_bias[first_channel + channel]);
        }
      }
      __syncthreads();
      const int line = thread / 4;
      const int c = thread % 4 * kPiece<T>;
      if (o + line < job.positions) {
        T piece[kPiece<T>];
#pragma unroll
        for (int m = 0; m < kPiece<T>; ++m) piece[m] = tile[c + m][line];
        const int64_t to = ((f * job.groups + group) * job.positions + o + line) * job.depth;
        store_together<kPiece<T>>(job.packed + to + c_out + c, piece);
      }
      o += kPackPositions;
      if (o < job.positions) continue;
      o = 0;
      c_out += kDepth<T>;
      if (c_out < job.depth) continue;
      c_out = 0;
      ++group;
    }
    total = block_sum<kPackThreads>(total, sums);
    if (thread == 0) job.parts[block] = total;
  }
}

template <typename T>
cudaError_t pack_linear(const FuseConvLinearParams& params, const PackedChunk& chunk,
                        cudaStream_t stream) {
  const Geometry& g = params.geometry;
  LinearToPack<T> job{};
  job.feature_stride = params.linear_stride.row;
  job.row_stride = params.linear_stride.position;
  job.linear = static_cast<const T*>(params.linear_weight) + chunk.first * job.feature_stride;
  job.packed = static_cast<T*>(chunk.packed);
  job.depth = PackedSizes::of<T>(g).depth;
  job.features = chunk.features;
  job.groups = g.groups;
  job.channels = g.out_channels_per_group();
  job.positions = g.out_positions();
  job.slices = chunk.slices;
  job.conv_bias = static_cast<const T*>(params.conv_bias);
  job.parts = static_cast<Accumulate<T>*>(chunk.parts);
  pack_linear_kernel<T><<<grid_of(job.features * job.slices), kPackThreads, 0, stream>>>(job);
  return cudaGetLastError();
}

template <typename T>
cudaError_t pack_weight(const FuseConvLinearParams& params, void* packed, cudaStream_t stream) {
  const PackedSizes sizes = PackedSizes::of<T>(params.geometry);
  const int64_t pieces = sizes.weight / kPieceBytes;
  pack_weight_kernel<T><<<grid_of(pieces, kPackThreads), kPackThreads, 0, stream>>>(
      params.geometry, static_cast<const T*>(params.conv_weight), static_cast<T*>(packed),
      sizes.depth, pieces);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_pack_weight_cuda(const FuseConvLinearParams& params, void* packed,
                                    cudaStream_t stream) {
  return dispatch_packed(params.dtype, cudaErrorInvalidValue, [&](auto zero) {
    return pack_weight<decltype(zero)>(params, packed, stream);
  });
}

cudaError_t launch_pack_linear_cuda(const FuseConvLinearParams& params, const PackedChunk& chunk,
                                    cudaStream_t stream) {
  return dispatch_packed(params.dtype, cudaErrorInvalidValue, [&](auto zero) {
    return pack_linear<decltype(zero)>(params, chunk, stream);
  });
}

}  // namespace linfuse
