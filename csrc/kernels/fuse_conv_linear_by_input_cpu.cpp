// fused[f, (c_in, i)] = sum over the taps (o, k) of i and over c_out of
//                       linear[f, (c_out, o)] * weight[c_out, c_in, k]
//
// Terms (and those of fuse_conv_linear_plan.h)
//   segment  neighbouring input positions i, as many as keep a piece in the second-level cache
//   unit     neighbouring segments and some blocks of a job: what a thread takes of a shared stage
//
// For every job: pack the panel, then fill [segment, block] pieces of the result. Each input
// position needs one small product over exactly its valid taps times c_out (tile.h), so neither
// padding nor the holes of a stride are ever multiplied. A panel is read with unit stride and
// shared by all blocks; its elements meet conv_bias while they are packed, so that the Linear is
// read once. The pieces are turned in cache (turn.h) so that memory sees runs of a segment each.
// Every element of the result is computed whole by one thread, in a fixed order: the bits do not
// depend on the number of threads.
#include "fuse_conv_linear_by_input.h"
#include "fuse_conv_linear_cost.h"
#include "fuse_conv_linear_plan.h"

namespace linfuse {
namespace {

constexpr int64_t kPieceBytes = int64_t{192} << 10;
constexpr int64_t kSegmentTaps = int64_t{1} << 16;
// Segments are of so many positions, but for the last: as many as are turned at a time, and whole
// lines of memory.
constexpr int64_t kSegmentStep = 32;
constexpr int64_t kUnitsPerThread = 8;
// Elements of a row that make a task of packing: fewer where there would be few tasks.
constexpr int64_t kPackTask = 4096;
constexpr int64_t kLeastPackTask = 512;
constexpr int64_t kPackTasks = 8;
// A Linear and a result of so much together are beyond all caches.
constexpr int64_t kFarBytes = 64'000'000;
// What it costs beside its products (fuse_conv_linear_cost.h).
struct Weights {
  double load;               // a vector that a tile reads
  double tap;                // for a tile
  double listed;             // a tap, for the tiles of all input channels
  double packed;             // a vector of rows
  double unpacked;           // likewise
  double packed_channels;    // a vector of channels
  double unpacked_channels;  // likewise
  double moved;              // a vector of rows that are innermost in memory already
  double far;                // a vector beyond all caches
  double repacked;           // a weight
  double launch;
};
constexpr Measured<Weights> kWeights = {
    .narrow = {.load = 0,
               .tap = 12,
               .listed = 0,
               .packed = 42,
               .unpacked = 25,
               .packed_channels = 70,
               .unpacked_channels = 33,
               .moved = 10,
               .far = 0,
               .repacked = 0,
               .launch = 81e4},
    .wide = {.load = 2.5,
             .tap = 0,
             .listed = 44,
             .packed = 76,
             .unpacked = 46,
             .packed_channels = 160,
             .unpacked_channels = 60,
             .moved = 20,
             .far = 29,
             .repacked = 10,
             .launch = 54e4},
};
// By matrix tiles, in the same unit: a product is of one input channel's weights and a tile of the
// Linear.
struct TileWeights {
  double load;      // a line of the Linear that a tile reads
  double part;      // of a tap, for the tiles of a panel
  double position;  // likewise
  double packed;    // a line of a vector
  double unpacked;  // a vector of rows
  double moved;     // a line, or a vector, of rows that are innermost in memory already
  double repacked;  // a factor of a weight
  double launch;
};
constexpr TileWeights kTileWeights = {.load = 4.2,
                                      .part = 33,
                                      .position = 25,
                                      .packed = 85,
                                      .unpacked = 39,
                                      .moved = 30,
                                      .repacked = 20,
                                      .launch = 57e4};

template <typename T, typename Engine>
class ByInput {
  using A = Accumulate<T>;
  using Element = typename Engine::Element;

