// Which of the seven ways a layer goes: on a subgrid where it has one, else the cheapest.
#include <algorithm>
#include <iterator>
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
    {Way::kPositionTiles, cost_by_position_tiles, takes_by_position,
     fuse_conv_linear_by_position_tiles},
};

}  // namespace

void launch_fuse_conv_linear_cpu(const FuseConvLinearParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate) {
  if (params.features == 0) return;
  if (fits_by_subgrid(params)) {
    fuse_conv_linear_by_subgrid(params, parallel_for, allocate);
    return;
  }
  double cost[std::size(kCandidates)];
  std::transform(std::begin(kCandidates), std::end(kCandidates), cost, [&](const Candidate& one) {
    return params.way == Way::kCheapest || params.way == one.way ? one.cost(params) : kNever;
  });
  for (;;) {
    double* const least = std::min_element(std::begin(cost), std::end(cost));
    if (*least == kNever) break;
    const Candidate& best = kCandidates[least - cost];
    if (best.takes(params)) {
      best.run(params, parallel_for, allocate);
      return;
    }
    *least = kNever;
  }
  throw std::invalid_argument("fuse_conv_linear: this layer cannot go the way that was set");
}

}  // namespace linfuse
