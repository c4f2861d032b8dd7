// fused[f, (c_in, i)] += sum over c_out of linear[f, (c_out, o)] * weight[c_out, c_in, k]
//                        for every tap (o, i, k)
//
// For layers with few input channels: a tile of the sums of one input position would leave most
// registers empty, so a tile holds the sums of one output position o instead, for neighbouring
// (k, c_in), and is added to the input positions that its taps read.
//
//   block    up to TileSet::most_channels neighbouring (k, c_in)
//   job      a panel of rows f, a slab of input positions and a group
//   chunk    neighbouring output positions and channels, packed as [o][c_out][f]
//
// A thread does a whole job: for every chunk that the slab reads, pack it, and for every o and
// block compute the tile and add it to [c_in][i][f], which stays in its cache and is turned into
// rows at the end. The result's bits do not depend on the number of threads, as the jobs do not.
#include <cstring>

#include "fuse_conv_linear_by_output.h"
#include "fuse_conv_linear_cost.h"
#include "fuse_conv_linear_engines.h"

namespace linfuse {
namespace {

// What it costs beside its products (fuse_conv_linear_cost.h).
struct Weights {
  double load;      // a vector that a tile reads
  double packed;    // a vector of rows
  double unpacked;  // likewise
  double moved;     // a vector of rows that are innermost in memory already
  double tile;
  double added;     // a vector of a tile
  double listed;    // where a kernel element is added
  double repacked;  // a weight
  double launch;
};
constexpr Measured<Weights> kWeights = {
    .narrow = {.load = 0,
               .packed = 37,
               .unpacked = 28,
               .moved = 10,
               .tile = 95,
               .added = 8,
               .listed = 32,
               .repacked = 0,
               .launch = 72e4},
    .wide = {.load = 4.4,
             .packed = 46,
             .unpacked = 44,
             .moved = 20,
             .tile = 100,
             .added = 4.4,
             .listed = 4.3,
             .repacked = 10,
             .launch = 55e4},
};

constexpr int64_t kResultBytes = int64_t{2} << 20;
// Of a slab of one position.
constexpr int64_t kMostResultBytes = int64_t{16} << 20;
constexpr int64_t kChunkBytes = int64_t{1} << 20;
constexpr int64_t kWantedJobs = 8;

struct Plan {
  int64_t in_channels;   // of a group
  int64_t out_channels;  // of a group
  int64_t taps;          // (k, c_in) of a group
  int64_t blocks;        // of a group
  int64_t chunk_positions;
  int64_t chunk_channels;
  Panels panels;
  Slabs slabs;

  int64_t most_in_block() const { return divide_up(taps, blocks); }
  // Elements of what a job makes.
  int64_t result_size(const Geometry& g) const {
    return slabs.length * inner_in(g, slabs) * in_channels * panels.most_width();
  }
};

template <typename A>
Plan make_plan(const Geometry& g, int64_t features, const TileSet<A>& tiles) {
  constexpr int64_t kSize = sizeof(A);
  Plan plan = {};
  plan.in_channels = g.in_channels_per_group();
  plan.out_channels = g.out_channels_per_group();
  plan.taps = plan.in_channels * g.kernel_positions();
  plan.blocks = divide_up(plan.taps, tiles.most_channels);
  plan.panels = Panels(features, tiles.lanes, tiles.most_vectors(plan.most_in_block()));
  plan.slabs = one_slab(g);
  const int64_t line_bytes =
      inner_in(g, plan.slabs) * plan.in_channels * plan.panels.most_width() * kSize;
  const int64_t lines = std::max<int64_t>(1, kResultBytes / line_bytes);
  const int64_t count = std::max(divide_up(g.axis[plan.slabs.axis].in, lines),
                                 divide_up(kWantedJobs, plan.panels.count * g.groups));
  cut_slabs(g, count, INT64_MAX, 1, plan.slabs);
  // Few make for long runs of memory, which matter where there is little else to do; many for few
  // additions, which matter where there are many taps.
  plan.chunk_channels =
      std::min(plan.out_channels, channels_of_chunk(plan.out_channels, plan.taps));
  const int64_t position_bytes = plan.chunk_channels * plan.panels.most_width() * kSize;
  plan.chunk_positions = std::min(g.out_positions(), kChunkBytes / position_bytes);
  return plan;
}

template <typename T>
class ByOutput {
  using A = Accumulate<T>;