 public:
  ByInput(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
          const Allocate& allocate)
      : work_(params, parallel_for),
        g_(work_.g),
        engine_(work_),
        plan_(make_plan(g_, params.features, sizeof(T), engine_.shape())) {
    panel_bytes_ = aligned(plan_.panel_size() * int64_t{sizeof(Element)});
    const int64_t position_bytes = plan_.columns * plan_.panels.most_width() * int64_t{sizeof(A)};
    const int64_t positions_of_slab = inner_in(g_, plan_.slabs) * plan_.slabs.length;
    const int64_t most =
        std::min(kPieceBytes / position_bytes, kSegmentTaps / plan_.kernel_positions);
    const int64_t segments = divide_up(positions_of_slab, std::max(kSegmentStep, most));
    segment_ = divide_up(divide_up(positions_of_slab, segments), kSegmentStep) * kSegmentStep;
    piece_bytes_ = aligned(segment_ * position_bytes);
    stream_ = !plan_.alone && plan_.stage * panel_bytes_ >= kLargeBlock;
    const int64_t own_bytes = piece_bytes_ + (plan_.alone ? panel_bytes_ : 0);
    threads_ = std::clamp<int64_t>(kMostScratchBytes / own_bytes, 1, params.threads);
    const int64_t weight_bytes =
        aligned(plan_.batch * plan_.block_weights() * int64_t{sizeof(Element)});
    const int64_t panels_bytes = panel_bytes_ * (plan_.alone ? threads_ : plan_.stage);
    const int64_t bytes = weight_bytes + panels_bytes + piece_bytes_ * threads_;
    weight_ = reinterpret_cast<Element*>(allocate(bytes));
    advise_huge_pages(weight_, bytes);
    panels_ = reinterpret_cast<char*>(weight_) + weight_bytes;
    workers_.resize(static_cast<size_t>(threads_));
    for (int64_t n = 0; n < threads_; ++n) {
      workers_[static_cast<size_t>(n)].piece =
          reinterpret_cast<A*>(panels_ + panels_bytes + n * piece_bytes_);
      workers_[static_cast<size_t>(n)].first_tap.resize(static_cast<size_t>(segment_ + 1));
    }
    const int64_t line = std::max<int64_t>(1, panel_positions());
    const int64_t share = plan_.stage * plan_.job_groups * plan_.lines * line / kPackTasks;
    task_lines_ =
        std::min(plan_.lines, divide_up(std::clamp(share, kLeastPackTask, kPackTask), line));
    group_tasks_ = divide_up(plan_.lines, task_lines_);
    work_.make_parts(
        plan_.alone ? plan_.stretches * plan_.jobs_per_slab() : plan_.stage * job_tasks(),
        plan_.panels.most_width());
  }

  void run() {
    if (plan_.batch == plan_.blocks()) pack_weight({0, plan_.blocks()});
    plan_.alone ? run_alone() : run_together();
    work_.write_bias();
  }

 private:
  struct Job {
    const Slab& slab;
    Range groups;
    Rows rows;
    Element* panel;
  };

  // What the taps of a segment depend on. A slab's lines stand where its number says.
  struct Listed {
    int64_t slab = -1;
    int64_t segment = -1;
    int64_t step = -1;
    bool operator==(const Listed&) const = default;
  };

  // What a thread keeps from one piece of work to the next.
  struct Worker {
    Slab slab;
    PositionTaps taps[kAxes];
    std::vector<int64_t> linear_start;
    std::vector<int64_t> kernel;     // k of each tap, times Plan::kernel_step
    std::vector<int64_t> first_tap;  // of each position of a segment
    Listed listed;                   // what these three are of
    A* piece;                        // [segment][c_in of the block][f]
  };

  // `number` counts within a slab.
  Job make_job(const Slab& slab, int64_t number, int64_t panel) const {
    const int64_t group = number % plan_.jobs_per_panel() * plan_.job_groups;
    return {slab,
            {group, std::min(plan_.groups, group + plan_.job_groups)},
            plan_.panels.rows(number / plan_.jobs_per_panel()),
            reinterpret_cast<Element*>(panels_ + panel * panel_bytes_)};
  }

