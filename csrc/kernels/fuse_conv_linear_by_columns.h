// The way of fuse_conv_linear for few kernel elements and many output channels; see
// fuse_conv_linear_by_columns_cpu.cpp.
#pragma once

#include "fuse_conv_linear.h"

namespace linfuse {

double cost_by_columns(const FuseConvLinearParams& params);

void fuse_conv_linear_by_columns(const FuseConvLinearParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate);

}  // namespace linfuse
