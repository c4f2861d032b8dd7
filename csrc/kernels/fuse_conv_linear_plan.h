// How fuse_conv_linear cuts its work on a CPU. Terms
//
//   block    up to TileSet::most_channels input channels of one group, counted over all groups
//   batch    the blocks whose weights are packed at a time: all of them, unless they are very many
//   slab     a range of input positions on one axis, and the output positions that they read
//   panel    `width` rows f of the Linear at the output positions of a slab, repacked as
//            [group][o][c_out][f] in Accumulate<T>
//   job      a panel of some groups and one slab
//   stage    the jobs whose panels are held at a time
//
// Where jobs are many and their panels fit a core's own cache, each is done by one thread alone.
// Where not, all threads share a stage: they pack its panels together, then multiply together.
//
// All sizes follow from the problem alone: they, and so the bits of the result, are the same for
// every number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../geometry/axis_taps.h"
#include "../geometry/geometry.h"
#include "tile.h"

namespace linfuse {

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

struct Slab {
  Range range;                 // of input positions on the slab axis
  std::vector<int64_t> reads;  // the output positions on that axis that they read, ascending

  // Where an output position that is read stands in `reads`.
  int64_t slot(int64_t o) const {
    return std::lower_bound(reads.begin(), reads.end(), o) - reads.begin();
  }
};

// False where the slab would read more than `most` output positions.
inline bool make_slab(const Geometry& g, int axis, Range range, int64_t most, Slab& slab) {
  slab.range = range;
  slab.reads.clear();
  PositionTaps taps;
  for (int64_t i = range.first; i < range.last; ++i) {
    taps.list_by_column(g, axis, i);
    for (const TapGroup& group : taps.groups) {
      // Nearly always the next one, or one that is there.
      if (slab.reads.empty() || group.position > slab.reads.back()) {
        slab.reads.push_back(group.position);
        continue;
      }
      const auto place = std::lower_bound(slab.reads.begin(), slab.reads.end(), group.position);
      if (*place != group.position) slab.reads.insert(place, group.position);
    }
    if (static_cast<int64_t>(slab.reads.size()) > most) return false;
  }
  return true;
}

struct Plan {
  // Half of a usual second-level cache.
  static constexpr int64_t kOwnPanelBytes = int64_t{1} << 20;
  static constexpr int64_t kOwnJobs = 16;
  // Small enough for allocators to keep: fresh pages cost more than what they hold.
  static constexpr int64_t kMostPanelBytes = int64_t{16} << 20;
  static constexpr int64_t kMostWeightBytes = int64_t{16} << 20;

  int64_t features;
  int64_t in_channels;   // of a group
  int64_t out_channels;  // of a group
  int64_t kernel_positions;
  int64_t blocks_per_group;  // of about the same size each
  int64_t blocks;
  int64_t batch;    // blocks
  int64_t lanes;    // of a vector
  int64_t vectors;  // that hold one position of all features
  int64_t panels;   // that share them as evenly as it goes
  bool alone;       // whether a thread does a job by itself
  int64_t groups;
  int64_t job_groups;       // groups of a job
  int64_t stage;            // jobs
  int slab_axis;            // the first axis of more than one input position
  int64_t other_positions;  // output positions for each one on the slab axis
  int64_t slab_length;
  int64_t slabs;
  int64_t most_reads;  // of a slab
  int64_t all_reads;   // of all slabs

