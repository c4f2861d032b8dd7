#include "../kernels/conv_to_csr_backward.h"

#include <tuple>

#include "common.h"

namespace linfuse {
namespace {

constexpr char kOp[] = "conv_to_csr_backward";

Tensor conv_to_csr_backward(Tensor grad_values, IntList weight_size, IntList input_size,
                            IntList stride, IntList padding, IntList dilation, int64_t groups,
                            bool transposed, IntList output_padding, std::string padding_mode,
                            std::optional<IntList> rows) {
  ConvToCsrBackwardParams params;
  params.dtype = dtype_of(kOp, "grad_values", grad_values);
  params.geometry = make_geometry(kOp, {weight_size, input_size, stride, padding, dilation, groups,
                                        transposed, output_padding, padding_mode});
  std::tie(params.row_start, params.row_stop) = row_range(kOp, rows, params.geometry);
  if (params.row_start == params.row_stop) params.row_start = params.row_stop = 0;  // is held
  const auto tables = make_tables(
      kOp, [&] { return KernelTables(params.geometry, params.row_start, params.row_stop); });
  params.taps = tables.view();
  const int64_t stored =
      params.taps.stored.between(params.geometry, params.row_start, params.row_stop);
  check_like(kOp, "grad_values", grad_values, "grad_values", grad_values, {stored});

  grad_values = as_contiguous(kOp, grad_values);
  Tensor grad_weight = allocate(kOp, grad_values, weight_size);
  params.grad_values = grad_values.const_data_ptr();
  params.grad_weight = grad_weight.mutable_data_ptr();
#if defined(LINFUSE_WITH_CUDA)
  if (grad_values.is_cuda()) {
    const CudaScope scope(grad_values);
    const Tensor on_card = to_card(kOp, grad_values, tables.pack(), scope.stream());
    params.taps = tables.view(static_cast<const int64_t*>(on_card.const_data_ptr()));
    check_cuda(kOp, launch_conv_to_csr_backward_cuda(params, scope.stream()));
    return grad_weight;
  }
#endif
  launch_conv_to_csr_backward_cpu(params, torch_parallel_for());
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(linfuse, CPU, m) {
  m.impl("conv_to_csr_backward", TORCH_BOX(&conv_to_csr_backward));
}
#if defined(LINFUSE_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(linfuse, CUDA, m) {
  m.impl("conv_to_csr_backward", TORCH_BOX(&conv_to_csr_backward));
}
#endif

}  // namespace linfuse