 public:
  ByOutput(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
           const Allocate& allocate)
      : work_(params, parallel_for),
        g_(work_.g),
        plan_(make_plan<A>(g_, params.features, work_.tiles)) {
    constexpr int64_t kSize = sizeof(A);
    const int64_t width = plan_.panels.most_width();
    const int64_t result_bytes = aligned(plan_.result_size(g_) * kSize);
    const int64_t chunk_bytes =
        aligned(plan_.chunk_positions * plan_.chunk_channels * width * kSize);
    const int64_t own_bytes =
        result_bytes + chunk_bytes + aligned(plan_.most_in_block() * width * kSize);
    const int64_t weight_bytes = aligned(plan_.taps * plan_.out_channels * g_.groups * kSize);
    threads_ = std::clamp<int64_t>(kMostScratchBytes / own_bytes, 1, params.threads);
    const int64_t bytes = weight_bytes + threads_ * own_bytes;
    weight_ = reinterpret_cast<A*>(allocate(bytes));
    advise_huge_pages(weight_, bytes);
    workers_.resize(static_cast<size_t>(threads_));
    char* own = reinterpret_cast<char*>(weight_) + weight_bytes;
    for (Worker& worker : workers_) {
      worker.result = reinterpret_cast<A*>(own);
      worker.chunk = reinterpret_cast<A*>(own + result_bytes);
      worker.tile = reinterpret_cast<A*>(own + result_bytes + chunk_bytes);
      worker.in_of_kernel.resize(static_cast<size_t>(g_.kernel_positions()));
      worker.target.resize(static_cast<size_t>(plan_.taps));
      own += own_bytes;
    }
    work_.make_parts(jobs(), width);
  }

  void run() {
    pack_taps(work_, plan_.blocks, weight_);
    const int64_t cost = plan_.taps * plan_.out_channels * g_.out_positions() *
                         plan_.panels.most_width() / plan_.slabs.count;
    work_.share(jobs(), cost, threads_, [&](int64_t thread, int64_t number) {
      do_job(workers_[static_cast<size_t>(thread)], number);
    });
    for (int64_t n = 0; n < jobs(); ++n) work_.add_part(plan_.panels.rows(panel_of(n)), n);
    work_.write_bias();
  }

 private:
  struct Worker {
    Slab slab;
    A* result;  // [c_in][i of the slab][f]
    A* chunk;   // [o][c_out][f]
    A* tile;
    // Of the output position at hand, on each axis and over all of them: the input position that
    // each kernel element reads; -1 for none.
    std::vector<int64_t> in_of_kernel_axis[kAxes];
    std::vector<int64_t> in_of_kernel;
    std::vector<A*> target;  // of each (k, c_in)
  };

  // Jobs are counted as [slab][panel][group], so that neighbours read neighbouring memory.
  int64_t jobs() const { return plan_.slabs.count * plan_.panels.count * g_.groups; }
  int64_t panel_of(int64_t job) const { return job / g_.groups % plan_.panels.count; }

  void do_job(Worker& worker, int64_t number) {
    const int64_t group = number % g_.groups;
    const Rows rows = plan_.panels.rows(panel_of(number));
    const int64_t slab_number = number / g_.groups / plan_.panels.count;
    if (worker.slab.number != slab_number) make_slab(g_, plan_.slabs, slab_number, worker.slab);
    const Range positions = positions_of(g_, plan_.slabs, worker.slab);
    const int64_t count = positions.last - positions.first;
    std::memset(static_cast<void*>(worker.result), 0,
                static_cast<size_t>(plan_.in_channels * count * rows.width) * sizeof(A));
    double* sums = work_.start_part(number);
    for (const Run& run : worker.slab.runs) {
      double* run_sums = run.counts ? sums : nullptr;
      if (run.slot < 0 && run_sums == nullptr) continue;
      for (int64_t first = 0; first < run.count; first += plan_.chunk_positions) {
        const int64_t some = std::min(plan_.chunk_positions, run.count - first);
        for (int64_t c = 0; c < plan_.out_channels; c += plan_.chunk_channels) {
          const Range channels = {c, std::min(plan_.out_channels, c + plan_.chunk_channels)};
          const int64_t step = (channels.last - channels.first) * rows.width;
          const int64_t c_out = group * plan_.out_channels;
          work_.pack(rows, {c_out + channels.first, c_out + channels.last}, run.source + first,
                     some, run.slot < 0 ? nullptr : worker.chunk, step, run_sums);
          for (int64_t n = 0; n < some && run.slot >= 0; ++n) {
            list_inputs(run.source + first + n, worker);
            add_position(worker, group, channels, rows, positions, worker.chunk + n * step);
          }
        }
      }
    }
    for (int64_t c = 0; c < plan_.in_channels; ++c) {
      const int64_t channel = group * plan_.in_channels + c;
      work_.unpack_rows(worker.result + c * count * rows.width, rows.width, rows.first, rows.count,
                        channel, positions.first, count);
    }
  }

