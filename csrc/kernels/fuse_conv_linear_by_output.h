#pragma once

#include "fuse_conv_linear_work.h"

namespace linfuse {

double cost_by_output(const FuseConvLinearParams& params);

void fuse_conv_linear_by_output(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
                                const Allocate& allocate);

}  // namespace linfuse
