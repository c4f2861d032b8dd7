// The way of fuse_conv_linear for few rows, or few products; see
// fuse_conv_linear_by_position_cpu.cpp.
#pragma once

#include "fuse_conv_linear.h"

namespace linfuse {

// No cost is below this, for which nothing is planned.
double least_by_position(const FuseConvLinearParams& params);
double cost_by_position(const FuseConvLinearParams& params);

// Not a weight that is not finite, as zeros beside the image meet it here.
bool takes_by_position(const FuseConvLinearParams& params);

void fuse_conv_linear_by_position(const FuseConvLinearParams& params,
                                  const ParallelFor& parallel_for, const Allocate& allocate);

// The same by the machine's matrix tiles, for half types where it has them.
double least_by_position_tiles(const FuseConvLinearParams& params);
double cost_by_position_tiles(const FuseConvLinearParams& params);

void fuse_conv_linear_by_position_tiles(const FuseConvLinearParams& params,
                                        const ParallelFor& parallel_for, const Allocate& allocate);

}  // namespace linfuse
