// The matrix of a convolution in compressed sparse rows: the taps and nothing else.
#pragma once

#include <cstdint>

#include "../geometry/stored_taps.h"
#include "dtype.h"
#include "parallel.h"

#if defined(LINFUSE_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace linfuse {

struct ConvToCsrParams {
  Geometry geometry;
  RowTaps taps;           // of the geometry, where the kernel runs
  int64_t row_start = 0;  // rows [row_start, row_stop) are written
  int64_t row_stop = 0;
  int64_t stored = 0;  // elements in these rows
  DType dtype = DType::kFloat32;
  bool index32 = false;          // whether the indices are int32; int64 otherwise
  const void* weight = nullptr;  // contiguous, as Geometry::weight_index counts
  void* values = nullptr;        // [stored]
  void* columns = nullptr;       // [stored], ascending within a row
  void* row_pointers = nullptr;  // [row_stop - row_start + 1]
};

void launch_conv_to_csr_cpu(const ConvToCsrParams& params, const ParallelFor& parallel_for);

#if defined(LINFUSE_WITH_CUDA)
[[nodiscard]] cudaError_t launch_conv_to_csr_cuda(const ConvToCsrParams& params,
                                                  cudaStream_t stream);
#endif

}  // namespace linfuse
