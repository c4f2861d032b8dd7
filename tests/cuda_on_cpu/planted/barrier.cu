// Reverses an array in shared memory: without the barrier a thread may read what is not there yet,
// and threads that leave before the barrier may keep the others waiting for ever.
#include "planted.h"

namespace {

enum class Barrier { kForAll, kForSome, kForNone };

template <Barrier kBarrier>
__global__ void reverse_kernel(const float* in, float* out, int count) {
  __shared__ float copy[kMostPlanted];
  const int n = static_cast<int>(threadIdx.x);
  copy[n] = in[n];
  if (kBarrier == Barrier::kForSome && n >= count / 2) return;
  if (kBarrier != Barrier::kForNone) __syncthreads();
  out[n] = copy[count - 1 - n];
}

template <Barrier kBarrier>
cudaError_t launch(const float* in, float* out, int count) {
  reverse_kernel<kBarrier><<<1, count>>>(in, out, count);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_missing_barrier(const float* in, float* out, int count) {
  return launch<Barrier::kForNone>(in, out, count);
}

cudaError_t launch_divergent_barrier(const float* in, float* out, int count) {
  return launch<Barrier::kForSome>(in, out, count);
}

cudaError_t launch_no_fault(const float* in, float* out, int count) {
  return launch<Barrier::kForAll>(in, out, count);
}
