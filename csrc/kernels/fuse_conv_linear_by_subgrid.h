// The way of fuse_conv_linear for a kernel of one element on an axis with a stride; see
// fuse_conv_linear_by_subgrid_cpu.cpp.
#pragma once

#include "fuse_conv_linear.h"

namespace linfuse {

bool fits_by_subgrid(const FuseConvLinearParams& params);

void fuse_conv_linear_by_subgrid(const FuseConvLinearParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate);

}  // namespace linfuse