  Worker& worker(int64_t thread) { return workers_[static_cast<size_t>(thread)]; }

  // Stretches are counted as [stretch][panel][groups].
  void run_alone() {
    const Range batch = {0, plan_.blocks()};
    const int64_t count = plan_.stretches * plan_.jobs_per_slab();
    const int64_t cost = g_.rows() / plan_.jobs_per_panel() * plan_.panels.most_width() *
                         plan_.kernel_positions * plan_.in_channels / plan_.stretches;
    work_.share(count, cost, threads_, [&](int64_t thread, int64_t number) {
      const Range slabs = plan_.stretch(number / plan_.jobs_per_slab());
      Slab& slab = worker(thread).slab;
      const Job job = make_job(slab, number % plan_.jobs_per_slab(), thread);
      double* sums = work_.start_part(number);
      start_stretch(g_, plan_.slabs, slabs, slab);
      for (int64_t n = slabs.first; n < slabs.last; ++n) {
        next_slab(g_, plan_.slabs, n, slab);
        for (int64_t task = 0; task < tasks(job); ++task) pack_task(job, task, sums);
        multiply(job, batch, blocks_of(job, batch), positions_of(g_, plan_.slabs, slab),
                 worker(thread));
      }
    });
    for (int64_t n = 0; n < count; ++n) {
      const int64_t panel = n % plan_.jobs_per_slab() / plan_.jobs_per_panel();
      work_.add_part(plan_.panels.rows(panel), n);
    }
  }

  void run_together() {
    const bool one_batch = plan_.batch == plan_.blocks();
    Slab slab;
    for (int64_t number = 0; number < plan_.slabs.count; ++number) {
      make_slab(g_, plan_.slabs, number, slab);
      for (int64_t first = 0; first < plan_.jobs_per_slab(); first += plan_.stage) {
        const Range stage = {first, std::min(plan_.jobs_per_slab(), first + plan_.stage)};
        pack_stage(slab, stage);
        for (int64_t block = 0; block < plan_.blocks(); block += plan_.batch) {
          const Range batch = {block, std::min(plan_.blocks(), block + plan_.batch)};
          if (!one_batch) pack_weight(batch);
          multiply_stage(slab, stage, batch);
        }
      }
    }
  }

  int64_t panel_positions() const { return plan_.slabs.room * plan_.slabs.positions_per_read(); }

  Range blocks_of(const Job& job, Range batch) const {
    return {std::max(batch.first, job.groups.first * plan_.blocks_per_group),
            std::min(batch.last, job.groups.last * plan_.blocks_per_group)};
  }

  void pack_weight(Range batch) const {
    const int64_t tasks = engine_.weight_tasks();
    const int64_t cost = plan_.block_weights() / tasks;
    for_each(work_.parallel_for, (batch.last - batch.first) * tasks, cost, [&](int64_t n) {
      const int64_t block = batch.first + n / tasks;
      const int64_t task = n % tasks;
      engine_.pack_weight(first_c_out(block / plan_.blocks_per_group), task,
                          plan_.block_start(block), plan_.block_size(block),
                          weight_of(block, batch));
    });
  }

  Element* weight_of(int64_t block, Range batch) const {
    return weight_ + (block - batch.first) * plan_.block_weights();
  }

  int64_t first_c_out(int64_t group) const { return group * g_.out_channels_per_group(); }

  // Tasks of packing a job, and the most that one has.
  int64_t tasks(const Job& job) const {
    return (job.groups.last - job.groups.first) * group_tasks_;
  }
  int64_t job_tasks() const { return plan_.job_groups * group_tasks_; }

