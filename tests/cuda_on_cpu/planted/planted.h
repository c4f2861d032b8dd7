// Faults that the checks must find: a check that finds nothing proves nothing until it has.
#pragma once

#include <cuda_runtime_api.h>

// At most kMostPlanted floats, one block, a thread each.
constexpr int kMostPlanted = 256;

[[nodiscard]] cudaError_t launch_out_of_bounds(const float* in, float* out, int count);
[[nodiscard]] cudaError_t launch_out_of_bounds_shared(const float* in, float* out, int count);
[[nodiscard]] cudaError_t launch_missing_barrier(const float* in, float* out, int count);
[[nodiscard]] cudaError_t launch_divergent_barrier(const float* in, float* out, int count);
[[nodiscard]] cudaError_t launch_no_fault(const float* in, float* out, int count);
