#include "../kernels/conv_to_affine.h"

#include <tuple>

#include "common.h"

namespace linfuse {
namespace {

constexpr char kOp[] = "conv_to_affine";

std::tuple<Tensor, Tensor> conv_to_affine(Tensor weight, std::optional<Tensor> bias,
                                          IntList input_size, IntList stride, IntList padding,
                                          IntList dilation, int64_t groups, bool transposed,
                                          IntList output_padding, std::string padding_mode,
                                          std::optional<IntList> rows) {
  ConvToAffineParams params;
  params.dtype = dtype_of(kOp, "weight", weight);
  params.geometry = make_geometry(kOp, {weight.sizes(), input_size, stride, padding, dilation,
                                        groups, transposed, output_padding, padding_mode});
  bias = checked_vector(kOp, "bias", bias, "weight", weight, params.geometry.out_channels);
  std::tie(params.row_start, params.row_stop) = row_range(kOp, rows, params.geometry);

  weight = as_contiguous(kOp, weight);
  const int64_t row_count = params.row_stop - params.row_start;
  Tensor matrix = allocate(kOp, weight, {row_count, params.geometry.cols()});
  Tensor offset = allocate(kOp, weight, {row_count});
  params.weight = weight.const_data_ptr();
  params.bias = data_or_null(bias);
  params.matrix = matrix.mutable_data_ptr();
  params.offset = offset.mutable_data_ptr();
#if defined(LINFUSE_WITH_CUDA)
  if (weight.is_cuda()) {
    const CudaScope scope(weight);
    check_cuda(kOp, launch_conv_to_affine_cuda(params, scope.stream()));
    return {matrix, offset};
  }
#endif
  launch_conv_to_affine_cpu(params, torch_parallel_for());
  return {matrix, offset};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(linfuse, CPU, m) { m.impl("conv_to_affine", TORCH_BOX(&conv_to_affine)); }
#if defined(LINFUSE_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(linfuse, CUDA, m) {
  m.impl("conv_to_affine", TORCH_BOX(&conv_to_affine));
}
#endif

}  // namespace linfuse
