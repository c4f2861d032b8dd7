#pragma once

#include "fuse_conv_linear_work.h"

namespace linfuse {

double cost_by_input(const FuseConvLinearParams& params);

void fuse_conv_linear_by_input(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
                               const Allocate& allocate);

// The same by the machine's matrix tiles, for half types where it has them.
double cost_by_tiles(const FuseConvLinearParams& params);

void fuse_conv_linear_by_tiles(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
                               const Allocate& allocate);

}  // namespace linfuse
