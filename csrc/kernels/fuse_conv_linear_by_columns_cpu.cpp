// columns[(k, c_in), o] = sum over c_out of weight[c_out, c_in, k] * linear[f, (c_out, o)]
// fused[f, (c_in, i)]  += columns[(k, c_in), o]  for every tap (o, i, k)
//
// For few (k, c_in), where turning the Linear, or framing its images, would cost as much as its
// products: a row of it is read as it lies, and neighbouring output positions o fill a vector.
// Products of taps that fall on padding are made and not added.
//
//   column   what one (k, c_in) gives, at every o
//   segment  vectors of neighbouring o
//   block    up to TileSet::most_channels neighbouring (k, c_in)
//   chunk    output channels, few enough for all segments and blocks to find them in a core's own
//            cache: where the Linear has them, or copied
//
// A thread does one row f and group at a time: the bits do not depend on the number of threads.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "fuse_conv_linear_by_columns.h"
#include "fuse_conv_linear_cost.h"
#include "fuse_conv_linear_engines.h"
#include "widen.h"

namespace linfuse {
namespace {

// (k, c_in) of a group.
constexpr int64_t kMostTaps = 512;
// Images, that threads share. Few of them must be small, as there may be more threads.
constexpr int64_t kLeastImages = 4;
constexpr int64_t kSmallImage = int64_t{1} << 24;  // multiply-adds
// Of the columns, of the images that they are added to, and of a chunk.
constexpr int64_t kMostBytes = int64_t{1} << 20;
constexpr int64_t kChunkBytes = int64_t{128} << 10;

// What it costs beside its products (fuse_conv_linear_cost.h).
struct Weights {
  double load;      // a vector that a tile reads
  double added;     // a vector of a column that is added
  double split;     // an element of one, where a stride lies between
  double read;      // a vector that is read in place
  double copied;    // one that is not
  double written;   // a vector
  double line;      // of a column
  double repacked;  // a weight
  double launch;
};
constexpr Measured<Weights> kWeights = {
    .narrow = {.load = 0,
               .added = 8,
               .split = 3,
               .read = 11,
               .copied = 22,
               .written = 18,
               .line = 5,
               .repacked = 0,
               .launch = 48e4},
    .wide = {.load = 2.3,
             .added = 7.6,
             .split = 2.3,
             .read = 18,
             .copied = 28,
             .written = 26,
             .line = 4.9,
             .repacked = 17,
             .launch = 36e4},
};

template <typename A>
struct ColumnsPlan {
  int64_t taps;  // (k, c_in) of a group
  int64_t blocks;
  int64_t vectors;  // of a segment
  int64_t width;
  int64_t segments;
  int64_t pitch;  // from column to column
  int64_t chunk_channels;
  int64_t chunk_pitch;  // from channel to channel

  ColumnsPlan(const Geometry& g, const TileSet<A>& tiles)
      : taps(g.in_channels_per_group() * g.kernel_positions()),
        blocks(divide_up(taps, tiles.most_channels)) {
    const int64_t all = divide_up(g.out_positions(), tiles.lanes);
    segments = divide_up(all, tiles.most_vectors(divide_up(taps, blocks)));
    vectors = divide_up(all, segments);
    width = vectors * tiles.lanes;
    pitch = segments * width;
    constexpr int64_t kLine = 64 / sizeof(A);
    // An odd number of lines of memory, for the channels to lie in different sets of a cache.
    chunk_pitch = (divide_up(pitch, kLine) | 1) * kLine;
    const int64_t channels = g.out_channels_per_group();
    chunk_channels = std::clamp(kChunkBytes / (chunk_pitch * static_cast<int64_t>(sizeof(A))),
                                std::min(channels, channels_of_chunk(channels, 0)), channels);
  }
};

template <typename T>
class ByColumns {
  using A = Accumulate<T>;

