// The table of contents: every op of torch.ops.linfuse and its schema.
//
// `padding` holds one value per axis, or a (low, high) pair per axis, first axis first. `rows` is
// (start, stop). Lists of one element stand for that value on every axis. Each op is implemented in
// the file of its name, except those that linfuse_ext/torch_engine.py implements by torch's
// convolution.
#include <torch/csrc/stable/library.h>

#define LINFUSE_GEOMETRY                                                                 \
  "SymInt[] input_size, SymInt[1] stride=1, SymInt[1] padding=0, SymInt[1] dilation=1, " \
  "SymInt groups=1, *, bool transposed=False, SymInt[1] output_padding=0, "              \
  "str padding_mode=\"zeros\""

STABLE_TORCH_LIBRARY(linfuse, m) {
  m.def("conv_to_affine(Tensor weight, Tensor? bias, " LINFUSE_GEOMETRY
        ", SymInt[]? rows=None) -> (Tensor matrix, Tensor offset)");
  m.def("conv_to_affine_backward(Tensor grad_matrix, SymInt[] weight_size, " LINFUSE_GEOMETRY
        ", SymInt[]? rows=None) -> Tensor grad_weight");

  m.def("conv_to_csr(Tensor weight, " LINFUSE_GEOMETRY
        ", SymInt[]? rows=None, bool index32=False) "
        "-> (Tensor values, Tensor columns, Tensor row_pointers)");
  m.def("conv_to_csr_backward(Tensor grad_values, SymInt[] weight_size, " LINFUSE_GEOMETRY
        ", SymInt[]? rows=None) -> Tensor grad_weight");

  m.def(
      "fuse_conv_linear(Tensor conv_weight, Tensor? conv_bias, Tensor linear_weight, "
      "Tensor? linear_bias, " LINFUSE_GEOMETRY ") -> (Tensor weight, Tensor bias)");
  m.def(
      "fuse_conv_linear_by_torch(Tensor conv_weight, Tensor? conv_bias, Tensor linear_weight, "
      "Tensor? linear_bias, " LINFUSE_GEOMETRY ") -> (Tensor weight, Tensor bias)");
  m.def("convolve_rows(Tensor rows, Tensor conv_weight, " LINFUSE_GEOMETRY ") -> Tensor convolved");
  m.def(
      "fuse_conv_linear_backward_conv(Tensor grad_weight, Tensor linear_weight, "
      "SymInt[] weight_size, " LINFUSE_GEOMETRY ") -> Tensor grad_conv_weight");

  m.def(
      "fuse_linear_conv(Tensor linear_weight, Tensor? linear_bias, Tensor conv_weight, "
      "Tensor? conv_bias, " LINFUSE_GEOMETRY ") -> (Tensor weight, Tensor bias)");
  m.def(
      "fuse_linear_conv_by_torch(Tensor linear_weight, Tensor? linear_bias, Tensor conv_weight, "
      "Tensor? conv_bias, " LINFUSE_GEOMETRY ") -> (Tensor weight, Tensor bias)");
  m.def(
      "fuse_conv_conv(Tensor first_weight, Tensor? first_bias, Tensor second_weight, "
      "Tensor? second_bias, SymInt[1] first_stride=1, SymInt[1] first_dilation=1, "
      "SymInt first_groups=1, SymInt[1] second_dilation=1, SymInt second_groups=1) "
      "-> (Tensor weight, Tensor bias)");
}
