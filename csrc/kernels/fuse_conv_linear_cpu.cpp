// fused[f, (c_in, i)] = sum over the taps (o, k) of i and over c_out of
//                       linear[f, (c_out, o)] * weight[c_out, c_in, k]
//
// Terms (and those of fuse_conv_linear_plan.h)
//   run      neighbouring output positions of a slab, which a panel takes in one piece
//   segment  kSegment consecutive input positions i
//   unit     neighbouring segments and some blocks of a job: what a thread takes of a shared stage
//
// For every job: pack the panel, then fill [segment, block] pieces of the result. Each
// input position needs one small product over exactly its valid taps times c_out (tile.h), so
// neither padding nor the holes of a stride are ever multiplied. A panel is read with unit stride
// and shared by all blocks; its elements meet conv_bias while they are packed, so that the Linear is
// read once. The pieces are turned in cache (turn.h) so that memory sees runs of kSegment elements.
// Every element of the result is computed whole by one thread, in a fixed order: the bits do not
// depend on the number of threads.
#include <atomic>
#include <utility>
#include <vector>

#include "fuse_conv_linear.h"
#include "fuse_conv_linear_plan.h"
#include "memory.h"
#include "tile.h"
#include "turn.h"

namespace linfuse {
namespace {

constexpr int64_t kSegment = 16;
constexpr int64_t kUnitsPerThread = 8;
constexpr int64_t kAlignment = 64;
// Elements of a row that are packed at a time: a few lines of cache from each of many rows.
constexpr int64_t kPackAtATime = 128;
// Elements of a row that make a task of packing.
constexpr int64_t kPackTask = 4096;

int64_t aligned(int64_t bytes) { return divide_up(bytes, kAlignment) * kAlignment; }

template <typename T>
class Product {
  using A = Accumulate<T>;

 public:
  Product(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
          const Allocate& allocate)
      : params_(params),
        g_(params.geometry),
        parallel_for_(parallel_for),
        tiles_(tile_set<A>(simd_level())),
        turns_(turn_set<T>(simd_level())),
        plan_(make_plan<A>(g_, params.features, tiles_)),
        inner_positions_(positions_inside(&Axis::out)),
        linear_(static_cast<const T*>(params.linear_weight)),
        fused_(static_cast<T*>(params.weight)) {
    constexpr int64_t kSize = sizeof(A);
    const int64_t most_in_block = plan_.most_in_block();
    panel_bytes_ = aligned(plan_.panel_size() * kSize);
    const int64_t panels = plan_.alone ? params.threads : plan_.stage;
    const int64_t weight_bytes =
        aligned(plan_.batch * most_in_block * plan_.kernel_positions * plan_.out_channels * kSize);
    piece_bytes_ = aligned(kSegment * most_in_block * plan_.most_width() * kSize);
    const int64_t bytes = panel_bytes_ * panels + weight_bytes + piece_bytes_ * params.threads;
    panels_ = static_cast<char*>(allocate(bytes));
    advise_huge_pages(panels_, bytes);
    weight_ = reinterpret_cast<A*>(panels_ + panel_bytes_ * panels);
    pieces_ = panels_ + panel_bytes_ * panels + weight_bytes;
    workers_.resize(static_cast<size_t>(params.threads));
    const int64_t positions = plan_.most_reads * plan_.other_positions;
    task_channels_ =
        std::min(plan_.out_channels, divide_up(kPackTask, std::max<int64_t>(1, positions)));
    group_tasks_ = divide_up(plan_.out_channels, task_channels_);
    bias_.assign(static_cast<size_t>(plan_.vectors * plan_.lanes), 0.0);
    if (params.conv_bias != nullptr) {
      const int64_t parts = plan_.alone ? plan_.slabs * plan_.jobs_per_slab()
                                        : plan_.stage * plan_.job_groups * group_tasks_;
      sums_.resize(static_cast<size_t>(parts * plan_.most_width()));
    }
  }

