// The bias of a fused layer on a card, for the ways that read the Linear where it lies, and the
// last step of it for the one that packs.
#pragma once

#include "fuse_conv_linear.h"

#if defined(LINFUSE_WITH_CUDA)
namespace linfuse {

// bias[f] = linear_bias[f] + the sum of its parts
struct FusedBias {
  int64_t features = 0;
  int64_t slices = 0;                 // parts of a feature
  const void* parts = nullptr;        // [features, slices], in Accumulate
  const void* linear_bias = nullptr;  // [features], or null for zeros
  void* bias = nullptr;               // [features]
};

[[nodiscard]] cudaError_t launch_add_parts_cuda(DType dtype, const FusedBias& job,
                                                cudaStream_t stream);

// Of params, the bias alone.
[[nodiscard]] cudaError_t launch_fuse_conv_linear_bias_cuda(const FuseConvLinearParams& params,
                                                            cudaStream_t stream,
                                                            const Allocate& allocate);

}  // namespace linfuse
#endif
