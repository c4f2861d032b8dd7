#include "../kernels/fuse_conv_conv.h"

#include <functional>
#include <numeric>

#include "common.h"

namespace linfuse {
namespace {

constexpr char kOp[] = "fuse_conv_conv";

int64_t checked_groups(const char* name, int64_t groups, int64_t out_channels) {
  if (groups < 1 || out_channels % groups != 0) {
    detail::reject(kOp, std::string("`") + name + "` must be at least 1 and divide the layer's " +
                            std::to_string(out_channels) + " output channels, got " +
                            std::to_string(groups));
  }
  return groups;
}

// Sizes and steps of the two kernels, and the size of the merged one.
std::vector<int64_t> read_kernels(const Tensor& first, const Tensor& second, IntList first_stride,
                                  IntList first_dilation, IntList second_dilation,
                                  FuseConvConvParams& params) {
  const detail::Checked checked(kOp);
  const auto axes = static_cast<size_t>(first.dim() - 2);
  const detail::PerAxis stride = detail::per_axis(kOp, "first_stride", first_stride, axes, 1);
  const detail::PerAxis step1 = detail::per_axis(kOp, "first_dilation", first_dilation, axes, 1);
  detail::PerAxis step2 = detail::per_axis(kOp, "second_dilation", second_dilation, axes, 1);
  std::vector<int64_t> size;
  for (size_t n = 0; n < axes; ++n) {
    const int64_t size1 = first.size(static_cast<int64_t>(n) + 2);
    const int64_t size2 = second.size(static_cast<int64_t>(n) + 2);
    step2[n] = checked.multiply(stride[n], step2[n]);
    // In units of how far apart the taps are; the step of a kernel of one element plays no part.
    const int64_t unit = std::gcd(size1 > 1 ? step1[n] : 0, size2 > 1 ? step2[n] : 0);
    const size_t axis = n + kAxes - axes;
    params.first.size[axis] = size1;
    params.first.step[axis] = size1 > 1 ? step1[n] / unit : 1;
    params.second.size[axis] = size2;
    params.second.step[axis] = size2 > 1 ? step2[n] / unit : 1;
    size.push_back(
        checked.add(checked.multiply(size1 - 1, params.first.step[axis]),
                    checked.add(checked.multiply(size2 - 1, params.second.step[axis]), 1)));
  }
  return size;
}

std::tuple<Tensor, Tensor> fuse_conv_conv(Tensor first_weight, std::optional<Tensor> first_bias,
                                          Tensor second_weight, std::optional<Tensor> second_bias,
                                          IntList first_stride, IntList first_dilation,
                                          int64_t first_groups, IntList second_dilation,
                                          int64_t second_groups) {
  FuseConvConvParams params;
  params.dtype = dtype_of(kOp, "first_weight", first_weight);
  if (first_weight.dim() < 3 || first_weight.dim() > 5 ||
      second_weight.dim() != first_weight.dim()) {
    detail::reject(kOp, "both weights must have the same 3, 4 or 5 dimensions, got shapes " +
                            detail::to_text(first_weight.sizes()) + " and " +
                            detail::to_text(second_weight.sizes()));
  }
  for (const Tensor* weight : {&first_weight, &second_weight}) {
    if (weight->numel() == 0) {
      detail::reject(kOp, "the weights must have no empty dimension, got shape " +
                              detail::to_text(weight->sizes()));
    }
  }
  params.mid_channels = first_weight.size(0);
  params.out_channels = second_weight.size(0);
  params.first_groups = checked_groups("first_groups", first_groups, params.mid_channels);
  params.second_groups = checked_groups("second_groups", second_groups, params.out_channels);
  const detail::Checked checked(kOp);
  params.in_channels = checked.multiply(first_weight.size(1), first_groups);
  if (checked.multiply(second_weight.size(1), second_groups) != params.mid_channels) {
    detail::reject(kOp, "`second_weight` must take the " + std::to_string(params.mid_channels) +
                            " channels that the first puts out, got " +
                            std::to_string(second_weight.size(1) * second_groups));
  }
  check_like(kOp, "second_weight", second_weight, "first_weight", first_weight,
             second_weight.sizes());
  first_bias = checked_vector(kOp, "first_bias", first_bias, "first_weight", first_weight,
                              params.mid_channels);
  second_bias = checked_vector(kOp, "second_bias", second_bias, "first_weight", first_weight,
                               params.out_channels);
  const std::vector<int64_t> kernel = read_kernels(first_weight, second_weight, first_stride,
                                                   first_dilation, second_dilation, params);
  std::vector<int64_t> size = {params.out_channels,
                               params.in_channels / std::gcd(first_groups, second_groups)};
  size.insert(size.end(), kernel.begin(), kernel.end());
  int64_t bytes = 8;
  for (int64_t each : size) bytes = checked.multiply(bytes, each);

  first_weight = as_contiguous(kOp, first_weight);
  second_weight = as_contiguous(kOp, second_weight);
  Tensor weight = allocate(kOp, first_weight, size);
  Tensor bias = allocate(kOp, first_weight, {params.out_channels});
  params.first_weight = first_weight.const_data_ptr();
  params.first_bias = data_or_null(first_bias);
  params.second_weight = second_weight.const_data_ptr();
  params.second_bias = data_or_null(second_bias);
  params.weight = weight.mutable_data_ptr();
  params.bias = bias.mutable_data_ptr();
  params.threads = static_cast<int>(torch::stable::get_num_threads());
  Scratch scratch(kOp, first_weight);
  launch_fuse_conv_conv_cpu(params, torch_parallel_for(), std::ref(scratch));
  return {weight, bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(linfuse, CPU, m) { m.impl("fuse_conv_conv", TORCH_BOX(&fuse_conv_conv)); }

}  // namespace linfuse