  void pack_stage(const Slab& slab, Range stage) {
    const int64_t items = (stage.last - stage.first) * job_tasks();
    const int64_t cost = task_lines_ * panel_positions() * plan_.panels.most_width();
    for_each(work_.parallel_for, items, cost, [&](int64_t n) {
      const Job job = make_job(slab, stage.first + n / job_tasks(), n / job_tasks());
      if (n % job_tasks() < tasks(job)) pack_task(job, n % job_tasks(), work_.start_part(n));
    });
    for (int64_t n = 0; n < items; ++n) {
      const Job job = make_job(slab, stage.first + n / job_tasks(), n / job_tasks());
      if (n % job_tasks() < tasks(job)) work_.add_part(job.rows, n);
    }
  }

  // Some lines of a group.
  void pack_task(const Job& job, int64_t task, double* sums) const {
    const int64_t group = task / group_tasks_;
    const int64_t start = task % group_tasks_ * task_lines_;
    const Range lines = {start, std::min(plan_.lines, start + task_lines_)};
    const int64_t step = plan_.lines * job.rows.width;
    Element* panel = job.panel + group * panel_positions() * step + start * job.rows.width;
    for (const Run& run : job.slab.runs) {
      double* run_sums = run.counts ? sums : nullptr;
      if (run.slot < 0 && run_sums == nullptr) continue;
      engine_.pack(job.rows, first_c_out(job.groups.first + group), lines, run.source, run.count,
                   run.slot < 0 ? nullptr : panel + run.slot * step, step, run_sums, stream_);
    }
    if (stream_) work_.turns.finish();
  }

  void multiply_stage(const Slab& slab, Range stage, Range batch) {
    const Range all = positions_of(g_, plan_.slabs, slab);
    const int64_t jobs = stage.last - stage.first;
    const int64_t wanted = divide_up(kUnitsPerThread * threads_, jobs);
    const int64_t segments = divide_up(all.last - all.first, segment_);
    // Neighbouring segments share lines of memory: better they have one writer.
    const int64_t strips = std::min(segments, wanted);
    const int64_t most_blocks =
        std::min(plan_.job_groups * plan_.blocks_per_group, batch.last - batch.first);
    const int64_t splits = std::min(most_blocks, divide_up(wanted, strips));
    const int64_t taps = divide_up(plan_.kernel_positions * g_.out_positions(), g_.in_positions());
    const int64_t cost = divide_up(segments, strips) * segment_ * taps * plan_.lines *
                         plan_.panels.most_width() * divide_up(most_blocks, splits) * plan_.columns;
    work_.share(jobs * strips * splits, cost, threads_, [&](int64_t thread, int64_t unit) {
      const int64_t split = unit % splits;
      const int64_t strip = unit / splits % strips;
      const int64_t panel = unit / splits / strips;
      const Job job = make_job(slab, stage.first + panel, panel);
      const Range some = {
          all.first + strip * segments / strips * segment_,
          std::min(all.last, all.first + (strip + 1) * segments / strips * segment_)};
      const Range blocks = blocks_of(job, batch);
      const int64_t count = blocks.last - blocks.first;
      if (count <= 0) return;
      multiply(job, batch,
               {blocks.first + split * count / splits, blocks.first + (split + 1) * count / splits},
               some, worker(thread));
    });
  }

  void multiply(const Job& job, Range batch, Range blocks, Range positions, Worker& worker) const {
    const typename Engine::Session session(engine_);
    for (int64_t first = positions.first; first < positions.last; first += segment_) {
      const Range segment = {first, std::min(positions.last, first + segment_)};
      list_taps(job, segment, worker);
      for (int64_t block = blocks.first; block < blocks.last; ++block) {
        multiply_piece(job, batch, block, segment, worker);
      }
    }
  }

