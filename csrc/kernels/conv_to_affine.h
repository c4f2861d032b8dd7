// The matrix and offset of a convolution: matrix[row, col] = sum of the taps that tie row to col.
#pragma once

#include <cstdint>

#include "../geometry/geometry.h"
#include "dtype.h"
#include "parallel.h"

#if defined(LINFUSE_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace linfuse {

struct ConvToAffineParams {
  Geometry geometry;
  int64_t row_start = 0;  // rows [row_start, row_stop) are written
  int64_t row_stop = 0;
  DType dtype = DType::kFloat32;
  const void* weight = nullptr;  // contiguous, as Geometry::weight_index counts
  const void* bias = nullptr;    // [C_out], or null for zeros
  void* matrix = nullptr;        // [row_stop - row_start, cols]
  void* offset = nullptr;        // [row_stop - row_start]
};

void launch_conv_to_affine_cpu(const ConvToAffineParams& params, const ParallelFor& parallel_for);

#if defined(LINFUSE_WITH_CUDA)
[[nodiscard]] cudaError_t launch_conv_to_affine_cuda(const ConvToAffineParams& params,
                                                     cudaStream_t stream);
#endif

}  // namespace linfuse
