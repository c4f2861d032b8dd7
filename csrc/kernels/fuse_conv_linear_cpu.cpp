// Which of the five ways a layer goes.
#include "fuse_conv_linear.h"
#include "fuse_conv_linear_by_columns.h"
#include "fuse_conv_linear_by_input.h"
#include "fuse_conv_linear_by_output.h"
#include "fuse_conv_linear_by_position.h"
#include "fuse_conv_linear_by_subgrid.h"

namespace linfuse {

void launch_fuse_conv_linear_cpu(const FuseConvLinearParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate) {
  if (params.features == 0) return;
  if (fits_by_subgrid(params)) {
    fuse_conv_linear_by_subgrid(params, parallel_for, allocate);
  } else if (wins_by_columns(params)) {
    fuse_conv_linear_by_columns(params, parallel_for, allocate);
  } else if (fits_by_position(params)) {
    fuse_conv_linear_by_position(params, parallel_for, allocate);
  } else if (fits_by_columns(params)) {
    fuse_conv_linear_by_columns(params, parallel_for, allocate);
  } else if (fits_by_output(params)) {
    fuse_conv_linear_by_output(params, parallel_for, allocate);
  } else {
    fuse_conv_linear_by_input(params, parallel_for, allocate);
  }
}

}  // namespace linfuse