  void multiply_piece(const Job& job, Range batch, int64_t block, Range segment,
                      Worker& worker) const {
    const int64_t channels = plan_.block_size(block);
    const int64_t width = job.rows.width;
    const int64_t columns = engine_.columns(channels);
    const int64_t group = block / plan_.blocks_per_group - job.groups.first;
    typename Engine::Task task = engine_.task(job.rows, channels);
    task.linear = job.panel + group * panel_positions() * plan_.lines * width;
    task.weight = weight_of(block, batch);
    const int64_t* first_tap = worker.first_tap.data();
    for (int64_t s = 0; s < segment.last - segment.first; ++s) {
      task.linear_start = worker.linear_start.data() + first_tap[s];
      task.kernel = worker.kernel.data() + first_tap[s];
      task.taps = first_tap[s + 1] - first_tap[s];
      engine_.multiply(task, job.rows, channels, worker.piece + s * columns * width);
    }
    engine_.unpack(job.rows, worker.piece, channels, plan_.channels_before(block), segment.first,
                   segment.last - segment.first);
  }

  // Where the operands of every tap of a segment begin: in the panel, and among the kernel
  // elements. Neighbouring jobs and blocks often share a segment.
  void list_taps(const Job& job, Range segment, Worker& worker) const {
    const int64_t step = plan_.lines * job.rows.width;
    const Listed wanted = {job.slab.number, segment.first, step};
    if (worker.listed == wanted) return;
    worker.listed = wanted;
    worker.linear_start.clear();
    worker.kernel.clear();
    Position before = {{-1, -1, -1}};
    for (int64_t position = segment.first; position < segment.last; ++position) {
      const Position i = in_position(g_, position);
      for (int a = 0; a < kAxes; ++a) {
        if (i.at[a] == before.at[a]) continue;
        worker.taps[a].list_by_column(g_, a, i.at[a]);
        if (a != plan_.slabs.axis) continue;
        for (TapGroup& group : worker.taps[a].groups) {
          group.position = job.slab.slot(group.position);
        }
      }
      before = i;
      worker.first_tap[static_cast<size_t>(position - segment.first)] =
          static_cast<int64_t>(worker.linear_start.size());
      // Sizes of the panel's axes: those of the output, and its lines on the axis of the slabs.
      const int64_t size1 = plan_.slabs.axis == 1 ? plan_.slabs.room : g_.axis[1].out;
      const int64_t size2 = plan_.slabs.axis == 2 ? plan_.slabs.room : g_.axis[2].out;
      for_each_tap(worker.taps[0], [&](int64_t o0, int64_t k0) {
        for_each_tap(worker.taps[1], [&](int64_t o1, int64_t k1) {
          const int64_t o_line = (o0 * size1 + o1) * size2;
          const int64_t k_line = (k0 * g_.axis[1].kernel + k1) * g_.axis[2].kernel;
          for_each_tap(worker.taps[2], [&](int64_t o2, int64_t k2) {
            worker.linear_start.push_back((o_line + o2) * step);
            worker.kernel.push_back((k_line + k2) * plan_.kernel_step);
          });
        });
      });
    }
    worker.first_tap[static_cast<size_t>(segment.last - segment.first)] =
        static_cast<int64_t>(worker.linear_start.size());
  }

  template <typename Visitor>
  static void for_each_tap(const PositionTaps& taps, Visitor&& visit) {
    for (const TapGroup& group : taps.groups) {
      for (int64_t n = group.first; n < group.last; ++n) {
        visit(group.position, taps.kernel[static_cast<size_t>(n)]);
      }
    }
  }

