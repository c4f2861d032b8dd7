// The choice between the three ways to make the weight on a card, of which one makes the bias as
// well.
#include "fuse_conv_linear.h"
#include "fuse_conv_linear_bias.h"

namespace linfuse {
namespace {

// A tile's smaller sides would be mostly empty below this.
constexpr int64_t kFewChannels = 8;

}  // namespace

cudaError_t launch_fuse_conv_linear_cuda(const FuseConvLinearParams& params, cudaStream_t stream,
                                         const Allocate& allocate) {
  if (params.features == 0) return cudaSuccess;
  if (goes_by_packed_cuda(params)) {
    return launch_fuse_conv_linear_by_packed_cuda(params, stream, allocate);
  }
  const Geometry& g = params.geometry;
  const bool has_few_channels =
      g.in_channels_per_group() < kFewChannels || g.out_channels_per_group() < kFewChannels;
  const cudaError_t error = has_few_channels
                                ? launch_fuse_conv_linear_by_element_cuda(params, stream)
                                : launch_fuse_conv_linear_by_tile_cuda(params, stream);
  if (error != cudaSuccess) return error;
  return launch_fuse_conv_linear_bias_cuda(params, stream, allocate);
}

}  // namespace linfuse