  void list_inputs(int64_t source, Worker& worker) const {
    const Position o = out_position(g_, source);
    for (int a = 0; a < kAxes; ++a) {
      std::vector<int64_t>& inputs = worker.in_of_kernel_axis[a];
      inputs.resize(static_cast<size_t>(g_.axis[a].kernel));
      for (int64_t k = 0; k < g_.axis[a].kernel; ++k) {
        inputs[static_cast<size_t>(k)] = g_.fine_position(a, o.at[a], k);
      }
    }
    int64_t* to = worker.in_of_kernel.data();
    for (int64_t i0 : worker.in_of_kernel_axis[0]) {
      for (int64_t i1 : worker.in_of_kernel_axis[1]) {
        const int64_t line = i0 < 0 || i1 < 0 ? -1 : (i0 * g_.axis[1].in + i1) * g_.axis[2].in;
        for (int64_t i2 : worker.in_of_kernel_axis[2]) *to++ = line < 0 || i2 < 0 ? -1 : line + i2;
      }
    }
  }

  // Adds what some channels of one output position give to the input positions of the slab.
  void add_position(Worker& worker, int64_t group, Range channels, const Rows& rows,
                    Range positions, const A* linear) const {
    const int64_t count = positions.last - positions.first;
    A** target = worker.target.data();
    for (int64_t i : worker.in_of_kernel) {
      const bool inside = i >= positions.first && i < positions.last;
      for (int64_t c = 0; c < plan_.in_channels; ++c) {
        *target++ =
            inside ? worker.result + (c * count + i - positions.first) * rows.width : nullptr;
      }
    }
    constexpr int64_t kZero = 0;
    TileTask<A> task = {};
    task.linear = linear;
    task.linear_start = &kZero;
    task.linear_line = rows.width;
    task.kernel = &kZero;
    task.taps = 1;
    task.channels = channels.last - channels.first;
    const A* weight = weight_ + group * plan_.taps * plan_.out_channels;
    for (int64_t block = 0; block < plan_.blocks; ++block) {
      const Range taps = taps_of_block(plan_.taps, plan_.blocks, block);
      const int64_t size = taps.last - taps.first;
      A* const* targets = worker.target.data() + taps.first;
      if (std::any_of(targets, targets + size, [](const A* to) { return to != nullptr; })) {
        task.weight = weight + channels.first * size;
        task.weight_line = size;
        work_.tiles.tile[rows.vectors][size](task, worker.tile);
        work_.tiles.add_lines(worker.tile, rows.width, size, targets);
      }
      weight += size * plan_.out_channels;
    }
  }

  Work<T> work_;
  const Geometry& g_;
  const Plan plan_;
  A* weight_ = nullptr;
  int64_t threads_ = 1;
  std::vector<Worker> workers_;
};

template <typename A>
double cost(const FuseConvLinearParams& params) {
  const Geometry& g = params.geometry;
  const TileSet<A>& tiles = simd_kernels(simd_level());
  const Plan plan = make_plan<A>(g, params.features, tiles);
  constexpr int64_t kSize = sizeof(A);
  if (plan.taps * g.out_channels * kSize > kMostWeightBytes ||
      plan.result_size(g) * kSize > kMostResultBytes) {
    return kNever;
  }
  const Tiling tiling(tiles, plan.panels.vectors, plan.taps);
  const auto vectors = static_cast<double>(plan.panels.vectors);
  const auto taps = static_cast<double>(plan.taps) * vectors;
  const auto chunks = static_cast<double>(divide_up(plan.out_channels, plan.chunk_channels));
  const Weights& weights = kWeights.now();
  const bool turns = turns_rows(params);
  const double product = tiling.product_with(weights.load);
  const double position =
      taps * (static_cast<double>(plan.out_channels) * product + weights.added * chunks) +
      chunks * (weights.tile * tiling.tiles +
                weights.listed * static_cast<double>(g.kernel_positions()));
  return weights.launch + weights.repacked * static_cast<double>(weights_of(g)) +
         static_cast<double>(g.out_positions() * g.groups) * position +
         vectors * ((turns ? weights.packed : weights.moved) * static_cast<double>(g.rows()) +
                    (turns ? weights.unpacked : weights.moved) * static_cast<double>(g.cols()));
}

}  // namespace

double cost_by_output(const FuseConvLinearParams& params) {
  const Geometry& g = params.geometry;
  if (g.transposed) return kNever;
  return dispatch(params.dtype,
                  [&](auto zero) { return cost<Accumulate<decltype(zero)>>(params); });
}

void fuse_conv_linear_by_output(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
                                const Allocate& allocate) {
  dispatch(params.dtype,
           [&](auto zero) { ByOutput<decltype(zero)>(params, parallel_for, allocate).run(); });
}

}  // namespace linfuse
