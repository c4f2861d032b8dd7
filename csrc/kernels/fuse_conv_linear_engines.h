// What multiplies in fuse_conv_linear_by_input_cpu.cpp: an engine says how a panel and the weights
// are packed, and computes the sums of one input position. Terms, besides those of
// fuse_conv_linear_plan.h
//
//   line     `width` neighbouring elements of a panel: all that one step of a product reads of it
//   columns  of the sums of a block: its input channels, or more
//
// Vectors serves all types and machines: a line is one output channel, in Accumulate<T> (tile.h).
// ChannelVectors does so where rows are too few to fill a vector: with the operands exchanged in
// the same tile, input channels fill it. MatrixTiles serves half types where the machine has
// AMX: a line is of pairs (amx.h).
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "amx.h"
#include "fuse_conv_linear_work.h"

namespace linfuse {

// What the plan must know of an engine.
struct EngineShape {
  int64_t element_bytes;  // of panels and weights
  int64_t lanes;          // f that a panel's width is a multiple of
  int64_t lines;          // of one output position of a group
  int64_t blocks;         // of a group's input channels
  int64_t columns;        // of the sums of a block
  int64_t weights;        // elements of a block's weights at one k
  int64_t most_vectors;   // of so many lanes, in a panel
  int64_t kernel_step;    // how far apart a task's tile has the weights of neighbouring k
};

// From [position][column][f], columns being input channels.
template <typename T>
void unpack_channels(const Work<T>& work, const Rows& rows, const Accumulate<T>* sums,
                     int64_t columns, Range channels, int64_t first, int64_t count) {
  for (int64_t c = channels.first; c < channels.last; ++c) {
    work.unpack_rows(sums + (c - channels.first) * rows.width, columns * rows.width, rows.first,
                     rows.count, c, first, count);
  }
}

// The weights of some output channels of the group that begins at c_out, for `channels` input
// channels from c_in on, as [k][c_out][column]; what no channel has is zero.
template <typename T>
void pack_channels(const Work<T>& work, int64_t c_out, Range some, int64_t c_in, int64_t channels,
                   int64_t columns, Accumulate<T>* packed) {
  using A = Accumulate<T>;
  // What is read k by k stays in the first-level cache.
  constexpr int64_t kCacheBytes = int64_t{16} << 10;
  const Geometry& g = work.g;
  const T* weight = static_cast<const T*>(work.params.conv_weight);
  const int64_t positions = g.kernel_positions();
  const int64_t step = g.weight_step_in();
  const int64_t line_bytes = channels * positions * static_cast<int64_t>(sizeof(T));
  const int64_t at_once = std::max<int64_t>(1, kCacheBytes / line_bytes);
  for (int64_t first = some.first; first < some.last; first += at_once) {
    const int64_t last = std::min(some.last, first + at_once);
    for (int64_t k = 0; k < positions; ++k) {
      A* to = packed + (k * g.out_channels_per_group() + first) * columns;
      for (int64_t c = first; c < last; ++c, to += columns) {
        const T* from = weight + g.weight_index(c_out + c, c_in) + k;
        for (int64_t n = 0; n < channels; ++n) to[n] = static_cast<A>(from[n * step]);
        std::fill(to + channels, to + columns, A{});
      }
    }
  }
}

// Output channels of which each sum is made at a time, as the next ones are added to it: `wanted`
// of them, but not so few that there are very many additions, each of which loses digits.
inline int64_t channels_of_chunk(int64_t out_channels, int64_t wanted) {
  constexpr int64_t kLeast = 16;
  constexpr int64_t kMost = 128;
  constexpr int64_t kMostChunks = 32;
  return std::clamp(std::max(wanted, divide_up(out_channels, kMostChunks)), kLeast, kMost);
}

// Of `taps` pairs (k, c_in) of a group, cut into blocks of about the same size: those of one block.
inline Range taps_of_block(int64_t taps, int64_t blocks, int64_t block) {
  return {block * taps / blocks, (block + 1) * taps / blocks};
}

// Tasks that packing a block's weights, or a group's, is cut into: enough for the threads there
// are, where these are few.
inline int64_t tasks_of_weight(const Geometry& g) {
  constexpr int64_t kLeastChannels = 16;
  return divide_up(g.out_channels_per_group(), kLeastChannels);
}

// The output channels of a group that a task packs.
inline Range channels_of_task(const Geometry& g, int64_t task) {
  const int64_t tasks = tasks_of_weight(g);
  const int64_t channels = g.out_channels_per_group();
  return {task * channels / tasks, (task + 1) * channels / tasks};
}

// The weights of each group as [block][c_out][(k, c_in) of the block].
template <typename T>
void pack_taps(const Work<T>& work, int64_t blocks, Accumulate<T>* to) {
  using A = Accumulate<T>;
  const Geometry& g = work.g;
  const T* weight = static_cast<const T*>(work.params.conv_weight);
  const int64_t out_channels = g.out_channels_per_group();
  // From the first weight of an output channel to that of each (k, c_in).
  std::vector<int64_t> place;
  place.reserve(static_cast<size_t>(g.kernel_positions() * g.in_channels_per_group()));
  for (int64_t k = 0; k < g.kernel_positions(); ++k) {
    for (int64_t c = 0; c < g.in_channels_per_group(); ++c) {
      place.push_back(c * g.weight_step_in() + k);
    }
  }
  const auto taps = static_cast<int64_t>(place.size());
  const int64_t tasks = tasks_of_weight(g);
  for_each(work.parallel_for, g.groups * tasks, taps * out_channels / tasks, [&](int64_t item) {
    const int64_t group = item / tasks;
    const int64_t task = item % tasks;
    const Range channels = channels_of_task(g, task);
    for (int64_t block = 0; block < blocks; ++block) {
      const Range some = taps_of_block(taps, blocks, block);
      const int64_t size = some.last - some.first;
      A* packed = to + (group * taps + some.first) * out_channels + channels.first * size;
      for (int64_t c = channels.first; c < channels.last; ++c) {
        const T* from = weight + g.weight_index(group * out_channels + c, 0);
        for (int64_t n = some.first; n < some.last; ++n) {
          *packed++ = static_cast<A>(from[place[static_cast<size_t>(n)]]);
        }
      }
    }
  });
}

template <typename T>
class Vectors {
  using A = Accumulate<T>;

