// How fuse_conv_linear_by_input_cpu.cpp cuts its work. Terms
//
//   block    up to TileSet::most_channels input channels of one group, counted over all groups
//   batch    the blocks whose weights are packed at a time: all of them, unless they are very many
//   job      a panel of some groups and one slab, packed as [group][o][c_out][f]
//   stage    the jobs whose panels are held at a time
//
// Where panels fit a core's own cache, one thread alone does the jobs of a stretch of slabs, in the
// same panel; stretches are as many as give the threads enough to do. Where not, all threads share
// a stage: they pack its panels together, then multiply together.
//
// All sizes follow from the problem alone: they, and so the bits of the result, are the same for
// every number of threads.
#pragma once

#include "fuse_conv_linear_work.h"

namespace linfuse {

struct Plan {
  // Two thirds of the second-level cache of a current server.
  static constexpr int64_t kOwnPanelBytes = int64_t{11} << 17;
  static constexpr int64_t kLeastStretches = 16;
  // Shorter runs of a row are slow to write.
  static constexpr int64_t kLeastPositions = 64;
  // Small enough for allocators to keep: fresh pages cost more than what they hold.
  static constexpr int64_t kMostPanelBytes = int64_t{16} << 20;
  static constexpr int64_t kMostWeightBytes = int64_t{16} << 20;

  int64_t in_channels;   // of a group
  int64_t out_channels;  // of a group
  int64_t kernel_positions;
  int64_t groups;
  int64_t blocks_per_group;  // of about the same size each
  int64_t batch;             // blocks
  Panels panels;
  Slabs slabs;
  int64_t job_groups;  // groups of a job
  bool alone;          // whether a thread does a stretch by itself
  int64_t stretches;   // of each panel
  int64_t stage;       // jobs

  int64_t blocks() const { return groups * blocks_per_group; }
  int64_t jobs_per_panel() const { return divide_up(groups, job_groups); }
  int64_t jobs_per_slab() const { return panels.count * jobs_per_panel(); }
  Range stretch(int64_t number) const {
    return {number * slabs.count / stretches, (number + 1) * slabs.count / stretches};
  }
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
    return slabs.lines * slabs.positions_per_read() * job_groups * out_channels *
           panels.most_width();
  }
};

namespace detail {

// As many groups in a job as fit, then as few slabs.
inline void cut_jobs(const Geometry& g, int64_t most_size, int64_t element_size, Plan& plan) {
  const int64_t plane = g.out_positions() * plan.out_channels * plan.panels.most_width();
  plan.job_groups = std::clamp<int64_t>(most_size / plane, 1, g.groups);
  plan.slabs = one_slab(g);
  const int64_t line = plan.slabs.positions_per_read() * plan.job_groups * plan.out_channels *
                       plan.panels.most_width();
  const int64_t room = std::max<int64_t>(1, most_size / line);
  cut_slabs(g, 1, room, whole_lines(g, plan.slabs, element_size), plan.slabs);
  plan.slabs.lines = std::max(plan.slabs.lines, std::min(room, g.axis[plan.slabs.axis].out));
}

// Lines that all stretches pack.
inline int64_t packed_lines(const Geometry& g, const Plan& plan) {
  int64_t lines = 0;
  Slab slab;
  for (int64_t n = 0; n < plan.stretches; ++n) {
    const Range some = plan.stretch(n);
    start_stretch(g, plan.slabs, some, slab);
    for (int64_t number = some.first; number < some.last; ++number) {
      next_slab(g, plan.slabs, number, slab);
      for (const Run& run : slab.runs) lines += run.slot < 0 ? 0 : run.count;
    }
  }
  return lines / plan.slabs.positions_per_read();
}

}  // namespace detail

// `element_size` is that of the result.
template <typename A>
Plan make_plan(const Geometry& g, int64_t features, int64_t element_size, const TileSet<A>& tiles) {
  constexpr int64_t kSize = sizeof(A);
  Plan plan = {};
  plan.in_channels = g.in_channels_per_group();
  plan.out_channels = g.out_channels_per_group();
  plan.kernel_positions = g.kernel_positions();
  plan.groups = g.groups;
  plan.blocks_per_group = divide_up(plan.in_channels, tiles.most_channels);
  const int64_t block_bytes =
      plan.kernel_positions * plan.out_channels * plan.most_in_block() * kSize;
  plan.batch = std::clamp<int64_t>(Plan::kMostWeightBytes / block_bytes, 1, plan.blocks());

  // As many vectors as leave a register for each sum of the largest block, but no panel too large.
  int64_t most_vectors = tiles.most_vectors(plan.most_in_block());
  const int64_t plane = g.out_positions() * plan.out_channels * tiles.lanes * kSize;
  while (most_vectors > 2 && plane * most_vectors > Plan::kMostPanelBytes) --most_vectors;
  plan.panels = Panels(features, tiles.lanes, most_vectors);

  detail::cut_jobs(g, Plan::kOwnPanelBytes / kSize, element_size, plan);
  plan.stretches = std::clamp<int64_t>(divide_up(Plan::kLeastStretches, plan.jobs_per_slab()), 1,
                                       plan.slabs.count);
  plan.alone = plan.panel_size() * kSize <= Plan::kOwnPanelBytes && plan.batch == plan.blocks() &&
               (plan.slabs.count == 1 ||
                plan.slabs.length * inner_in(g, plan.slabs) >= Plan::kLeastPositions) &&
               plan.stretches * plan.jobs_per_slab() >= Plan::kLeastStretches &&
               2 * detail::packed_lines(g, plan) <= 3 * g.axis[plan.slabs.axis].out;
  if (plan.alone) return plan;
  detail::cut_jobs(g, Plan::kMostPanelBytes / kSize, element_size, plan);
  const int64_t panel_bytes = std::max<int64_t>(1, plan.panel_size() * kSize);
  plan.stage = std::clamp<int64_t>(Plan::kMostPanelBytes / panel_bytes, 1, plan.jobs_per_slab());
  return plan;
}

}  // namespace linfuse