  Work<T> work_;
  const Geometry& g_;
  const Engine engine_;
  const Plan plan_;
  Element* weight_ = nullptr;
  char* panels_ = nullptr;
  int64_t panel_bytes_ = 0;
  int64_t segment_ = 0;  // positions
  bool stream_ = false;  // whether panels are larger than a core's own cache
  int64_t piece_bytes_ = 0;
  int64_t threads_ = 1;
  int64_t task_lines_ = 0;  // that make a task of packing
  int64_t group_tasks_ = 0;
  std::vector<Worker> workers_;
};

template <typename T>
double cost(const FuseConvLinearParams& params) {
  const Geometry& g = params.geometry;
  const TileSet<Accumulate<T>>& tiles = simd_kernels(simd_level());
  const bool of_channels = fits_channel_vectors<T>(params);
  const int64_t channels = g.in_channels_per_group();
  const int64_t vectors = divide_up(of_channels ? channels : params.features, tiles.lanes);
  const int64_t columns = of_channels ? params.features : channels;
  const Tiling tiling(tiles, vectors, columns);
  const auto of_tap = static_cast<double>(g.out_channels_per_group() * vectors * columns);
  const Weights& weights = kWeights.now();
  const double tap = of_tap * tiling.product_with(weights.load) + weights.tap * tiling.tiles;
  const double lists = of_channels ? tiling.tiles : tiling.rows;
  const double products =
      valid_taps(g) * (static_cast<double>(g.groups) * tap + weights.listed * lists);
  const double fixed = weights.launch + weights.repacked * static_cast<double>(weights_of(g));
  const auto rows = static_cast<double>(g.rows());
  const auto cols = static_cast<double>(g.cols());
  if (of_channels) {
    const double each = static_cast<double>(params.features) / static_cast<double>(tiles.lanes);
    return fixed + products +
           each * (weights.packed_channels * rows + weights.unpacked_channels * cols);
  }
  const bool turns = turns_rows(params);
  const int64_t bytes = params.features * (g.rows() + g.cols()) * int64_t{sizeof(T)};
  const double far =
      bytes < kFarBytes ? 0 : weights.far * double{sizeof(T)} / double{sizeof(Accumulate<T>)};
  return fixed + products +
         static_cast<double>(vectors) *
             (turns ? (weights.packed + far) * rows + (weights.unpacked + far) * cols
                    : weights.moved * (rows + cols));
}

template <typename T>
double tiles_cost(const FuseConvLinearParams& params) {
  constexpr int64_t kFactors = AmxPairs<T>::kFactors;
  const TileWeights& weights = kTileWeights;
  const Geometry& g = params.geometry;
  const TileCut<T> cut(g);
  const auto vectors = static_cast<double>(divide_up(params.features, Amx::kLanes));
  const auto panels =
      static_cast<double>(divide_up(params.features, Amx::kLanes * Amx::kMostTiles));
  const auto blocks = static_cast<double>(g.groups * cut.blocks);
  const double part = vectors * static_cast<double>(kFactors * cut.columns()) +
                      weights.load * vectors * static_cast<double>(cut.depth) +
                      weights.part * panels;
  const bool turns = turns_rows(params);
  const double position = weights.position * panels;
  const double products = valid_taps(g) * static_cast<double>(cut.parts) * part +
                          static_cast<double>(g.in_positions()) * position;
  return weights.launch + blocks * products +
         weights.repacked * static_cast<double>(kFactors * weights_of(g)) +
         vectors * ((turns ? weights.packed : weights.moved) *
                        static_cast<double>(g.groups * cut.lines() * g.out_positions()) +
                    (turns ? weights.unpacked : weights.moved) * static_cast<double>(g.cols()));
}

}  // namespace

double cost_by_input(const FuseConvLinearParams& params) {
  return dispatch(params.dtype, [&](auto zero) { return cost<decltype(zero)>(params); });
}

void fuse_conv_linear_by_input(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
                               const Allocate& allocate) {
  dispatch(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (fits_channel_vectors<T>(params)) {
      ByInput<T, ChannelVectors<T>>(params, parallel_for, allocate).run();
      return;
    }
    ByInput<T, Vectors<T>>(params, parallel_for, allocate).run();
  });
}

double cost_by_tiles(const FuseConvLinearParams& params) {
  if (!fits_matrix_tiles(params)) return kNever;
  return dispatch(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) return tiles_cost<T>(params);
    return kNever;
  });
}

void fuse_conv_linear_by_tiles(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
                               const Allocate& allocate) {
  dispatch(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      ByInput<T, MatrixTiles<T>>(params, parallel_for, allocate).run();
    }
  });
}

}  // namespace linfuse
