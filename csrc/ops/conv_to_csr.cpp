#include "../kernels/conv_to_csr.h"

#include <limits>
#include <tuple>

#include "common.h"

namespace linfuse {
namespace {

constexpr char kOp[] = "conv_to_csr";

void check_fits_index32(const ConvToCsrParams& params) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  if (params.stored > kLargest || params.geometry.cols() > kLargest) {
    detail::reject(kOp, "`index32` must be False for " + std::to_string(params.stored) +
                            " elements in " + std::to_string(params.geometry.cols()) +
                            " columns, got True");
  }
}

std::tuple<Tensor, Tensor, Tensor> conv_to_csr(Tensor weight, IntList input_size, IntList stride,
                                               IntList padding, IntList dilation, int64_t groups,
                                               bool transposed, IntList output_padding,
                                               std::string padding_mode,
                                               std::optional<IntList> rows, bool index32) {
  ConvToCsrParams params;
  params.dtype = dtype_of(kOp, "weight", weight);
  params.geometry = make_geometry(kOp, {weight.sizes(), input_size, stride, padding, dilation,
                                        groups, transposed, output_padding, padding_mode});
  std::tie(params.row_start, params.row_stop) = row_range(kOp, rows, params.geometry);
  weight = as_contiguous(kOp, weight);
  const auto index =
      index32 ? torch::headeronly::ScalarType::Int : torch::headeronly::ScalarType::Long;
  // Before anything that takes long: of far too many rows the pointers alone do not fit.
  Tensor row_pointers = allocate(kOp, weight, {params.row_stop - params.row_start + 1}, index);
  const auto tables = make_tables(
      kOp, [&] { return RowTables(params.geometry, params.row_start, params.row_stop); });
  params.taps = tables.view();
  params.stored = params.taps.stored.between(params.geometry, params.row_start, params.row_stop);
  params.index32 = index32;
  if (index32) check_fits_index32(params);

  Tensor values = allocate(kOp, weight, {params.stored});
  Tensor columns = allocate(kOp, weight, {params.stored}, index);
  params.weight = weight.const_data_ptr();
  params.values = values.mutable_data_ptr();
  params.columns = columns.mutable_data_ptr();
  params.row_pointers = row_pointers.mutable_data_ptr();
#if defined(LINFUSE_WITH_CUDA)
  if (weight.is_cuda()) {
    const CudaScope scope(weight);
    const Tensor on_card = to_card(kOp, weight, tables.pack(), scope.stream());
    params.taps = tables.view(static_cast<const int64_t*>(on_card.const_data_ptr()));
    check_cuda(kOp, launch_conv_to_csr_cuda(params, scope.stream()));
    return {values, columns, row_pointers};
  }
#endif
  launch_conv_to_csr_cpu(params, torch_parallel_for());
  return {values, columns, row_pointers};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(linfuse, CPU, m) { m.impl("conv_to_csr", TORCH_BOX(&conv_to_csr)); }
#if defined(LINFUSE_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(linfuse, CUDA, m) { m.impl("conv_to_csr", TORCH_BOX(&conv_to_csr)); }
#endif

}  // namespace linfuse
