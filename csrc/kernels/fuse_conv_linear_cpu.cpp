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
double nothing(const FuseConvLinearParams&) { return 0; }

struct Candidate {
  Way way;
  double (*least)(const FuseConvLinearParams& params);  // what it costs at least
  double (*cost)(const FuseConvLinearParams& params);   // dearer to know
  bool (*takes)(const FuseConvLinearParams& params);    // dearer still
  void (*run)(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
              const Allocate& allocate);
};

constexpr Candidate kCandidates[] = {
    {Way::kInput, nothing, cost_by_input, takes_all, fuse_conv_linear_by_input},
    {Way::kTiles, nothing, cost_by_tiles, takes_all, fuse_conv_linear_by_tiles},
    {Way::kOutput, nothing, cost_by_output, takes_all, fuse_conv_linear_by_output},
    {Way::kColumns, nothing, cost_by_columns, takes_all, fuse_conv_linear_by_columns},
    {Way::kPosition, least_by_position, cost_by_position, takes_by_position,
     fuse_conv_linear_by_position},
    {Way::kPositionTiles, least_by_position_tiles, cost_by_position_tiles, takes_by_position,
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
  double least = kNever;
  std::transform(std::begin(kCandidates), std::end(kCandidates), cost, [&](const Candidate& one) {
    const bool may_be_it =
        params.way == Way::kCheapest ? one.least(params) < least : params.way == one.way;
    const double its = may_be_it ? one.cost(params) : kNever;
    least = std::min(least, its);
    return its;
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
