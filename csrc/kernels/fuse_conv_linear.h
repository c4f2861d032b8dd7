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

struct FuseConvLinearParams {
  Geometry geometry;
  int64_t features = 0;  // F, rows of the Linear
  DType dtype = DType::kFloat32;
  const void* conv_weight = nullptr;    // contiguous, as Geometry::weight_index counts
  const void* conv_bias = nullptr;      // [C_out], or null for zeros
  const void* linear_weight = nullptr;  // [F, rows()], of any strides
  int64_t linear_stride[2] = {0, 0};    // in elements
  const void* linear_bias = nullptr;    // [F], or null for zeros
  void* weight = nullptr;               // [F, cols()]
  void* bias = nullptr;                 // [F]
  int threads = 1;                      // how many the scratch memory is made for
};

// Scratch memory from the caller, once per call: aligned to 64 bytes, alive until the launcher
// returns.
using Allocate = std::function<void*(int64_t bytes)>;

void launch_fuse_conv_linear_cpu(const FuseConvLinearParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate);

#if defined(LINFUSE_WITH_CUDA)
// Needs no scratch memory.
[[nodiscard]] cudaError_t launch_fuse_conv_linear_cuda(const FuseConvLinearParams& params,
                                                       cudaStream_t stream);

// Its two ways to make the weight, either of which can make any: by tiles of many features and
// positions, where groups have many channels, and element by element, where they have few.
enum class TileSize { kFitting, kLarge };
[[nodiscard]] cudaError_t launch_fuse_conv_linear_by_tile_cuda(const FuseConvLinearParams& params,
                                                               cudaStream_t stream,
                                                               TileSize size = TileSize::kFitting);
[[nodiscard]] cudaError_t launch_fuse_conv_linear_by_element_cuda(
    const FuseConvLinearParams& params, cudaStream_t stream);
#endif

}  // namespace linfuse
