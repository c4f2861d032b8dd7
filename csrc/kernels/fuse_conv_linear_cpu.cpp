// Which of the six ways a layer goes: on a subgrid where it has one, else the cheapest.
#include <stdexcept>

#include "fuse_conv_linear.h"
#include "fuse_conv_linear_by_columns.h"
#include "fuse_conv_linear_by_input.h"
#include "fuse_conv_linear_by_output.h"
#include "fuse_conv_linear_by_position.h"
#include "fuse_conv_linear_by_subgrid.h"
#include "fuse_conv_linear_cost.h"

namespace linfuse {
namespace {

bool takes_all(const FuseConvLinearParams&) { return true; }

struct Candidate {
  Way way;
  double (*cost)(const FuseConvLinearParams& params);
  bool (*takes)(const FuseConvLinearParams& params);  // dearer to know than the cost
  void (*run)(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
              const Allocate& allocate);
};

constexpr Candidate kCandidates[] = {
    {Way::kInput, cost_by_input, takes_all, fuse_conv_linear_by_input},
    {Way::kTiles, cost_by_tiles, takes_all, fuse_conv_linear_by_tiles},
    {Way::kOutput, cost_by_output, takes_all, fuse_conv_linear_by_output},
    {Way::kColumns, cost_by_columns, takes_all, fuse_conv_linear_by_columns},
    {Way::kPosition, cost_by_position, takes_by_position, fuse_conv_linear_by_position},
};

}  // namespace

void launch_fuse_conv_linear_cpu(const FuseConvLinearParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate) {
  if (params.features == 0) return;
  if (fits_by_subgrid(params)) {
    fuse_conv_linear_by_subgrid(params, parallel_for, allocate);
    return;
  }
  const Candidate* best = nullptr;
  double least = kNever;
  for (const Candidate& one : kCandidates) {
    if (params.way != Way::kCheapest && params.way != one.way) continue;
    const double cost = one.cost(params);
    if (cost < least && one.takes(params)) {
      best = &one;
      least = cost;
    }
  }
  if (best == nullptr) {
    throw std::invalid_argument("fuse_conv_linear: this layer cannot go the way that was set");
  }
  best->run(params, parallel_for, allocate);
}

}  // namespace linfuse