  void run() {
    advise_huge_pages(fused_, params_.features * g_.cols() * static_cast<int64_t>(sizeof(T)));
    if (plan_.batch == plan_.blocks) pack_weight({0, plan_.blocks});
    plan_.alone ? run_alone() : run_together();
    write_bias();
  }

 private:
  // Output positions [source, source + count) of a channel, at [slot, slot + count) of the panel.
  struct Run {
    int64_t source;
    int64_t count;
    int64_t slot;  // -1 for those that no input position reads: nothing but the bias needs them
    bool counts;   // for the bias: another slab may read the same
  };

  struct Part {
    int64_t number = -1;  // of the slab
    Slab slab;
    std::vector<Run> runs;  // of a channel
  };

  struct Job {
    const Part& part;
    Range groups;
    int64_t first;    // f of the panel's first row
    int64_t rows;     // that exist
    int64_t vectors;  // with the zeros that fill the last one
    int64_t width;
    A* panel;
  };

  // What a thread keeps from one piece of work to the next.
  struct Worker {
    Part part;
    PositionTaps taps[kAxes];
    std::vector<int64_t> linear_start;
    std::vector<int64_t> kernel;  // k of each tap
    int64_t first_tap[kSegment + 1];
    A* piece;
  };

  Job make_job(const Part& part, int64_t number, int64_t panel) const {
    const int64_t p = number / plan_.jobs_per_panel();
    const int64_t group = number % plan_.jobs_per_panel() * plan_.job_groups;
    const int64_t vectors = plan_.first_vector(p + 1) - plan_.first_vector(p);
    const int64_t first = plan_.first_vector(p) * plan_.lanes;
    const int64_t width = vectors * plan_.lanes;
    return {part,
            {group, std::min(plan_.groups, group + plan_.job_groups)},
            first,
            std::min(width, plan_.features - first),
            vectors,
            width,
            reinterpret_cast<A*>(panels_ + panel * panel_bytes_)};
  }

  // Calls visit(worker, item) for every item, on as many threads as that much work deserves.
  template <typename Visitor>
  void share(int64_t items, int64_t work, const Visitor& visit) {
    const int64_t workers = std::min<int64_t>(params_.threads, divide_up(items, grain_for(work)));
    std::atomic<int64_t> next{0};
    parallel_for_(workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        Worker& worker = workers_[static_cast<size_t>(n)];
        worker.piece = reinterpret_cast<A*>(pieces_ + n * piece_bytes_);
        for (int64_t item = next++; item < items; item = next++) visit(worker, n, item);
      }
    });
  }

  void run_alone() {
    const int64_t jobs = plan_.slabs * plan_.jobs_per_slab();
    const Range batch = {0, plan_.blocks};
    const int64_t work = divide_up(plan_.features * g_.rows(), jobs) * plan_.kernel_positions;
    share(jobs, work, [&](Worker& worker, int64_t n, int64_t number) {
      const int64_t slab = number / plan_.jobs_per_slab();
      if (worker.part.number != slab) make_part(slab, worker.part);
      const Job job = make_job(worker.part, number % plan_.jobs_per_slab(), n);
      double* sums = sums_of(number, job);
      for (int64_t task = 0; task < tasks(job); ++task) pack_task(job, task, sums);
      multiply(job, batch, blocks_of(job, batch), positions(job.part), worker);
    });
    for (int64_t n = 0; n < jobs && !sums_.empty(); ++n) {
      add_to_bias(make_job(Part{}, n % plan_.jobs_per_slab(), 0), n);
    }
  }

  void run_together() {
    const bool one_batch = plan_.batch == plan_.blocks;
    Part part;
    for (int64_t slab = 0; slab < plan_.slabs; ++slab) {
      make_part(slab, part);
      for (int64_t first = 0; first < plan_.jobs_per_slab(); first += plan_.stage) {
        const Range stage = {first, std::min(plan_.jobs_per_slab(), first + plan_.stage)};
        pack_stage(part, stage);
        for (int64_t block = 0; block < plan_.blocks; block += plan_.batch) {
          const Range batch = {block, std::min(plan_.blocks, block + plan_.batch)};
          if (!one_batch) pack_weight(batch);
          multiply_stage(part, stage, batch);
        }
      }
    }
  }

