// The way of fuse_conv_linear for few kernel elements and many output channels; see
// fuse_conv_linear_by_columns_cpu.cpp.
#pragma once

#include "fuse_conv_linear.h"

namespace linfuse {

// Only for a Linear whose images have no gaps between positions, so that the last bits may depend
// on where it lies.
bool fits_by_columns(const FuseConvLinearParams& params);

// Whether it is better than by position too, where both fit: the Linear is read where it lies, and
// not copied into frames. Half types are copied either way.
bool wins_by_columns(const FuseConvLinearParams& params);

void fuse_conv_linear_by_columns(const FuseConvLinearParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate);

}  // namespace linfuse