 public:
  ByColumns(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
            const Allocate& allocate)
      : work_(params, parallel_for),
        g_(work_.g),
        out_channels_(g_.out_channels_per_group()),
        in_channels_(g_.in_channels_per_group()),
        plan_(g_, work_.tiles) {
    constexpr int64_t kSize = sizeof(A);
    const int64_t weight_bytes = aligned(g_.groups * plan_.taps * out_channels_ * kSize);
    const int64_t columns = aligned(plan_.taps * plan_.pitch * kSize);
    const int64_t result = aligned(in_channels_ * g_.in_positions() * kSize);
    const int64_t chunk = aligned(plan_.chunk_channels * plan_.chunk_pitch * kSize);
    const int64_t tile = aligned(plan_.taps * plan_.width * kSize);
    const int64_t own_bytes = columns + result + chunk + tile;
    threads_ = std::clamp<int64_t>(kMostScratchBytes / own_bytes, 1, params.threads);
    weight_ = reinterpret_cast<A*>(allocate(weight_bytes + threads_ * own_bytes));
    if (const T* conv_bias = static_cast<const T*>(params.conv_bias)) {
      bias_ = widen<A>(conv_bias, g_.out_channels, parallel_for, allocate);
    }
    workers_.resize(static_cast<size_t>(threads_));
    char* own = reinterpret_cast<char*>(weight_) + weight_bytes;
    for (Worker& worker : workers_) {
      worker.columns = reinterpret_cast<A*>(own);
      worker.result = reinterpret_cast<A*>(own + columns);
      worker.chunk = reinterpret_cast<A*>(own + columns + result);
      worker.tile = reinterpret_cast<A*>(own + columns + result + chunk);
      worker.target.resize(static_cast<size_t>(plan_.taps));
      own += own_bytes;
    }
    list_runs();
    work_.make_parts(images(), 1);
  }

  void run() {
    pack_taps(work_, plan_.blocks, weight_);
    const int64_t cost = plan_.taps * out_channels_ * g_.out_positions();
    work_.share(images(), cost, threads_, [&](int64_t thread, int64_t image) {
      make_image(workers_[static_cast<size_t>(thread)], image);
    });
    for (int64_t n = 0; n < images(); ++n) work_.add_part({n / g_.groups, 1, 1, 1}, n);
    work_.write_bias();
  }

 private:
  struct Worker {
    A* columns;  // [k][c_in][o]
    A* result;   // [c_in][i]
    A* chunk;    // [c_out][o]
    A* tile;
    std::vector<A*> target;  // of each (k, c_in)
  };

  // Output channels of a row: copied, or where the Linear has them.
  struct Chunk {
    const A* from;
    int64_t pitch;
  };

  // Neighbours on the innermost axis, whose taps of one k read input positions a stride apart.
  struct Run {
    int64_t k;
    int64_t o;
    int64_t i;
    int64_t count;
  };

  int64_t images() const { return work_.params.features * g_.groups; }

  void list_runs() {
    runs_.reserve(static_cast<size_t>(g_.kernel_positions() * g_.axis[0].out * g_.axis[1].out));
    for (int64_t k = 0; k < g_.kernel_positions(); ++k) {
      const int64_t k2 = k % g_.axis[2].kernel;
      const int64_t k1 = k / g_.axis[2].kernel % g_.axis[1].kernel;
      const int64_t k0 = k / g_.axis[2].kernel / g_.axis[1].kernel;
      for (int64_t o0 = 0; o0 < g_.axis[0].out; ++o0) {
        for (int64_t o1 = 0; o1 < g_.axis[1].out; ++o1) {
          const int64_t i0 = g_.fine_position(0, o0, k0);
          const int64_t i1 = g_.fine_position(1, o1, k1);
          if (i0 < 0 || i1 < 0) continue;
          list_line(k, k2, (o0 * g_.axis[1].out + o1) * g_.axis[2].out,
                    (i0 * g_.axis[1].in + i1) * g_.axis[2].in);
        }
      }
    }
  }

  void list_line(int64_t k, int64_t k2, int64_t o_line, int64_t i_line) {
    bool goes_on = false;
    for (int64_t o2 = 0; o2 < g_.axis[2].out; ++o2) {
      const int64_t i2 = g_.fine_position(2, o2, k2);
      goes_on = goes_on && i2 >= 0 &&
                i_line + i2 - runs_.back().i == runs_.back().count * g_.axis[2].stride;
      if (goes_on) {
        ++runs_.back().count;
      } else if (i2 >= 0) {
        runs_.push_back({k, o_line + o2, i_line + i2, 1});
        goes_on = true;
      }
    }
  }