  // Positions on the axes inside the slab axis.
  int64_t positions_inside(int64_t Axis::* size) const {
    int64_t positions = 1;
    for (int a = plan_.slab_axis + 1; a < kAxes; ++a) positions *= g_.axis[a].*size;
    return positions;
  }

  int64_t panel_positions(const Part& part) const {
    return static_cast<int64_t>(part.slab.reads.size()) * plan_.other_positions;
  }

  // Input positions of a slab. They follow each other: all axes outside it have one.
  Range positions(const Part& part) const {
    const int64_t inside = positions_inside(&Axis::in);
    return {part.slab.range.first * inside, part.slab.range.last * inside};
  }

  Range blocks_of(const Job& job, Range batch) const {
    return {std::max(batch.first, job.groups.first * plan_.blocks_per_group),
            std::min(batch.last, job.groups.last * plan_.blocks_per_group)};
  }

  // Weights of a batch as [block][k][c_out][c_in of the block].
  void pack_weight(Range batch) const {
    const T* weight = static_cast<const T*>(params_.conv_weight);
    const int64_t work = plan_.kernel_positions * plan_.out_channels * tiles_.most_channels;
    for_each(parallel_for_, batch.last - batch.first, work, [&](int64_t n) {
      const int64_t block = batch.first + n;
      const int64_t size = plan_.block_size(block);
      A* packed = weight_of(block, batch);
      for (int64_t c = 0; c < plan_.out_channels; ++c) {
        const int64_t c_out = block / plan_.blocks_per_group * plan_.out_channels + c;
        for (int64_t c_in = 0; c_in < size; ++c_in) {
          const T* kernel = weight + g_.weight_index(c_out, plan_.block_start(block) + c_in);
          for (int64_t k = 0; k < plan_.kernel_positions; ++k) {
            packed[(k * plan_.out_channels + c) * size + c_in] = static_cast<A>(kernel[k]);
          }
        }
      }
    });
  }

  A* weight_of(int64_t block, Range batch) const {
    const int64_t channels = plan_.channels_before(block) - plan_.channels_before(batch.first);
    return weight_ + channels * plan_.kernel_positions * plan_.out_channels;
  }

  // Each slab answers for the bias of its share of the lines on the slab axis, whether its input
  // positions read them or not.
  void make_part(int64_t number, Part& part) const {
    const int64_t start = number * plan_.slab_length;
    const int64_t stop = std::min(g_.axis[plan_.slab_axis].in, start + plan_.slab_length);
    make_slab(g_, plan_.slab_axis, {start, stop}, INT64_MAX, part.slab);
    part.number = number;
    part.runs.clear();
    const int64_t lines = g_.axis[plan_.slab_axis].out;
    const Range share = {number * lines / plan_.slabs, (number + 1) * lines / plan_.slabs};
    const int64_t outer = plan_.other_positions / inner_positions_;
    const auto reads = static_cast<int64_t>(part.slab.reads.size());
    for (int64_t n = 0; n < outer; ++n) {
      int64_t unread = share.first;
      const auto add_unread = [&](int64_t last) {
        for (; unread < std::min(last, share.last); ++unread) {
          add_run(n * lines + unread, -1, true, part.runs);
        }
      };
      for (int64_t slot = 0; slot < reads; ++slot) {
        const int64_t line = part.slab.reads[static_cast<size_t>(slot)];
        const bool counts = line >= share.first && line < share.last;
        if (counts) {
          add_unread(line);
          unread = line + 1;
        }
        add_run(n * lines + line, n * reads + slot, counts, part.runs);
      }
      add_unread(share.last);
    }
  }

  void add_run(int64_t line, int64_t slot, bool counts, std::vector<Run>& runs) const {
    const Run run = {line * inner_positions_, inner_positions_,
                     slot < 0 ? -1 : slot * inner_positions_, counts};
    if (!runs.empty()) {
      Run& last = runs.back();
      if (last.source + last.count == run.source && last.counts == counts &&
          run.slot == (last.slot < 0 ? -1 : last.slot + last.count)) {
        last.count += run.count;
        return;
      }
    }
    runs.push_back(run);
  }