 public:
  using Element = A;
  using Task = TileTask<A>;

  struct Session {
    explicit Session(const Vectors&) {}
  };

  explicit Vectors(const Work<T>& work) : work_(work) {}

  EngineShape shape() const {
    const int64_t in_channels = work_.g.in_channels_per_group();
    EngineShape shape = {};
    shape.element_bytes = sizeof(Element);
    shape.lanes = work_.tiles.lanes;
    shape.lines = work_.g.out_channels_per_group();
    shape.blocks = divide_up(in_channels, work_.tiles.most_channels);
    shape.columns = divide_up(in_channels, shape.blocks);
    shape.weights = shape.lines * shape.columns;
    shape.kernel_step = 1;
    // A register for each sum of the largest block.
    shape.most_vectors = work_.tiles.most_vectors(shape.columns);
    return shape;
  }

  // Some lines of a group whose first output channel is `c_out`.
  void pack(const Rows& rows, int64_t c_out, Range lines, int64_t source, int64_t count,
            Element* to, int64_t step, double* sums, bool stream) const {
    work_.pack(rows, {c_out + lines.first, c_out + lines.last}, source, count, to, step, sums,
               stream);
  }

  // Tasks that packing a block's weights may be cut into.
  int64_t weight_tasks() const { return tasks_of_weight(work_.g); }

  // A task's share of the weights of a group whose first output channel is `c_out`, for `channels`
  // input channels from c_in on.
  void pack_weight(int64_t c_out, int64_t task, int64_t c_in, int64_t channels,
                   Element* packed) const {
    pack_channels(work_, c_out, channels_of_task(work_.g, task), c_in, channels, channels, packed);
  }

  // All of a task but the operands.
  Task task(const Rows& rows, int64_t channels) const {
    Task task = {};
    task.linear_line = rows.width;
    task.channels = work_.g.out_channels_per_group();
    task.weight_step = task.channels * channels;
    task.weight_line = channels;
    return task;
  }