  void make_image(Worker& worker, int64_t image) {
    const int64_t f = image / g_.groups;
    const int64_t group = image % g_.groups;
    std::memset(static_cast<void*>(worker.columns), 0,
                static_cast<size_t>(plan_.taps * plan_.pitch) * sizeof(A));
    double* sum = work_.start_part(image);
    const Range all = {group * out_channels_, (group + 1) * out_channels_};
    for (int64_t c = all.first; c < all.last; c += plan_.chunk_channels) {
      const Range channels = {c, std::min(all.last, c + plan_.chunk_channels)};
      const Chunk chunk = read_chunk(worker, f, channels);
      for (int64_t first = 0; first < plan_.pitch; first += plan_.width) {
        add_segment(worker, group, channels, chunk, first);
        if (sum != nullptr) *sum += bias_of_segment(worker, channels, chunk, first);
      }
    }
    add_columns(worker);
    write(worker.result, f, group);
  }

  TileTask<A> task_of(Range channels, const Chunk& chunk, int64_t first) const {
    static constexpr int64_t kZero = 0;
    TileTask<A> task = {};
    task.linear = chunk.from + first;
    task.linear_start = &kZero;
    task.linear_line = chunk.pitch;
    task.kernel = &kZero;
    task.taps = 1;
    task.channels = channels.last - channels.first;
    return task;
  }

  // Adds what some channels give to a segment of all columns.
  void add_segment(Worker& worker, int64_t group, Range channels, const Chunk& chunk,
                   int64_t first) const {
    TileTask<A> task = task_of(channels, chunk, first);
    for (int64_t n = 0; n < plan_.taps; ++n) {
      worker.target[static_cast<size_t>(n)] = worker.columns + n * plan_.pitch + first;
    }
    const A* weight = weight_ + group * plan_.taps * out_channels_;
    for (int64_t block = 0; block < plan_.blocks; ++block) {
      const Range taps = taps_of_block(plan_.taps, plan_.blocks, block);
      const int64_t size = taps.last - taps.first;
      task.weight =
          weight + taps.first * out_channels_ + (channels.first - group * out_channels_) * size;
      task.weight_line = size;
      work_.tiles.tile[plan_.vectors][size](task, worker.tile);
      work_.tiles.add_lines(worker.tile, plan_.width, size, worker.target.data() + taps.first);
    }
  }

  double bias_of_segment(const Worker& worker, Range channels, const Chunk& chunk,
                         int64_t first) const {
    TileTask<A> task = task_of(channels, chunk, first);
    task.weight = bias_ + channels.first;
    task.weight_line = 1;
    work_.tiles.tile[plan_.vectors][1](task, worker.tile);
    // What lies beyond the image is none of its own.
    const int64_t count = std::min(plan_.width, g_.out_positions() - first);
    double total = 0;
    for (int64_t n = 0; n < count; ++n) total += static_cast<double>(worker.tile[n]);
    return total;
  }

  // Some channels of a row, in order: hardware follows that, but not the tiles, which read a line
  // or two of each channel.
  Chunk read_chunk(const Worker& worker, int64_t f, Range channels) const {
    const T* from = work_.linear(f, channels.first, 0);
    const int64_t count = channels.last - channels.first;
    const int64_t step = work_.params.linear_stride.position;
    if constexpr (std::is_same_v<T, A>) {
      const int64_t pitch = work_.params.linear_stride.channel;
      // A segment may reach beyond the image's end, but not beyond the Linear's.
      const T* const last = from + (count - 1) * pitch;
      if (step == 1 && last + plan_.pitch <= end_of_linear()) {
        constexpr int64_t kLine = 64 / sizeof(T);
        for (int64_t c = 0; c < count; ++c) {
          for (int64_t n = 0; n < g_.out_positions(); n += kLine) {
            (void)*static_cast<const volatile T*>(from + c * pitch + n);
          }
        }
        return {from, pitch};
      }
    }
    constexpr int64_t kZero = 0;
    PackTask<T> task = {};
    task.rows = g_.out_positions();
    task.count = 1;
    task.vectors = static_cast<int>(plan_.segments * plan_.vectors);
    task.place = &kZero;
    task.to = worker.chunk;
    for (int64_t c = channels.first; c < channels.last; ++c, task.to += plan_.chunk_pitch) {
      task.from = work_.linear(f, c, 0);
      if (step == 1) {
        work_.turns.pack_lines(task);
        continue;
      }
      for (int64_t n = 0; n < task.rows; ++n) task.to[n] = static_cast<A>(task.from[n * step]);
      std::fill(task.to + task.rows, task.to + plan_.pitch, A{});
    }
    return {worker.chunk, plan_.chunk_pitch};
  }

  const T* end_of_linear() const {
    return work_.linear(work_.params.features - 1, g_.out_channels - 1, 0) + g_.out_positions();
  }

