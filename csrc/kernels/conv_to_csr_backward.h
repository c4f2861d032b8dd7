// The adjoint of conv_to_csr in the weight: each kernel element gathers the stored elements that it
// is part of.
#pragma once

#include <cstdint>

#include "../geometry/stored_taps.h"
#include "dtype.h"
#include "parallel.h"

#if defined(LINFUSE_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace linfuse {

struct ConvToCsrBackwardParams {
  Geometry geometry;
  KernelTaps taps;        // of the geometry, where the kernel runs
  int64_t row_start = 0;  // the gradient holds rows [row_start, row_stop)
  int64_t row_stop = 0;
  DType dtype = DType::kFloat32;
  const void* grad_values = nullptr;  // one per stored element of these rows
  void* grad_weight = nullptr;        // contiguous, as Geometry::weight_index counts
};

void launch_conv_to_csr_backward_cpu(const ConvToCsrBackwardParams& params,
                                     const ParallelFor& parallel_for);

#if defined(LINFUSE_WITH_CUDA)
[[nodiscard]] cudaError_t launch_conv_to_csr_backward_cuda(const ConvToCsrBackwardParams& params,
                                                           cudaStream_t stream);
#endif

}  // namespace linfuse