  int64_t columns(int64_t channels) const { return channels; }

  // [c_in][f]
  void multiply(const Task& task, const Rows& rows, int64_t channels, A* sums) const {
    work_.tiles.tile[rows.vectors][channels](task, sums);
  }

  // Writes `count` input positions from the sums of so many.
  void unpack(const Rows& rows, const A* sums, int64_t channels, int64_t channel, int64_t first,
              int64_t count) const {
    unpack_channels(work_, rows, sums, columns(channels), {channel, channel + channels}, first,
                    count);
  }

 private:
  const Work<T>& work_;
};

template <typename T>
class ChannelVectors {
  using A = Accumulate<T>;

 public:
  using Element = A;
  using Task = TileTask<A>;

  struct Session {
    explicit Session(const ChannelVectors&) {}
  };

  explicit ChannelVectors(const Work<T>& work) : work_(work) {
    const int64_t in_channels = work.g.in_channels_per_group();
    const TileSet<A>& tiles = work.tiles;
    most_rows_ = std::min<int64_t>(tiles.most_channels, work.params.features);
    blocks_ = divide_up(in_channels, tiles.most_vectors(most_rows_) * tiles.lanes);
    vectors_ = divide_up(divide_up(in_channels, blocks_), tiles.lanes);
    columns_ = vectors_ * tiles.lanes;
  }

  EngineShape shape() const {
    EngineShape shape = {};
    shape.element_bytes = sizeof(Element);
    shape.lanes = 1;
    shape.lines = work_.g.out_channels_per_group();
    shape.blocks = blocks_;
    shape.columns = columns_;
    shape.weights = shape.lines * columns_;
    shape.most_vectors = most_rows_;
    shape.kernel_step = shape.weights;
    return shape;
  }

  void pack(const Rows& rows, int64_t c_out, Range lines, int64_t source, int64_t count,
            Element* to, int64_t step, double* sums, bool) const {
    const ImageStrides& strides = work_.params.linear_stride;
    const T* conv_bias = static_cast<const T*>(work_.params.conv_bias);
    const int64_t lanes = work_.tiles.lanes;
    const int64_t elements = (lines.last - lines.first) * rows.width;
    int64_t offset[TileSet<A>::kMostLanes];
    PackLanesTask<T> task = {};
    task.from = work_.linear(rows.first, c_out + lines.first, source);
    task.offset = offset;
    task.position = strides.position;
    task.count = count;
    task.step = step;
    for (int64_t first = 0; first < elements; first += lanes) {
      task.lanes = std::min(lanes, elements - first);
      for (int64_t m = 0; m < lanes; ++m) {
        const int64_t f = (first + m) % rows.width;
        const int64_t channel = (first + m) / rows.width;
        const bool exists = m < task.lanes && f < rows.count;
        offset[m] = exists ? f * strides.row + channel * strides.channel : -1;
      }
      double parts[TileSet<A>::kMostLanes] = {};
      task.to = to == nullptr ? nullptr : to + first;
      task.sums = sums == nullptr ? nullptr : parts;
      work_.turns.pack_lanes(task);
      for (int64_t m = 0; m < task.lanes && sums != nullptr; ++m) {
        if (offset[m] < 0) continue;
        const A scale = static_cast<A>(conv_bias[c_out + lines.first + (first + m) / rows.width]);
        sums[(first + m) % rows.width] += parts[m] * static_cast<double>(scale);
      }
    }
  }

  int64_t weight_tasks() const { return tasks_of_weight(work_.g); }

  void pack_weight(int64_t c_out, int64_t task, int64_t c_in, int64_t channels,
                   Element* packed) const {
    pack_channels(work_, c_out, channels_of_task(work_.g, task), c_in, channels, columns_, packed);
  }

  Task task(const Rows& rows, int64_t) const {
    Task task = {};
    task.channels = work_.g.out_channels_per_group();
    task.weight_step = 1;
    task.weight_line = rows.width;
    return task;
  }

  int64_t columns(int64_t) const { return columns_; }

  // [f][c_in]
  void multiply(Task task, const Rows& rows, int64_t, A* sums) const {
    std::swap(task.linear, task.weight);
    std::swap(task.linear_start, task.kernel);
    task.linear_line = columns_;
    work_.tiles.tile[vectors_][rows.count](task, sums);
  }

