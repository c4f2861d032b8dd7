// The operands of fuse_conv_linear on a card, packed as fuse_conv_linear_by_packed_cuda.cu reads
// them, whose words these are.
#pragma once

#include <type_traits>

#include "fuse_conv_linear.h"
#include "ptx.h"

#if defined(LINFUSE_WITH_CUDA)
namespace linfuse {

// Of a step of the product; a line has whole ones.
template <typename T>
constexpr int kDepth = 4 * kPiece<T>;
constexpr int kPackPositions = 64;

struct PackedSizes {
  int64_t depth;    // of a line
  int64_t tiles;    // of a feature, to pack
  int64_t feature;  // bytes
  int64_t weight;   // bytes

  template <typename T>
  static PackedSizes of(const Geometry& g) {
    constexpr auto kSize = static_cast<int64_t>(sizeof(T));
    const int64_t steps = divide_up(g.out_channels_per_group(), kDepth<T>);
    const int64_t depth = steps * kDepth<T>;
    return {depth, g.groups * steps * divide_up(g.out_positions(), kPackPositions),
            g.groups * g.out_positions() * depth * kSize,
            g.groups * g.kernel_positions() * g.in_channels_per_group() * depth * kSize};
  }
};

// Calls visit(T{}) for the types that go this way, and returns `other` for double, whose tensor
// cores are fed well enough without packing.
template <typename Result, typename Visitor>
Result dispatch_packed(DType dtype, Result other, const Visitor& visit) {
  return dispatch(dtype, [&](auto zero) -> Result {
    if constexpr (std::is_same_v<decltype(zero), double>) {
      return other;
    } else {
      return visit(zero);
    }
  });
}

// Some features of the Linear.
struct PackedChunk {
  int64_t first = 0;
  int64_t features = 0;
  int64_t slices = 1;      // of a feature, each a block's work
  void* packed = nullptr;  // [features, group, o, c_out]
  void* parts = nullptr;   // [features, slices] of the fused bias, in Accumulate
};

[[nodiscard]] cudaError_t launch_pack_linear_cuda(const FuseConvLinearParams& params,
                                                  const PackedChunk& chunk, cudaStream_t stream);

// The convolution's weight as [group, k, c_in, c_out].
[[nodiscard]] cudaError_t launch_pack_weight_cuda(const FuseConvLinearParams& params, void* packed,
                                                  cudaStream_t stream);

}  // namespace linfuse
#endif
