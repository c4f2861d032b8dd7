// The adjoint of conv_to_affine in the weight: each kernel element gathers the matrix elements it
// was written to. Only elements that are taps are read.
#pragma once

#include <cstdint>

#include "../geometry/geometry.h"
#include "dtype.h"
#include "parallel.h"

#if defined(LINFUSE_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace linfuse {

struct ConvToAffineBackwardParams {
  Geometry geometry;
  int64_t row_start = 0;  // the gradient holds rows [row_start, row_stop)
  int64_t row_stop = 0;
  DType dtype = DType::kFloat32;
  const void* grad_matrix = nullptr;  // [row_stop - row_start, cols]
  void* grad_weight = nullptr;        // contiguous, as Geometry::weight_index counts
};

void launch_conv_to_affine_backward_cpu(const ConvToAffineBackwardParams& params,
                                        const ParallelFor& parallel_for);

#if defined(LINFUSE_WITH_CUDA)
[[nodiscard]] cudaError_t launch_conv_to_affine_backward_cuda(
    const ConvToAffineBackwardParams& params, cudaStream_t stream);
#endif

}  // namespace linfuse