  void unpack(const Rows& rows, const A* sums, int64_t channels, int64_t channel, int64_t first,
              int64_t count) const {
    for (int64_t f = 0; f < rows.count; ++f) {
      work_.unpack_channels(sums + f * columns_, rows.width * columns_, rows.first + f, channel,
                            channels, first, count);
    }
  }

 private:
  const Work<T>& work_;
  int64_t most_rows_;
  int64_t blocks_;
  int64_t vectors_;
  int64_t columns_;
};

// How matrix tiles cut a group's channels.
template <typename T>
struct TileCut {
  int64_t pairs;   // of its output channels
  int64_t parts;   // that these are cut into
  int64_t depth;   // of a part
  int64_t blocks;  // of its input channels
  int64_t tiles;   // of a block
  int64_t rows;    // of a tile

  explicit TileCut(const Geometry& g)
      : pairs(divide_up(g.out_channels_per_group(), AmxPairs<T>::kChannels)),
        parts(divide_up(pairs, Amx::kMostRows)),
        depth(divide_up(pairs, parts)),
        blocks(divide_up(g.in_channels_per_group(), Amx::kMostRows * Amx::kMostTiles)),
        tiles(divide_up(most_in_block(g), Amx::kMostRows)),
        rows(divide_up(most_in_block(g), tiles)) {}

  int64_t lines() const { return parts * depth; }
  int64_t columns() const { return tiles * rows; }
  // Factors of a block at one k.
  int64_t weights() const { return lines() * AmxPairs<T>::kFactors * columns(); }

 private:
  int64_t most_in_block(const Geometry& g) const {
    return divide_up(g.in_channels_per_group(), blocks);
  }
};

// The tile registers of a thread, as an engine wants them, while this lives.
class AmxSession {
 public:
  template <typename Engine>
  explicit AmxSession(const Engine& engine) {
    amx_kernels()->start(engine.registers());
  }
  ~AmxSession() { amx_kernels()->stop(); }
  AmxSession(const AmxSession&) = delete;
  AmxSession& operator=(const AmxSession&) = delete;
};

// The weights of a part of the group that begins at c_out, for `channels` input channels from c_in
// on, as [k][part][factor][tile][c_in of the tile][depth]; what no channel has is zero.
template <typename T>
void pack_pairs(const Work<T>& work, const TileCut<T>& cut, int64_t c_out, int64_t part,
                int64_t c_in, int64_t channels, Pair* packed) {
  constexpr int64_t kChannels = AmxPairs<T>::kChannels;
  constexpr int64_t kFactors = AmxPairs<T>::kFactors;
  const Geometry& g = work.g;
  const T* weight = static_cast<const T*>(work.params.conv_weight);
  const int64_t step_out = g.weight_step_out();
  const int64_t first = part * cut.depth;
  const int64_t some = std::min(cut.depth, cut.pairs - first);
  const int64_t last = (first + some) * kChannels - 1;
  const bool lacks_one = last >= g.out_channels_per_group();
  const int64_t factor_size = cut.columns() * cut.depth;
  for (int64_t k = 0; k < g.kernel_positions(); ++k) {
    Pair* const to = packed + k * cut.weights() + part * kFactors * factor_size;
    std::fill(to, to + kFactors * factor_size, Pair{});
    for (int64_t n = 0; n < channels; ++n) {
      const T* from = weight + g.weight_index(c_out + first * kChannels, c_in + n) + k;
      Pair* line = to + n * cut.depth;
      for (int64_t d = 0; d < some; ++d, from += kChannels * step_out) {
        if constexpr (kFactors == 1) {
          const bool is_alone = lacks_one && d == some - 1;
          line[d] = {{*from, is_alone ? T{} : from[step_out]}};
        } else {
          const Pair parts = split(*from);
          line[d] = {{parts.half[0], parts.half[0]}};
          line[d + factor_size] = {{parts.half[1], parts.half[1]}};
        }
      }
    }
  }
}

template <typename T>
class MatrixTiles {
  static constexpr int kChannels = AmxPairs<T>::kChannels;
  static constexpr int kFactors = AmxPairs<T>::kFactors;

