// Two convolutions in a row as one:
//
//   fused[c_out, c_in, k]  = sum over k1 step1 + k2 step2 = k and over c of
//                            second[c_out, c, k2] * first[c, c_in, k1]
//   fused_bias[c_out]      = second_bias[c_out] + sum over c, k2 of second[c_out, c, k2] * bias[c]
//
// in float64 whatever the dtype, rounded once. Seen from one side, the second weight is a Linear
// behind a convolution of the first, whose input is the merged kernel; seen from the other, each
// input channel of the first is an image that the second takes on. So fuse_conv_linear makes all
// products: with the rows c_out where the second has the fewer groups, else with the rows c_in.
#pragma once

#include "fuse_conv_linear.h"

namespace linfuse {

struct FuseConvConvParams {
  struct Kernel {
    int64_t size[kAxes] = {1, 1, 1};
    int64_t step[kAxes] = {1, 1, 1};  // from one element to the next, in elements of the result

    int64_t positions() const { return size[0] * size[1] * size[2]; }
  };

  Kernel first;
  Kernel second;
  int64_t in_channels = 1;
  int64_t mid_channels = 1;  // out of the first, into the second
  int64_t out_channels = 1;
  int64_t first_groups = 1;
  int64_t second_groups = 1;
  DType dtype = DType::kFloat32;
  const void* first_weight = nullptr;   // [C_mid, C_in / first_groups, *k1], contiguous
  const void* first_bias = nullptr;     // [C_mid], or null for zeros
  const void* second_weight = nullptr;  // [C_out, C_mid / second_groups, *k2], contiguous
  const void* second_bias = nullptr;    // [C_out], or null for zeros
  void* weight = nullptr;               // [C_out, C_in / gcd(groups), *k]
  void* bias = nullptr;                 // [C_out]
  int threads = 1;                      // how many the scratch memory is made for

  // Of the merged kernel.
  int64_t size(int a) const {
    return (first.size[a] - 1) * first.step[a] + (second.size[a] - 1) * second.step[a] + 1;
  }
  int64_t positions() const { return size(0) * size(1) * size(2); }
};

void launch_fuse_conv_conv_cpu(const FuseConvConvParams& params, const ParallelFor& parallel_for,
                               const Allocate& allocate);

}  // namespace linfuse
