// to[n] = words[n]
//
// Who computes what: the words travel as arguments of launches, kAtOnce at a time, and a thread
// writes each. A copy from memory that is not locked would wait for the stream, which capturing a
// graph forbids.
#include <algorithm>

#include "upload.h"

namespace linfuse {
namespace {

constexpr int kAtOnce = 448;  // arguments have room for 4 KB

struct Words {
  int64_t at[kAtOnce];
};

__global__ void __launch_bounds__(kAtOnce) upload_kernel(Words words, int count, int64_t* to) {
  const int n = static_cast<int>(threadIdx.x);
  if (n < count) to[n] = words.at[n];
}

}  // namespace

cudaError_t launch_upload_cuda(const int64_t* words, int64_t count, int64_t* to,
                               cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kAtOnce) {
    const auto here = static_cast<int>(std::min<int64_t>(kAtOnce, count - first));
    Words some;
    std::copy(words + first, words + first + here, some.at);
    upload_kernel<<<1, kAtOnce, 0, stream>>>(some, here, to + first);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace linfuse