 public:
  using Element = Pair;
  using Task = AmxTask;

  using Session = AmxSession;

  explicit MatrixTiles(const Work<T>& work)
      : work_(work), kernels_(*amx_kernels()), cut_(work.g), registers_(cut_.rows, cut_.depth) {}

  const AmxShapes& registers() const { return registers_; }

  EngineShape shape() const {
    EngineShape shape = {};
    shape.element_bytes = sizeof(Element);
    shape.lanes = Amx::kLanes;
    shape.lines = cut_.lines();
    shape.blocks = cut_.blocks;
    shape.columns = cut_.columns();
    shape.weights = cut_.weights();
    shape.most_vectors = kMostVectors;
    shape.kernel_step = 1;
    return shape;
  }

  void pack(const Rows& rows, int64_t c_out, Range lines, int64_t source, int64_t count,
            Element* to, int64_t step, double* sums, bool stream) const {
    const FuseConvLinearParams& params = work_.params;
    const int64_t first = kChannels * lines.first;
    const int64_t channel = c_out + first;
    AmxPackTask<T> task = {};
    task.row_stride = params.linear_stride.row;
    task.channel_stride = params.linear_stride.channel;
    task.position_stride = params.linear_stride.position;
    task.from = work_.linear(rows.first, channel, source);
    task.rows = rows.count;
    task.vectors = static_cast<int>(rows.vectors);
    task.count = count;
    task.channels = work_.g.out_channels_per_group() - first;
    task.lines = lines.last - lines.first;
    task.to = to;
    task.step = step;
    task.width = rows.width;
    task.stream = stream;
    task.sums = sums;
    task.scale = static_cast<const T*>(params.conv_bias) + (sums == nullptr ? 0 : channel);
    kernels_.AmxTurns<T>::pack(task);
  }

  int64_t weight_tasks() const { return cut_.parts; }

  void pack_weight(int64_t c_out, int64_t task, int64_t c_in, int64_t channels,
                   Element* packed) const {
    pack_pairs(work_, cut_, c_out, task, c_in, channels, packed);
  }

  Task task(const Rows& rows, int64_t) const {
    Task task = {};
    task.weight_step = cut_.weights();
    task.parts = cut_.parts;
    task.factors = kFactors;
    task.depth = cut_.depth;
    task.rows = cut_.rows;
    task.linear_line = task.width = rows.width;
    return task;
  }

  int64_t columns(int64_t) const { return cut_.columns(); }

  void multiply(Task task, const Rows& rows, int64_t, float* sums) const {
    for (int64_t v = 0; v < rows.vectors; v += Amx::kMostTiles) {
      const int64_t some = std::min<int64_t>(Amx::kMostTiles, rows.vectors - v);
      kernels_.multiply[cut_.tiles][some](task, sums + v * Amx::kLanes);
      task.linear += some * Amx::kLanes;
    }
  }

  void unpack(const Rows& rows, const float* sums, int64_t channels, int64_t channel, int64_t first,
              int64_t count) const {
    unpack_channels(work_, rows, sums, columns(channels), {channel, channel + channels}, first,
                    count);
  }

 private:
  static constexpr int64_t kMostVectors = 2;

  const Work<T>& work_;
  const AmxKernels& kernels_;
  TileCut<T> cut_;
  AmxShapes registers_;
};

// Where rows are few and input channels fill their vectors better.
template <typename T>
bool fits_channel_vectors(const FuseConvLinearParams& params) {
  const TileSet<Accumulate<T>>& tiles = simd_kernels(simd_level());
  const auto padded = [&](int64_t count) { return divide_up(count, tiles.lanes) * tiles.lanes; };
  const int64_t channels = params.geometry.in_channels_per_group();
  return params.features < 2 * tiles.lanes &&
         channels * padded(params.features) > params.features * padded(channels);
}

// A single output channel makes no pair.
inline bool fits_matrix_tiles(const FuseConvLinearParams& params) {
  return element_size(params.dtype) == 2 && simd_level() == SimdLevel::kAmx &&
         params.geometry.out_channels_per_group() > 1;
}

}  // namespace linfuse
