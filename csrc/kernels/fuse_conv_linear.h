// A convolution and the Linear behind it as one Linear, without the convolution's matrix:
//
//   fused[f, (c_in, i)] = sum over the taps (o, k) of i and over c_out of
//                         linear[f, (c_out, o)] * weight[c_out, c_in, k]
//   fused_bias[f]       = linear_bias[f] + sum over c_out of
//                         bias[c_out] * (sum over o of linear[f, (c_out, o)])
#pragma once

#include <cstdint>
#include <functional>

#include "../geometry/geometry.h"
#include "dtype.h"
#include "parallel.h"

#if defined(LINFUSE_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace linfuse {

// Where the rows f of a matrix have their images, in elements: position n of channel c of a group
// lies at  f * row + group * this->group + c * channel + n * position.
struct ImageStrides {
  int64_t row = 0;
  int64_t group = 0;
  int64_t channel = 0;
  int64_t position = 0;

  // Of a matrix in which the channels, and in them the positions, follow one another.
  static ImageStrides of_matrix(int64_t row, int64_t column, int64_t channels_of_group,
                                int64_t positions) {
    return {row, channels_of_group * positions * column, positions * column, column};
  }
};

// How the product is made on a CPU: by the way that costs least, or by one of them.
enum class Way : int { kCheapest, kInput, kTiles, kOutput, kColumns, kPosition, kPositionTiles };

struct FuseConvLinearParams {
  Geometry geometry;
  int64_t features = 0;  // F, rows of the Linear
  DType dtype = DType::kFloat32;
  const void* conv_weight = nullptr;    // contiguous, as Geometry::weight_index counts
  const void* conv_bias = nullptr;      // [C_out], or null for zeros
  const void* linear_weight = nullptr;  // [F, rows()]
  ImageStrides linear_stride;           // any; on a card, those of a matrix
  const void* linear_bias = nullptr;    // [F], or null for zeros
  void* weight = nullptr;               // [F, cols()], without gaps
  ImageStrides weight_stride;           // any; on a card, those of a contiguous matrix
  void* bias = nullptr;                 // [F]; null where only the weight is wanted
  int threads = 1;                      // how many the scratch memory is made for
  Way way = Way::kCheapest;             // on a CPU
};

// Scratch memory from the caller, aligned to 64 bytes and alive until the launcher returns.
using Allocate = std::function<void*(int64_t bytes)>;

// Throws std::invalid_argument where the layer cannot go the way that is asked for.
void launch_fuse_conv_linear_cpu(const FuseConvLinearParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate);

#if defined(LINFUSE_WITH_CUDA)
// `allocate` gives memory of the card, for work on the stream.
[[nodiscard]] cudaError_t launch_fuse_conv_linear_cuda(const FuseConvLinearParams& params,
                                                       cudaStream_t stream,
                                                       const Allocate& allocate);

// Its three ways. From packed operands, where groups have many channels and there is much to do;
// not for double, and only for what goes_by_packed_cuda() or is small. It packs one feature at
// least and no more than `most_bytes` of the Linear at a time. By tiles of many features and
// positions, where it is less, and element by element, where groups have few channels: these make
// any weight, need no memory and leave the bias alone.
[[nodiscard]] bool goes_by_packed_cuda(const FuseConvLinearParams& params);
[[nodiscard]] cudaError_t launch_fuse_conv_linear_by_packed_cuda(const FuseConvLinearParams& params,
                                                                 cudaStream_t stream,
                                                                 const Allocate& allocate,
                                                                 int64_t most_bytes = INT64_MAX);
enum class TileSize { kFitting, kLarge };
[[nodiscard]] cudaError_t launch_fuse_conv_linear_by_tile_cuda(const FuseConvLinearParams& params,
                                                               cudaStream_t stream,
                                                               TileSize size = TileSize::kFitting);
[[nodiscard]] cudaError_t launch_fuse_conv_linear_by_element_cuda(
    const FuseConvLinearParams& params, cudaStream_t stream);
#endif

}  // namespace linfuse