  // Tasks of packing a job.
  int64_t tasks(const Job& job) const {
    return (job.groups.last - job.groups.first) * group_tasks_;
  }

  // Where a job or a task adds up what conv_bias gives to each f; null without one.
  double* sums_of(int64_t number, const Job& job) {
    if (sums_.empty()) return nullptr;
    double* sums = sums_.data() + number * plan_.most_width();
    std::fill(sums, sums + job.width, 0.0);
    return sums;
  }

  void add_to_bias(const Job& job, int64_t number) {
    const double* sums = sums_.data() + number * plan_.most_width();
    double* bias = bias_.data() + job.first;
    for (int64_t f = 0; f < job.width; ++f) bias[f] += sums[f];
  }

  void pack_stage(const Part& part, Range stage) {
    const int64_t most_tasks = plan_.job_groups * group_tasks_;
    const int64_t items = (stage.last - stage.first) * most_tasks;
    const int64_t work = task_channels_ * panel_positions(part) * plan_.most_width();
    for_each(parallel_for_, items, work, [&](int64_t n) {
      const Job job = make_job(part, stage.first + n / most_tasks, n / most_tasks);
      const int64_t task = n % most_tasks;
      if (task < tasks(job)) pack_task(job, task, sums_of(n, job));
    });
    for (int64_t n = 0; n < items && !sums_.empty(); ++n) {
      const Job job = make_job(part, stage.first + n / most_tasks, n / most_tasks);
      if (n % most_tasks < tasks(job)) add_to_bias(job, n);
    }
  }

  // Some output channels of a group.
  void pack_task(const Job& job, int64_t task, double* sums) const {
    const int64_t group = job.groups.first + task / group_tasks_;
    const int64_t start = task % group_tasks_ * task_channels_;
    const int64_t stop = std::min(plan_.out_channels, start + task_channels_);
    const std::vector<Run>& runs = job.part.runs;
    // Where a run is the whole channel, the next channel follows it without a gap.
    if (runs.size() == 1 && runs[0].count == g_.out_positions()) {
      pack_run(job, group, {start, stop}, runs[0], sums);
      return;
    }
    for (int64_t c = start; c < stop; ++c) {
      for (const Run& run : runs) pack_run(job, group, {c, c + 1}, run, sums);
    }
  }

  void pack_run(const Job& job, int64_t group, Range channels, const Run& run,
                double* sums) const {
    const T* conv_bias = static_cast<const T*>(params_.conv_bias);
    const bool counts = sums != nullptr && run.counts;
    if (run.slot < 0 && !counts) return;
    const int64_t step = plan_.out_channels * job.width;
    const int64_t c_out = group * plan_.out_channels;
    const int64_t start =
        ((group - job.groups.first) * panel_positions(job.part) + run.slot) * step;
    const int64_t all = (channels.last - channels.first) * run.count;
    const T* from = linear_ + job.first * params_.linear_stride[0] +
                    ((c_out + channels.first) * g_.out_positions() + run.source) *
                        params_.linear_stride[1];
    int64_t place[kPackAtATime];
    A scale[kPackAtATime];
    int64_t c = channels.first;
    int64_t position = 0;
    for (int64_t first = 0; first < all; first += kPackAtATime) {
      const int64_t count = std::min(kPackAtATime, all - first);
      for (int64_t n = 0; n < count; ++n) {
        place[n] = start + position * step + c * job.width;
        if (counts) scale[n] = static_cast<A>(conv_bias[c_out + c]);
        if (++position == run.count) {
          position = 0;
          ++c;
        }
      }
      PackTask<T> task = {};
      task.from = from + first * params_.linear_stride[1];
      task.stride = params_.linear_stride[0];
      task.rows = job.rows;
      task.count = count;
      task.vectors = static_cast<int>(job.vectors);
      task.place = run.slot < 0 ? nullptr : place;
      task.to = job.panel;
      task.sums = counts ? sums : nullptr;
      task.scale = scale;
      if (params_.linear_stride[1] == 1) {
        turns_.pack(task);
      } else {
        pack_strided(task);
      }
    }
  }

