// How fuse_conv_linear_by_input_cpu.cpp cuts its work. Terms
//
//   block    as many input channels of one group as the engine takes at a time
//            (fuse_conv_linear_engines.h), counted over all groups
//   batch    the blocks whose weights are packed at a time: all of them, unless they are very many
//   job      a panel of some groups and one slab, packed as [group][o][line][f]
//   stage    the jobs whose panels are held at a time
//
// Where panels fit a core's own cache, one thread alone does the jobs of a stretch of slabs, in the
// same panel; stretches are as many as give the threads enough to do. Where not, all threads share
// a stage: they pack its panels together, then multiply together.
//
// All sizes follow from the problem alone: they, and so the bits of the result, are the same for
// every number of threads.
#pragma once

#include "fuse_conv_linear_engines.h"

namespace linfuse {

struct Plan {
  // Two thirds of the second-level cache of a current server.
  static constexpr int64_t kOwnPanelBytes = int64_t{11} << 17;
  static constexpr int64_t kLeastStretches = 16;
  // Shorter runs of a row are slow to write.
  static constexpr int64_t kLeastPositions = 64;
  // Small enough for allocators to keep: fresh pages cost more than what they hold.
  static constexpr int64_t kMostPanelBytes = int64_t{16} << 20;

  int64_t in_channels;  // of a group
  int64_t lines;        // of one output position of a group
  int64_t columns;      // of a block
  int64_t weights;      // elements of a block's weights at one k
  int64_t kernel_step;
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
    return slabs.room * slabs.positions_per_read() * job_groups * lines * panels.most_width();
  }
};

namespace detail {

// As many groups in a job as fit, then as few slabs.
inline void cut_jobs(const Geometry& g, int64_t most_size, int64_t result_bytes, Plan& plan) {
  const int64_t plane = g.out_positions() * plan.lines * plan.panels.most_width();
  plan.job_groups = std::clamp<int64_t>(most_size / plane, 1, g.groups);
  plan.slabs = one_slab(g);
  const int64_t read =
      plan.slabs.positions_per_read() * plan.job_groups * plan.lines * plan.panels.most_width();
  const int64_t room = std::max<int64_t>(1, most_size / read);
  cut_slabs(g, 1, room, whole_lines(g, plan.slabs, result_bytes), plan.slabs);
  plan.slabs.room = std::max(plan.slabs.room, std::min(room, g.axis[plan.slabs.axis].out));
}

// Lines of output positions that all stretches pack.
inline int64_t packed_lines(const Geometry& g, const Plan& plan) {
  int64_t packed = 0;
  Slab slab;
  for (int64_t n = 0; n < plan.stretches; ++n) {
    const Range some = plan.stretch(n);
    start_stretch(g, plan.slabs, some, slab);
    for (int64_t number = some.first; number < some.last; ++number) {
      next_slab(g, plan.slabs, number, slab);
      for (const Run& run : slab.runs) packed += run.slot < 0 ? 0 : run.count;
    }
  }
  return packed / plan.slabs.positions_per_read();
}

}  // namespace detail

// `result_bytes` is the size of an element of the result.
inline Plan make_plan(const Geometry& g, int64_t features, int64_t result_bytes,
                      const EngineShape& shape) {
  const int64_t size = shape.element_bytes;
  Plan plan = {};
  plan.in_channels = g.in_channels_per_group();
  plan.lines = shape.lines;
  plan.columns = shape.columns;
  plan.weights = shape.weights;
  plan.kernel_step = shape.kernel_step;
  plan.kernel_positions = g.kernel_positions();
  plan.groups = g.groups;
  plan.blocks_per_group = shape.blocks;
  plan.batch =
      std::clamp<int64_t>(kMostWeightBytes / (plan.block_weights() * size), 1, plan.blocks());

  // As many vectors as the engine takes, but no panel too large.
  int64_t most_vectors = shape.most_vectors;
  const int64_t plane = g.out_positions() * plan.lines * shape.lanes * size;
  while (most_vectors > 2 && plane * most_vectors > Plan::kMostPanelBytes) --most_vectors;
  plan.panels = Panels(features, shape.lanes, most_vectors);

  detail::cut_jobs(g, Plan::kOwnPanelBytes / size, result_bytes, plan);
  plan.stretches = std::clamp<int64_t>(divide_up(Plan::kLeastStretches, plan.jobs_per_slab()), 1,
                                       plan.slabs.count);
  plan.alone = plan.panel_size() * size <= Plan::kOwnPanelBytes && plan.batch == plan.blocks() &&
               (plan.slabs.count == 1 ||
                plan.slabs.length * inner_in(g, plan.slabs) >= Plan::kLeastPositions) &&
               plan.stretches * plan.jobs_per_slab() >= Plan::kLeastStretches &&
               2 * detail::packed_lines(g, plan) <= 3 * g.axis[plan.slabs.axis].out;
  if (plan.alone) return plan;
  detail::cut_jobs(g, Plan::kMostPanelBytes / size, result_bytes, plan);
  const int64_t panel_bytes = std::max<int64_t>(1, plan.panel_size() * size);
  plan.stage = std::clamp<int64_t>(Plan::kMostPanelBytes / panel_bytes, 1, plan.jobs_per_slab());
  return plan;
}

}  // namespace linfuse
