// How fuse_conv_linear_by_input_cpu.cpp cuts its work. Terms
//
//   block    as many input channels of one group as the engine takes at a time
//            (fuse_conv_linear_engines.h), counted over all groups
//   batch    the blocks whose weights are packed at a time: all of them, unless they are very many
//   job      a panel of some groups and one slab, packed as [group][o][line][f]
//   stage    the jobs whose panels are held at a time
//
// Where jobs are many and their panels fit a core's own cache, each is done by one thread alone.
// Where not, all threads share a stage: they pack its panels together, then multiply together.
//
// All sizes follow from the problem alone: they, and so the bits of the result, are the same for
// every number of threads.
#pragma once

#include "fuse_conv_linear_engines.h"

namespace linfuse {

struct Plan {
  // Half of a usual second-level cache.
  static constexpr int64_t kOwnPanelBytes = int64_t{1} << 20;
  static constexpr int64_t kOwnJobs = 16;
  // Small enough for allocators to keep: fresh pages cost more than what they hold.
  static constexpr int64_t kMostPanelBytes = int64_t{16} << 20;
  static constexpr int64_t kMostWeightBytes = int64_t{16} << 20;

  int64_t in_channels;  // of a group
  int64_t lines;        // of one output position of a group
  int64_t columns;      // of a block
  int64_t weights;      // elements of a block's weights at one k
  int64_t kernel_positions;
  int64_t groups;
  int64_t blocks_per_group;  // of about the same size each
  int64_t batch;             // blocks
  Panels panels;
  Slabs slabs;
  int64_t job_groups;  // groups of a job
  bool alone;          // whether a thread does a job by itself
  int64_t stage;       // jobs

  int64_t blocks() const { return groups * blocks_per_group; }
  int64_t jobs_per_panel() const { return divide_up(groups, job_groups); }
  int64_t jobs_per_slab() const { return panels.count * jobs_per_panel(); }
  int64_t jobs() const { return slabs.count * jobs_per_slab(); }
  // Elements of the weights of a block.
  int64_t block_weights() const { return kernel_positions * weights; }
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
    return slabs.most_reads * slabs.positions_per_read() * job_groups * lines * panels.most_width();
  }
};

namespace detail {

// As many groups in a job as fit, then as few slabs.
inline void cut_jobs(const Geometry& g, int64_t most_size, Plan& plan) {
  const int64_t plane = g.out_positions() * plan.lines * plan.panels.most_width();
  plan.job_groups = std::clamp<int64_t>(most_size / plane, 1, g.groups);
  plan.slabs = one_slab(g);
  const int64_t read =
      plan.slabs.positions_per_read() * plan.job_groups * plan.lines * plan.panels.most_width();
  cut_slabs(g, 1, std::max<int64_t>(1, most_size / read), plan.slabs);
}

}  // namespace detail

inline Plan make_plan(const Geometry& g, int64_t features, const EngineShape& shape) {
  const int64_t size = shape.element_bytes;
  Plan plan = {};
  plan.in_channels = g.in_channels_per_group();
  plan.lines = shape.lines;
  plan.columns = shape.columns;
  plan.weights = shape.weights;
  plan.kernel_positions = g.kernel_positions();
  plan.groups = g.groups;
  plan.blocks_per_group = shape.blocks;
  plan.batch =
      std::clamp<int64_t>(Plan::kMostWeightBytes / (plan.block_weights() * size), 1, plan.blocks());

  // As many vectors as the engine takes, but no panel too large.
  int64_t most_vectors = shape.most_vectors;
  const int64_t plane = g.out_positions() * plan.lines * shape.lanes * size;
  while (most_vectors > 2 && plane * most_vectors > Plan::kMostPanelBytes) --most_vectors;
  plan.panels = Panels(features, shape.lanes, most_vectors);

  detail::cut_jobs(g, Plan::kOwnPanelBytes / size, plan);
  plan.alone = plan.panel_size() * size <= Plan::kOwnPanelBytes &&
               2 * plan.slabs.all_reads <= 3 * g.axis[plan.slabs.axis].out &&
               plan.jobs() >= Plan::kOwnJobs && plan.batch == plan.blocks();
  if (plan.alone) return plan;
  detail::cut_jobs(g, Plan::kMostPanelBytes / size, plan);
  const int64_t panel_bytes = std::max<int64_t>(1, plan.panel_size() * size);
  plan.stage = std::clamp<int64_t>(Plan::kMostPanelBytes / panel_bytes, 1, plan.jobs_per_slab());
  return plan;
}

}  // namespace linfuse
