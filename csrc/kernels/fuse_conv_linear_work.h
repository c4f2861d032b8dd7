// What the ways of fuse_conv_linear on a CPU share: threads, packing the Linear, the bias.
//
//   panel    `width` rows f of the Linear, repacked so that f is innermost, in Accumulate<T>
#pragma once

#include <atomic>
#include <bit>
#include <utility>
#include <vector>

#include "fuse_conv_linear.h"
#include "fuse_conv_linear_cost.h"
#include "memory.h"
#include "simd_kernels.h"
#include "slab.h"

namespace linfuse {

inline int64_t aligned(int64_t bytes) {
  constexpr int64_t kAlignment = 64;
  return divide_up(bytes, kAlignment) * kAlignment;
}

// Bounds what threads hold of their own: beyond it fewer of them work.
constexpr int64_t kMostScratchBytes = int64_t{32} << 20;

// The same for the packed weights that all of them share.
constexpr int64_t kMostWeightBytes = int64_t{16} << 20;

// Results from here on are written past the caches. In a loop a smaller one stays there and would
// be the faster for it; of a result that is made once, hardly a line is there to be found.
constexpr Measured<int64_t> kStreamedBytes = {.narrow = kLargeBlock, .wide = int64_t{1} << 20};

// Rows f of the Linear, in whole vectors; or, where lanes are not theirs, in a power of two.
struct Rows {
  int64_t first;
  int64_t count;  // that exist; zeros fill the last vector
  int64_t vectors;
  int64_t width;
};

// All rows, in panels that share the vectors as evenly as it goes.
struct Panels {
  int64_t features;
  int64_t lanes;
  int64_t vectors;
  int64_t count;

  Panels() = default;
  Panels(int64_t features, int64_t lanes, int64_t most_vectors)
      : features(features),
        lanes(lanes),
        vectors(divide_up(features, lanes)),
        count(divide_up(vectors, most_vectors)) {
    // Two threads, or four, do four panels sooner.
    if (count == 3 && vectors > 3) ++count;
  }

  int64_t width(int64_t some) const {
    return lanes > 1 ? some * lanes
                     : static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(some)));
  }
  int64_t most_width() const { return width(divide_up(vectors, count)); }
  Rows rows(int64_t panel) const {
    const int64_t first = panel * vectors / count;
    const int64_t some = (panel + 1) * vectors / count - first;
    return {first * lanes, std::min(some * lanes, features - first * lanes), some, width(some)};
  }
};

// Alone in its line of memory.
struct alignas(64) Counter {
  std::atomic<int64_t> taken{0};
};

template <typename T>
class Work {
 public:
  using A = Accumulate<T>;

  Work(const FuseConvLinearParams& params, const ParallelFor& parallel_for)
      : params(params),
        g(params.geometry),
        parallel_for(parallel_for),
        tiles(simd_kernels(simd_level())),
        turns(simd_kernels(simd_level())),
        linear_(static_cast<const T*>(params.linear_weight)),
        fused_(static_cast<T*>(params.weight)) {
    const int64_t bytes = params.features * g.cols() * static_cast<int64_t>(sizeof(T));
    advise_result(fused_, bytes);
    if (bytes >= kLargeBlock) populate(parallel_for, fused_, bytes);
    stream_ = bytes >= kStreamedBytes.now();
    const int64_t lanes = tiles.lanes;
    bias_.assign(static_cast<size_t>(divide_up(params.features, lanes) * lanes), 0.0);
  }

  const FuseConvLinearParams& params;
  const Geometry& g;
  const ParallelFor& parallel_for;
  const TileSet<A>& tiles;
  const TurnSet<T>& turns;

