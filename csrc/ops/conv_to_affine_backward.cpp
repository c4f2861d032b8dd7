#include "../kernels/conv_to_affine_backward.h"

#include <tuple>

#include "common.h"

namespace linfuse {
namespace {

constexpr char kOp[] = "conv_to_affine_backward";

Tensor conv_to_affine_backward(Tensor grad_matrix, IntList weight_size, IntList input_size,
                               IntList stride, IntList padding, IntList dilation, int64_t groups,
                               bool transposed, IntList output_padding, std::string padding_mode,
                               std::optional<IntList> rows) {
  ConvToAffineBackwardParams params;
  params.dtype = dtype_of(kOp, "grad_matrix", grad_matrix);
  params.geometry = make_geometry(kOp, {weight_size, input_size, stride, padding, dilation, groups,
                                        transposed, output_padding, padding_mode});
  std::tie(params.row_start, params.row_stop) = row_range(kOp, rows, params.geometry);
  const int64_t row_count = params.row_stop - params.row_start;
  check_like(kOp, "grad_matrix", grad_matrix, "grad_matrix", grad_matrix,
             {row_count, params.geometry.cols()});

  grad_matrix = as_contiguous(kOp, grad_matrix);
  Tensor grad_weight = allocate(kOp, grad_matrix, weight_size);
  params.grad_matrix = grad_matrix.const_data_ptr();
  params.grad_weight = grad_weight.mutable_data_ptr();
#if defined(LINFUSE_WITH_CUDA)
  if (grad_matrix.is_cuda()) {
    const CudaScope scope(grad_matrix);
    check_cuda(kOp, launch_conv_to_affine_backward_cuda(params, scope.stream()));
    return grad_weight;
  }
#endif
  launch_conv_to_affine_backward_cpu(params, torch_parallel_for());
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(linfuse, CPU, m) {
  m.impl("conv_to_affine_backward", TORCH_BOX(&conv_to_affine_backward));
}
#if defined(LINFUSE_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(linfuse, CUDA, m) {
  m.impl("conv_to_affine_backward", TORCH_BOX(&conv_to_affine_backward));
}
#endif

}  // namespace linfuse
