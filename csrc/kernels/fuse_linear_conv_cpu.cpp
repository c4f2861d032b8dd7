#include <type_traits>

#include "fuse_linear_conv.h"
#include "widen.h"

namespace linfuse {
namespace {

template <typename A>
constexpr DType kDType = std::is_same_v<A, double> ? DType::kFloat64 : DType::kFloat32;

// The product with the adjoint; operands, strides and dtype are still to come.
FuseConvLinearParams product_with_adjoint(const FuseLinearConvParams& params, int64_t features) {
  FuseConvLinearParams product;
  product.geometry = adjoint(params.geometry);
  product.features = features;
  product.threads = params.threads;
  return product;
}

// The bias of the Linear is an image as well. What it becomes is rounded once, with conv_bias.
template <typename T>
void make_bias(const FuseLinearConvParams& params, const ParallelFor& parallel_for,
               const Allocate& allocate) {
  using A = Accumulate<T>;
  const Geometry& g = params.geometry;
  T* bias = static_cast<T*>(params.bias);
  const A* sums = nullptr;
  if (params.linear_bias != nullptr) {
    const int64_t elements = g.out_channels * g.in_channels_per_group() * g.kernel_positions();
    A* made = nullptr;
    if constexpr (std::is_same_v<T, A>) {
      made = bias;
    } else {
      made = static_cast<A*>(allocate(g.rows() * static_cast<int64_t>(sizeof(A))));
    }
    FuseConvLinearParams product = product_with_adjoint(params, 1);
    product.dtype = kDType<A>;
    product.conv_weight =
        widen<A>(static_cast<const T*>(params.conv_weight), elements, parallel_for, allocate);
    product.linear_weight =
        widen<A>(static_cast<const T*>(params.linear_bias), g.cols(), parallel_for, allocate);
    product.linear_stride =
        ImageStrides::of_matrix(0, 1, g.in_channels_per_group(), g.in_positions());
    product.weight = made;
    product.weight_stride =
        ImageStrides::of_matrix(0, 1, g.out_channels_per_group(), g.out_positions());
    launch_fuse_conv_linear_cpu(product, parallel_for, allocate);
    sums = made;
  }
  const T* conv_bias = static_cast<const T*>(params.conv_bias);
  for (int64_t c = 0, row = 0; c < g.out_channels; ++c) {
    const A more = conv_bias == nullptr ? A{} : static_cast<A>(conv_bias[c]);
    for (int64_t o = 0; o < g.out_positions(); ++o, ++row) {
      bias[row] = static_cast<T>(sums == nullptr ? more : sums[row] + more);
    }
  }
}

}  // namespace

void launch_fuse_linear_conv_cpu(const FuseLinearConvParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate) {
  const Geometry& g = params.geometry;
  FuseConvLinearParams product = product_with_adjoint(params, params.features);
  product.dtype = params.dtype;
  product.way = params.way;
  product.conv_weight = params.conv_weight;
  product.linear_weight = params.linear_weight;
  product.linear_stride = ImageStrides::of_matrix(params.linear_stride[1], params.linear_stride[0],
                                                  g.in_channels_per_group(), g.in_positions());
  product.weight = params.weight;
  product.weight_stride =
      ImageStrides::of_matrix(1, params.features, g.out_channels_per_group(), g.out_positions());
  launch_fuse_conv_linear_cpu(product, parallel_for, allocate);
  dispatch(params.dtype,
           [&](auto zero) { make_bias<decltype(zero)>(params, parallel_for, allocate); });
}

}  // namespace linfuse
