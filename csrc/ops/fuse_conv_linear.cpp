#include "../kernels/fuse_conv_linear.h"

#include <functional>

#include "common.h"
#include "engine.h"

namespace linfuse {
namespace {

constexpr char kOp[] = "fuse_conv_linear";

std::tuple<Tensor, Tensor> fuse_conv_linear(Tensor conv_weight, std::optional<Tensor> conv_bias,
                                            Tensor linear_weight, std::optional<Tensor> linear_bias,
                                            IntList input_size, IntList stride, IntList padding,
                                            IntList dilation, int64_t groups, bool transposed,
                                            IntList output_padding, std::string padding_mode) {
  FuseConvLinearParams params;
  params.dtype = dtype_of(kOp, "conv_weight", conv_weight);
  params.geometry = make_geometry(kOp, {conv_weight.sizes(), input_size, stride, padding, dilation,
                                        groups, transposed, output_padding, padding_mode});
  const Geometry& geometry = params.geometry;
  if (linear_weight.dim() != 2) {
    detail::reject(kOp, "`linear_weight` must have 2 dimensions, got shape " +
                            detail::to_text(linear_weight.sizes()));
  }
  params.features = linear_weight.size(0);
  check_like(kOp, "linear_weight", linear_weight, "conv_weight", conv_weight,
             {params.features, geometry.rows()});
  const detail::Checked checked(kOp);
  checked.multiply(params.features, checked.multiply(geometry.cols(), 8));
  conv_bias = checked_vector(kOp, "conv_bias", conv_bias, "conv_weight", conv_weight,
                             geometry.out_channels);
  linear_bias =
      checked_vector(kOp, "linear_bias", linear_bias, "conv_weight", conv_weight, params.features);

  if (goes_by_torch(conv_weight.is_cuda())) {
    return call_op(kOp, "linfuse::fuse_conv_linear_by_torch", conv_weight, conv_bias, linear_weight,
                   linear_bias, input_size, stride, padding, dilation, groups, transposed,
                   output_padding, padding_mode);
  }
  conv_weight = as_contiguous(kOp, conv_weight);
  Tensor weight = allocate(kOp, conv_weight, {params.features, geometry.cols()});
  Tensor bias = allocate(kOp, conv_weight, {params.features});
  params.conv_weight = conv_weight.const_data_ptr();
  params.conv_bias = data_or_null(conv_bias);
  params.linear_weight = linear_weight.const_data_ptr();
  params.linear_stride =
      ImageStrides::of_matrix(linear_weight.stride(0), linear_weight.stride(1),
                              geometry.out_channels_per_group(), geometry.out_positions());
  params.linear_bias = data_or_null(linear_bias);
  params.weight = weight.mutable_data_ptr();
  params.weight_stride = ImageStrides::of_matrix(
      geometry.cols(), 1, geometry.in_channels_per_group(), geometry.in_positions());
  params.bias = bias.mutable_data_ptr();
  Scratch scratch(kOp, conv_weight);
#if defined(LINFUSE_WITH_CUDA)
  if (conv_weight.is_cuda()) {
    const CudaScope scope(conv_weight);
    check_cuda(kOp, launch_fuse_conv_linear_cuda(params, scope.stream(), std::ref(scratch)));
    return {weight, bias};
  }
#endif
  params.threads = static_cast<int>(torch::stable::get_num_threads());
  params.way = way();
  launch_fuse_conv_linear_cpu(params, torch_parallel_for(), std::ref(scratch));
  return {weight, bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(linfuse, CPU, m) {
  m.impl("fuse_conv_linear", TORCH_BOX(&fuse_conv_linear));
}
#if defined(LINFUSE_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(linfuse, CUDA, m) {
  m.impl("fuse_conv_linear", TORCH_BOX(&fuse_conv_linear));
}
#endif

}  // namespace linfuse