  // Calls visit(thread, item) for every item, on as many threads as `work` multiply-adds an item, a
  // vector of them at a time, deserve. Each begins with a range of its own, the same that
  // parallel_for would give it, as what it has packed and read before is in its cache; then it
  // helps the others.
  template <typename Visitor>
  void share(int64_t items, int64_t work, int64_t threads, const Visitor& visit) const {
    const int64_t wanted = std::min(threads, divide_up(items, grain_for(work / tiles.lanes)));
    if (wanted <= 0) return;
    const int64_t range = divide_up(items, wanted);
    std::vector<Counter> next(static_cast<size_t>(wanted));
    parallel_for(wanted, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t owner = n; owner < n + wanted; ++owner) {
          const int64_t first = owner % wanted * range;
          const int64_t last = std::min(items, first + range);
          std::atomic<int64_t>& taken = next[static_cast<size_t>(owner % wanted)].taken;
          for (int64_t item = first + taken++; item < last; item = first + taken++) visit(n, item);
        }
      }
      turns.finish();
    });
  }

  // The Linear's element of row f at position o of an output channel.
  const T* linear(int64_t f, int64_t c_out, int64_t o) const {
    return linear_ + offset(params.linear_stride, g.out_channels_per_group(), f, c_out, o);
  }

  // The result's element of row f at position i of an input channel.
  T* result(int64_t f, int64_t c_in, int64_t i) const {
    return fused_ + offset(params.weight_stride, g.in_channels_per_group(), f, c_in, i);
  }

  // Packs output positions [source, source + count) of some output channels of a group: position n
  // of channel c goes to `to + n * step + c * width`, and conv_bias times all of it to `sums`,
  // unless that or `to` is null. With `stream`, past the caches: finish() before another thread
  // reads it.
  void pack(const Rows& rows, Range channels, int64_t source, int64_t count, A* to, int64_t step,
            double* sums, bool stream = false) const {
    // Whole channels may follow one another without a gap.
    if (count == g.out_positions() &&
        params.linear_stride.channel == count * params.linear_stride.position) {
      pack_piece(rows, channels, source, count, to, step, sums, stream);
      return;
    }
    for (int64_t c = channels.first; c < channels.last; ++c) {
      A* channel = to == nullptr ? nullptr : to + (c - channels.first) * rows.width;
      pack_piece(rows, {c, c + 1}, source, count, channel, step, sums, stream);
    }
  }

  // Writes input positions [first, first + count) of a channel for `rows` rows from f on: position
  // n of them lies at `from + n * step`.
  void unpack_rows(const A* from, int64_t step, int64_t f, int64_t rows, int64_t c_in,
                   int64_t first, int64_t count) const {
    unpack(from, step, rows, count, params.weight_stride.row, result(f, c_in, first));
  }

  // The same for some channels of a group and one row.
  void unpack_channels(const A* from, int64_t step, int64_t f, int64_t c_in, int64_t channels,
                       int64_t first, int64_t count) const {
    unpack(from, step, channels, count, params.weight_stride.channel, result(f, c_in, first));
  }

  // What conv_bias gives to each f is summed in parts, which are then added in a fixed order.
  void make_parts(int64_t parts, int64_t width) {
    if (params.conv_bias == nullptr) return;
    part_width_ = width;
    sums_.resize(static_cast<size_t>(parts * width));
  }

  // The sums of a part, from zero; null without a conv_bias.
  double* start_part(int64_t part) {
    if (params.conv_bias == nullptr) return nullptr;
    double* sums = sums_.data() + part * part_width_;
    std::fill(sums, sums + part_width_, 0.0);
    return sums;
  }

  void add_part(const Rows& rows, int64_t part) { add_parts(rows, {part, part + 1}); }

  // The sum of some parts.
  void add_parts(const Rows& rows, Range parts) {
    if (params.conv_bias == nullptr) return;
    for (int64_t f = 0; f < rows.count; ++f) {
      double total = 0;
      for (int64_t part = parts.first; part < parts.last; ++part) {
        total += sums_[static_cast<size_t>(part * part_width_ + f)];
      }
      bias_[static_cast<size_t>(rows.first + f)] += total;
    }
  }

  void write_bias() const {
    if (params.bias == nullptr) return;
    const T* linear_bias = static_cast<const T*>(params.linear_bias);
    T* bias = static_cast<T*>(params.bias);
    for (int64_t f = 0; f < params.features; ++f) {
      double total = bias_[static_cast<size_t>(f)];
      if (linear_bias != nullptr) total += static_cast<double>(static_cast<A>(linear_bias[f]));
      bias[f] = static_cast<T>(static_cast<A>(total));
    }
  }

 private:
  // Elements of a row that are packed at a time: a few lines of cache from each of many rows.
  static constexpr int64_t kPackAtATime = 128;

  static int64_t offset(const ImageStrides& strides, int64_t channels_of_group, int64_t f,
                        int64_t channel, int64_t position) {
    return f * strides.row + channel / channels_of_group * strides.group +
           channel % channels_of_group * strides.channel + position * strides.position;
  }

  // Element m of position n goes from `from + n * step + m` to `m * stride` behind `to`.
  void unpack(const A* from, int64_t step, int64_t inner, int64_t count, int64_t stride,
              T* to) const {
    const int64_t position = params.weight_stride.position;
    UnpackTask<T> task = {};
    task.from = from;
    task.step = step;
    task.rows = inner;
    task.count = count;
    task.to = to;
    task.stream = stream_;
    if (position == 1) {
      task.stride = stride;
      turns.unpack(task);
    } else if (stride == 1) {
      task.stride = position;
      turns.unpack_lines(task);
    } else {
      for (int64_t n = 0; n < count; ++n) {
        for (int64_t m = 0; m < inner; ++m) {
          to[n * position + m * stride] = static_cast<T>(from[n * step + m]);
        }
      }
    }
  }

  void pack_piece(const Rows& rows, Range channels, int64_t source, int64_t count, A* to,
                  int64_t step, double* sums, bool stream) const {
    const T* conv_bias = static_cast<const T*>(params.conv_bias);
    const ImageStrides& strides = params.linear_stride;
    const int64_t all = (channels.last - channels.first) * count;
    const T* from = linear(rows.first, channels.first, source);
    int64_t place[kPackAtATime];
    A scale[kPackAtATime];
    int64_t c = 0;
    int64_t position = 0;
    for (int64_t first = 0; first < all; first += kPackAtATime) {
      const int64_t some = std::min(kPackAtATime, all - first);
      for (int64_t n = 0; n < some; ++n) {
        place[n] = position * step + c * rows.width;
        if (sums != nullptr) scale[n] = static_cast<A>(conv_bias[channels.first + c]);
        if (++position == count) {
          position = 0;
          ++c;
        }
      }
      PackTask<T> task = {};
      task.from = from + first * strides.position;
      task.stride = strides.row;
      task.rows = rows.count;
      task.count = some;
      task.vectors = static_cast<int>(rows.vectors);
      task.next = count == g.out_positions() ? 0 : strides.channel;
      task.place = to == nullptr ? nullptr : place;
      task.to = to;
      task.stream = stream;
      task.sums = sums;
      task.scale = scale;
      if (strides.position == 1) {
        turns.pack(task);
      } else if (strides.row == 1) {
        task.stride = strides.position;
        turns.pack_lines(task);
      } else {
        pack_strided(task);
      }
    }
  }

  // For a Linear whose neighbours in a row do not lie side by side: copies a few rows at a time to
  // where they do.
  void pack_strided(PackTask<T> task) const {
    T copy[TileSet<A>::kMostLanes * kPackAtATime];
    const int64_t rows = task.rows;
    const int64_t stride = task.stride;
    const T* from = task.from;
    task.from = copy;
    task.stride = kPackAtATime;
    const int vectors = std::exchange(task.vectors, 1);
    for (int v = 0; v < vectors; ++v) {
      task.rows = std::min<int64_t>(tiles.lanes, rows - v * tiles.lanes);
      for (int64_t n = 0; n < task.count; ++n) {
        const T* column = from + n * params.linear_stride.position;
        for (int64_t f = 0; f < task.rows; ++f) copy[f * kPackAtATime + n] = column[f * stride];
      }
      turns.pack(task);
      from += tiles.lanes * stride;
      if (task.to != nullptr) task.to += tiles.lanes;
      if (task.sums != nullptr) task.sums += tiles.lanes;
    }
  }

  const T* linear_;
  T* fused_;
  bool stream_;
  std::vector<double> bias_;
  std::vector<double> sums_;  // [part][f]
  int64_t part_width_ = 0;
};

}  // namespace linfuse