  // For a Linear whose neighbours in a row do not lie side by side: copies a few rows at a time to
  // where they do.
  void pack_strided(PackTask<T> task) const {
    T rows[TileSet<A>::kMostLanes * kPackAtATime];
    const int64_t all_rows = task.rows;
    const int64_t stride = task.stride;
    const T* from = task.from;
    task.from = rows;
    task.stride = kPackAtATime;
    const int vectors = std::exchange(task.vectors, 1);
    for (int v = 0; v < vectors; ++v) {
      task.rows = std::min(plan_.lanes, all_rows - v * plan_.lanes);
      for (int64_t n = 0; n < task.count; ++n) {
        const T* column = from + n * params_.linear_stride[1];
        for (int64_t f = 0; f < task.rows; ++f) rows[f * kPackAtATime + n] = column[f * stride];
      }
      turns_.pack(task);
      from += plan_.lanes * stride;
      task.to += plan_.lanes;
      if (task.sums != nullptr) task.sums += plan_.lanes;
    }
  }

  void write_bias() const {
    const T* linear_bias = static_cast<const T*>(params_.linear_bias);
    T* bias = static_cast<T*>(params_.bias);
    for (int64_t f = 0; f < params_.features; ++f) {
      double total = bias_[static_cast<size_t>(f)];
      if (linear_bias != nullptr) total += static_cast<double>(static_cast<A>(linear_bias[f]));
      bias[f] = static_cast<T>(static_cast<A>(total));
    }
  }

  void multiply_stage(const Part& part, Range stage, Range batch) {
    const Range all = positions(part);
    const int64_t jobs = stage.last - stage.first;
    const int64_t wanted = divide_up(kUnitsPerThread * params_.threads, jobs);
    const int64_t segments = divide_up(all.last - all.first, kSegment);
    // Neighbouring segments share lines of memory: better they have one writer.
    const int64_t strips = std::min(segments, wanted);
    const int64_t most_blocks =
        std::min(plan_.job_groups * plan_.blocks_per_group, batch.last - batch.first);
    const int64_t splits = std::min(most_blocks, divide_up(wanted, strips));
    const int64_t work = divide_up(segments, strips) * kSegment * plan_.out_channels *
                         plan_.most_width() * divide_up(most_blocks, splits) *
                         tiles_.most_channels;
    share(jobs * strips * splits, work, [&](Worker& worker, int64_t, int64_t unit) {
      const int64_t split = unit % splits;
      const int64_t strip = unit / splits % strips;
      const int64_t panel = unit / splits / strips;
      const Job job = make_job(part, stage.first + panel, panel);
      const Range some = {all.first + strip * segments / strips * kSegment,
                          std::min(all.last, all.first + (strip + 1) * segments / strips * kSegment)};
      const Range blocks = blocks_of(job, batch);
      const int64_t count = blocks.last - blocks.first;
      if (count <= 0) return;
      multiply(job, batch,
               {blocks.first + split * count / splits, blocks.first + (split + 1) * count / splits},
               some, worker);
    });
  }

  void multiply(const Job& job, Range batch, Range blocks, Range positions, Worker& worker) const {
    for (int64_t first = positions.first; first < positions.last; first += kSegment) {
      const Range segment = {first, std::min(positions.last, first + kSegment)};
      list_taps(job, segment, worker);
      for (int64_t block = blocks.first; block < blocks.last; ++block) {
        multiply_piece(job, batch, block, segment, worker);
      }
    }
  }