  int64_t jobs_per_panel() const { return divide_up(groups, job_groups); }
  int64_t jobs_per_slab() const { return panels * jobs_per_panel(); }
  int64_t first_vector(int64_t panel) const { return panel * vectors / panels; }
  int64_t most_width() const { return divide_up(vectors, panels) * lanes; }
  int64_t most_in_block() const { return divide_up(in_channels, blocks_per_group); }
  int64_t block_start(int64_t block) const {
    const int64_t within = block % blocks_per_group;
    return within * in_channels / blocks_per_group;
  }
  int64_t block_size(int64_t block) const {
    const int64_t within = block % blocks_per_group;
    return (within + 1) * in_channels / blocks_per_group - block_start(block);
  }
  // Input channels before a block, over all groups.
  int64_t channels_before(int64_t block) const {
    return block / blocks_per_group * in_channels + block_start(block);
  }
  // Elements of the largest panel.
  int64_t panel_size() const {
    return most_reads * other_positions * job_groups * out_channels * most_width();
  }
};

namespace detail {

// Cuts the slab axis into the fewest equal ranges that read at most so many output positions each.
inline void cut_slabs(const Geometry& g, int64_t most, Plan& plan) {
  const int64_t size = g.axis[plan.slab_axis].in;
  for (int64_t length = size;; length = divide_up(length, 2)) {
    plan.slab_length = length;
    plan.slabs = divide_up(size, length);
    plan.most_reads = 0;
    plan.all_reads = 0;
    bool fits = true;
    for (int64_t first = 0; first < size && fits; first += length) {
      Slab slab;
      fits = make_slab(g, plan.slab_axis, {first, std::min(size, first + length)},
                       length == 1 ? INT64_MAX : most, slab);
      const auto reads = static_cast<int64_t>(slab.reads.size());
      plan.most_reads = std::max(plan.most_reads, reads);
      plan.all_reads += reads;
    }
    if (fits) return;
  }
}

// As many groups in a job as fit, then as few slabs.
inline void cut_jobs(const Geometry& g, int64_t most_size, Plan& plan) {
  const int64_t line = std::max<int64_t>(
      1, plan.other_positions * plan.out_channels * plan.most_width());  // of a group
  const int64_t plane = line * g.axis[plan.slab_axis].out;
  plan.job_groups = std::clamp<int64_t>(most_size / plane, 1, g.groups);
  cut_slabs(g, std::max<int64_t>(1, most_size / line / plan.job_groups), plan);
}

}  // namespace detail

template <typename A>
Plan make_plan(const Geometry& g, int64_t features, const TileSet<A>& tiles) {
  constexpr int64_t kSize = sizeof(A);
  Plan plan = {};
  plan.features = features;
  plan.in_channels = g.in_channels_per_group();
  plan.out_channels = g.out_channels_per_group();
  plan.kernel_positions = g.kernel_positions();
  plan.blocks_per_group = divide_up(plan.in_channels, tiles.most_channels);
  plan.blocks = g.groups * plan.blocks_per_group;
  plan.lanes = tiles.lanes;
  plan.groups = g.groups;
  const int64_t block_bytes =
      plan.kernel_positions * plan.out_channels * plan.most_in_block() * kSize;
  plan.batch = std::min(plan.blocks, std::max<int64_t>(1, Plan::kMostWeightBytes / block_bytes));

  plan.slab_axis = 0;
  while (plan.slab_axis < kAxes - 1 && g.axis[plan.slab_axis].in == 1) ++plan.slab_axis;
  plan.other_positions = g.out_positions() / g.axis[plan.slab_axis].out;
  plan.vectors = divide_up(features, plan.lanes);
  // As many vectors as leave a register for each sum of the largest block, but no panel too large.
  int64_t most_vectors =
      std::min<int64_t>(TileSet<A>::kMostVectors, tiles.registers / plan.most_in_block());
  while (most_vectors > 2 && g.rows() / g.groups * most_vectors * plan.lanes * kSize >
                                 Plan::kMostPanelBytes) {
    --most_vectors;
  }
  plan.panels = divide_up(plan.vectors, most_vectors);

  detail::cut_jobs(g, Plan::kOwnPanelBytes / kSize, plan);
  const int64_t lines = g.axis[plan.slab_axis].out;
  plan.alone = plan.panel_size() * kSize <= Plan::kOwnPanelBytes &&
               2 * plan.all_reads <= 3 * lines &&
               plan.slabs * plan.jobs_per_slab() >= Plan::kOwnJobs && plan.batch == plan.blocks;
  if (!plan.alone) {
    detail::cut_jobs(g, Plan::kMostPanelBytes / kSize, plan);
    const int64_t size = std::max<int64_t>(1, plan.panel_size() * kSize);
    plan.stage = std::clamp<int64_t>(Plan::kMostPanelBytes / size, 1, plan.jobs_per_slab());
  }
  return plan;
}

}  // namespace linfuse