  void add_columns(const Worker& worker) const {
    std::memset(static_cast<void*>(worker.result), 0,
                static_cast<size_t>(in_channels_ * g_.in_positions()) * sizeof(A));
    const int64_t step = g_.axis[2].stride;
    for (const Run& run : runs_) {
      for (int64_t c = 0; c < in_channels_; ++c) {
        const A* from = worker.columns + (run.k * in_channels_ + c) * plan_.pitch + run.o;
        A* to = worker.result + c * g_.in_positions() + run.i;
        if (step == 1) {
          for (int64_t n = 0; n < run.count; ++n) to[n] += from[n];
        } else {
          for (int64_t n = 0; n < run.count; ++n) to[n * step] += from[n];
        }
      }
    }
  }

  void write(const A* result, int64_t f, int64_t group) const {
    const int64_t step = work_.params.weight_stride.position;
    for (int64_t c = 0; c < in_channels_; ++c, result += g_.in_positions()) {
      T* to = work_.result(f, group * in_channels_ + c, 0);
      if (step == 1) {
        work_.turns.narrow(result, g_.in_positions(), to);
        continue;
      }
      for (int64_t i = 0; i < g_.in_positions(); ++i) to[i * step] = static_cast<T>(result[i]);
    }
  }

  Work<T> work_;
  const Geometry& g_;
  const int64_t out_channels_;  // of a group, like the next
  const int64_t in_channels_;
  const ColumnsPlan<A> plan_;
  A* weight_ = nullptr;
  const A* bias_ = nullptr;  // conv_bias, if there is one
  int64_t threads_ = 1;
  std::vector<Worker> workers_;
  std::vector<Run> runs_;
};

template <typename T>
double cost(const FuseConvLinearParams& params) {
  using A = Accumulate<T>;
  constexpr int64_t kSize = sizeof(A);
  const Geometry& g = params.geometry;
  const TileSet<A>& tiles = simd_kernels(simd_level());
  const ColumnsPlan<A> plan(g, tiles);
  const int64_t result = g.in_channels_per_group() * g.in_positions();
  const bool fits = plan.taps * g.out_channels * kSize <= kMostWeightBytes &&
                    plan.chunk_channels * plan.chunk_pitch * kSize <= kMostBytes &&
                    plan.taps * plan.pitch * kSize <= kMostBytes && result * kSize <= kMostBytes;
  if (!fits) return kNever;

  const auto lanes = static_cast<double>(tiles.lanes);
  // Each is one thread's: of an odd number, the weights being measured on two, one counts twice.
  const auto images = static_cast<double>(2 * divide_up(params.features * g.groups, 2));
  const auto columns = static_cast<double>(plan.taps * plan.pitch) / lanes;
  const auto lines = static_cast<double>(plan.taps * g.axis[0].out * g.axis[1].out);
  const Tiling tiling(tiles, plan.vectors, divide_up(plan.taps, plan.blocks));
  const double added = valid_taps(g) * static_cast<double>(g.in_channels_per_group());
  const Weights& weights = kWeights.now();
  const double products = columns * static_cast<double>(g.out_channels_per_group());
  const double read = static_cast<double>(g.out_channels_per_group() * g.out_positions()) / lanes;
  const double image = products * tiling.product_with(weights.load) +
                       added * (g.axis[2].stride == 1 ? weights.added / lanes : weights.split) +
                       (std::is_same_v<T, A> ? weights.read : weights.copied) * read +
                       weights.written * (static_cast<double>(result) / lanes + columns) +
                       weights.line * lines;
  return weights.launch + weights.repacked * static_cast<double>(weights_of(g)) + images * image;
}

}  // namespace

double cost_by_columns(const FuseConvLinearParams& params) {
  const Geometry& g = params.geometry;
  const int64_t taps = g.in_channels_per_group() * g.kernel_positions();
  // Results with their rows innermost would be written element by element.
  if (g.transposed || params.weight_stride.position != 1 || taps > kMostTaps) return kNever;
  const int64_t products = taps * g.out_channels_per_group() * g.out_positions();
  if (params.features * g.groups < kLeastImages && products > kSmallImage) return kNever;
  return dispatch(params.dtype, [&](auto zero) { return cost<decltype(zero)>(params); });
}

void fuse_conv_linear_by_columns(const FuseConvLinearParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate) {
  dispatch(params.dtype,
           [&](auto zero) { ByColumns<decltype(zero)>(params, parallel_for, allocate).run(); });
}

}  // namespace linfuse
