#pragma once

#include "fuse_conv_linear_work.h"

namespace linfuse {

// Whether the layer is one for fuse_conv_linear_by_output.
bool fits_by_output(const FuseConvLinearParams& params);

void fuse_conv_linear_by_output(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
                                const Allocate& allocate);

}  // namespace linfuse
