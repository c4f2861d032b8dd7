#include "../kernels/fuse_linear_conv.h"

#include <functional>

#include "common.h"
#include "engine.h"

namespace linfuse {
namespace {

constexpr char kOp[] = "fuse_linear_conv";

std::tuple<Tensor, Tensor> fuse_linear_conv(Tensor linear_weight, std::optional<Tensor> linear_bias,
                                            Tensor conv_weight, std::optional<Tensor> conv_bias,
                                            IntList input_size, IntList stride, IntList padding,
                                            IntList dilation, int64_t groups, bool transposed,
                                            IntList output_padding, std::string padding_mode) {
  FuseLinearConvParams params;
  params.dtype = dtype_of(kOp, "conv_weight", conv_weight);
  params.geometry = make_geometry(kOp, {conv_weight.sizes(), input_size, stride, padding, dilation,
                                        groups, transposed, output_padding, padding_mode});
  const Geometry& geometry = params.geometry;
  if (linear_weight.dim() != 2) {
    detail::reject(kOp, "`linear_weight` must have 2 dimensions, got shape " +
                            detail::to_text(linear_weight.sizes()));
  }
  params.features = linear_weight.size(1);
  check_like(kOp, "linear_weight", linear_weight, "conv_weight", conv_weight,
             {geometry.cols(), params.features});
  const detail::Checked checked(kOp);
  checked.multiply(params.features, checked.multiply(geometry.rows(), 8));
  linear_bias =
      checked_vector(kOp, "linear_bias", linear_bias, "conv_weight", conv_weight, geometry.cols());
  conv_bias = checked_vector(kOp, "conv_bias", conv_bias, "conv_weight", conv_weight,
                             geometry.out_channels);

  if (goes_by_torch(false)) {
    return call_op(kOp, "linfuse::fuse_linear_conv_by_torch", linear_weight, linear_bias,
                   conv_weight, conv_bias, input_size, stride, padding, dilation, groups,
                   transposed, output_padding, padding_mode);
  }
  conv_weight = as_contiguous(kOp, conv_weight);
  Tensor weight = allocate(kOp, conv_weight, {geometry.rows(), params.features});
  Tensor bias = allocate(kOp, conv_weight, {geometry.rows()});
  params.linear_weight = linear_weight.const_data_ptr();
  params.linear_stride[0] = linear_weight.stride(0);
  params.linear_stride[1] = linear_weight.stride(1);
  params.linear_bias = data_or_null(linear_bias);
  params.conv_weight = conv_weight.const_data_ptr();
  params.conv_bias = data_or_null(conv_bias);
  params.weight = weight.mutable_data_ptr();
  params.bias = bias.mutable_data_ptr();
  params.threads = static_cast<int>(torch::stable::get_num_threads());
  params.way = way();
  Scratch scratch(kOp, conv_weight);
  launch_fuse_linear_conv_cpu(params, torch_parallel_for(), std::ref(scratch));
  return {weight, bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(linfuse, CPU, m) {
  m.impl("fuse_linear_conv", TORCH_BOX(&fuse_linear_conv));
}

}  // namespace linfuse
