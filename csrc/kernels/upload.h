// Small tables of a kernel, from the host to a card.
#pragma once

#include <cstdint>

#if defined(LINFUSE_WITH_CUDA)
#include <cuda_runtime_api.h>

namespace linfuse {

// Writes the words to `to`, on the card. They are read before this returns and nothing is waited
// for, so that a CUDA graph can hold it.
[[nodiscard]] cudaError_t launch_upload_cuda(const int64_t* words, int64_t count, int64_t* to,
                                             cudaStream_t stream);

}  // namespace linfuse
#endif
