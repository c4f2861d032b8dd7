// Copies, and one thread too many passes the guard: it writes one element behind the end.
#include "planted.h"

namespace {

__global__ void copy_kernel(const float* in, float* out, int count) {
  const int n = static_cast<int>(threadIdx.x);
  if (n <= count) out[n] = in[n < count ? n : 0];
}

__global__ void copy_through_shared_kernel(const float* in, float* out, int count) {
  __shared__ float storage[kMostPlanted];
  float* copy = storage;  // the compiler knows the end of an array, but of no pointer
  const int n = static_cast<int>(threadIdx.x);
  if (n <= count) copy[n] = in[n < count ? n : 0];
  __syncthreads();
  if (n < count) out[n] = copy[n];
}

}  // namespace

cudaError_t launch_out_of_bounds(const float* in, float* out, int count) {
  copy_kernel<<<1, count + 1>>>(in, out, count);
  return cudaGetLastError();
}

cudaError_t launch_out_of_bounds_shared(const float* in, float* out, int count) {
  copy_through_shared_kernel<<<1, count + 1>>>(in, out, count);
  return cudaGetLastError();
}