  void multiply_piece(const Job& job, Range batch, int64_t block, Range segment,
                      Worker& worker) const {
    const int64_t channels = plan_.block_size(block);
    const int64_t group = block / plan_.blocks_per_group - job.groups.first;
    const Tile<A> tile = tiles_.tile[job.vectors][channels];
    TileTask<A> task = {};
    task.linear = job.panel + group * panel_positions(job.part) * plan_.out_channels * job.width;
    task.weight = weight_of(block, batch);
    task.weight_step = plan_.out_channels * channels;
    task.channels = plan_.out_channels;
    for (int64_t s = 0; s < segment.last - segment.first; ++s) {
      task.linear_start = worker.linear_start.data() + worker.first_tap[s];
      task.kernel = worker.kernel.data() + worker.first_tap[s];
      task.taps = worker.first_tap[s + 1] - worker.first_tap[s];
      tile(task, worker.piece + s * channels * job.width);
    }
    for (int64_t n = 0; n < channels; ++n) {
      UnpackTask<T> unpack = {};
      unpack.from = worker.piece + n * job.width;
      unpack.step = channels * job.width;
      unpack.rows = job.rows;
      unpack.count = segment.last - segment.first;
      unpack.to = fused_ + job.first * g_.cols() +
                  (plan_.channels_before(block) + n) * g_.in_positions() + segment.first;
      unpack.stride = g_.cols();
      turns_.unpack(unpack);
    }
  }

  // Where the operands of every tap of a segment begin: in the panel, and among the kernel
  // elements.
  void list_taps(const Job& job, Range segment, Worker& worker) const {
    const Slab& slab = job.part.slab;
    const int64_t step = plan_.out_channels * job.width;
    const auto reads = static_cast<int64_t>(slab.reads.size());
    worker.linear_start.clear();
    worker.kernel.clear();
    Position before = {{-1, -1, -1}};
    for (int64_t position = segment.first; position < segment.last; ++position) {
      const Position i = in_position(g_, position);
      for (int a = 0; a < kAxes; ++a) {
        if (i.at[a] == before.at[a]) continue;
        worker.taps[a].list_by_column(g_, a, i.at[a]);
        if (a != plan_.slab_axis) continue;
        for (TapGroup& group : worker.taps[a].groups) group.position = slab.slot(group.position);
      }
      before = i;
      worker.first_tap[position - segment.first] = static_cast<int64_t>(worker.linear_start.size());
      // Sizes of the panel's axes: those of the output, and the slab's reads on its axis.
      const int64_t size1 = plan_.slab_axis == 1 ? reads : g_.axis[1].out;
      const int64_t size2 = plan_.slab_axis == 2 ? reads : g_.axis[2].out;
      for_each_tap(worker.taps[0], [&](int64_t o0, int64_t k0) {
        for_each_tap(worker.taps[1], [&](int64_t o1, int64_t k1) {
          const int64_t o_line = (o0 * size1 + o1) * size2;
          const int64_t k_line = (k0 * g_.axis[1].kernel + k1) * g_.axis[2].kernel;
          for_each_tap(worker.taps[2], [&](int64_t o2, int64_t k2) {
            worker.linear_start.push_back((o_line + o2) * step);
            worker.kernel.push_back(k_line + k2);
          });
        });
      });
    }
    worker.first_tap[segment.last - segment.first] =
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

  const FuseConvLinearParams& params_;
  const Geometry& g_;
  const ParallelFor& parallel_for_;
  const TileSet<A>& tiles_;
  const TurnSet<T>& turns_;
  const Plan plan_;
  const int64_t inner_positions_;  // output positions on the axes inside the slab axis
  const T* linear_;
  T* fused_;
  char* panels_ = nullptr;
  int64_t panel_bytes_ = 0;
  A* weight_ = nullptr;
  char* pieces_ = nullptr;  // per thread: [segment][c_in of the block][f]
  int64_t piece_bytes_ = 0;
  int64_t task_channels_ = 0;  // output channels that make a task of packing
  int64_t group_tasks_ = 0;
  std::vector<double> sums_;  // per job, or per task of packing: what conv_bias adds to each f
  std::vector<double> bias_;
  std::vector<Worker> workers_;
};

}  // namespace

void launch_fuse_conv_linear_cpu(const FuseConvLinearParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate) {
  if (params.features == 0) return;
  dispatch(params.dtype,
           [&](auto zero) { Product<decltype(zero)>(params, parallel_for, allocate).run(); });
}

}  // namespace linfuse
