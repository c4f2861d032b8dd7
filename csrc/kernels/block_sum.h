// The sum of one value per thread of a block, by a tree: its order is fixed, and so are its bits.
#pragma once

namespace linfuse {

// Every thread of the block calls this, and thread 0 gets the sum. kThreads is a power of two.
// After the last barrier nobody but thread 0 looks at `sums`, and only at what it alone writes: the
// next call needs no barrier before it.
template <int kThreads, typename A>
__device__ A block_sum(A value, A (&sums)[kThreads]) {
  const int thread = static_cast<int>(threadIdx.x);
  sums[thread] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) sums[thread] += sums[thread + half];
    __syncthreads();
  }
  return thread == 0 ? sums[0] : value;
}

}  // namespace linfuse
