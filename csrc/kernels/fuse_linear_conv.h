// A Linear and the convolution behind it as one Linear, without the convolution's matrix:
//
//   fused[(c_out, o), d]  = sum over the taps (i, k) of o and over c_in of
//                           linear[(c_in, i), d] * weight[c_out, c_in, k]
//   fused_bias[(c_out, o)] = bias[c_out] + the same sum over linear_bias[(c_in, i)]
//
// Each column of the Linear is an image. The matrix of the convolution, from the left, is that of
// its adjoint from the right, so that fuse_conv_linear makes both sums.
#pragma once

#include "fuse_conv_linear.h"

namespace linfuse {

struct FuseLinearConvParams {
  Geometry geometry;
  int64_t features = 0;  // D, columns of the Linear
  DType dtype = DType::kFloat32;
  const void* linear_weight = nullptr;  // [cols(), D]
  int64_t linear_stride[2] = {0, 0};    // in elements
  const void* linear_bias = nullptr;    // [cols()], or null for zeros
  const void* conv_weight = nullptr;    // contiguous, as Geometry::weight_index counts
  const void* conv_bias = nullptr;      // [C_out], or null for zeros
  void* weight = nullptr;               // [rows(), D]
  void* bias = nullptr;                 // [rows()]
  int threads = 1;                      // how many the scratch memory is made for
  Way way = Way::kCheapest;             // of the product
};

void launch_fuse_linear_conv_cpu(const FuseLinearConvParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate);

}  // namespace linfuse
