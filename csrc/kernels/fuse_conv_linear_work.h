// What the two ways of fuse_conv_linear on a CPU share: threads, packing the Linear, the bias.
//
//   panel    `width` rows f of the Linear, repacked so that f is innermost, in Accumulate<T>
#pragma once

#include <atomic>
#include <utility>
#include <vector>

#include "fuse_conv_linear.h"
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

// Rows f of the Linear, in whole vectors.
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
        count(divide_up(vectors, most_vectors)) {}

  int64_t most_width() const { return divide_up(vectors, count) * lanes; }
  Rows rows(int64_t panel) const {
    const int64_t first = panel * vectors / count;
    const int64_t some = (panel + 1) * vectors / count - first;
    return {first * lanes, std::min(some * lanes, features - first * lanes), some, some * lanes};
  }
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
    advise_huge_pages(fused_, bytes);
    stream_ = bytes >= kLargeBlock;
    if (stream_) populate(parallel_for, fused_, bytes);
    const int64_t lanes = tiles.lanes;
    bias_.assign(static_cast<size_t>(divide_up(params.features, lanes) * lanes), 0.0);
  }

  const FuseConvLinearParams& params;
  const Geometry& g;
  const ParallelFor& parallel_for;
  const TileSet<A>& tiles;
  const TurnSet<T>& turns;

  // Calls visit(thread, item) for every item, on as many threads as that much work deserves.
  template <typename Visitor>
  void share(int64_t items, int64_t work, int64_t threads, const Visitor& visit) const {
    const int64_t wanted = std::min(threads, divide_up(items, grain_for(work)));
    std::atomic<int64_t> next{0};
    parallel_for(wanted, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t item = next++; item < items; item = next++) visit(n, item);
      }
      turns.finish();
    });
  }

  // Packs output positions [source, source + count) of some output channels: position n of channel
  // c goes to `to + n * step + c * width`, and conv_bias times all of it to `sums`, unless that or
  // `to` is null.
  // With `stream`, past the caches: finish() before another thread reads it.
  void pack(const Rows& rows, Range channels, int64_t source, int64_t count, A* to, int64_t step,
            double* sums, bool stream = false) const {
    // Where whole channels are packed, one follows the other without a gap.
    if (count == g.out_positions()) {
      pack_piece(rows, channels, source, count, to, step, sums, stream);
      return;
    }
    for (int64_t c = channels.first; c < channels.last; ++c) {
      A* channel = to == nullptr ? nullptr : to + (c - channels.first) * rows.width;
      pack_piece(rows, {c, c + 1}, source, count, channel, step, sums, stream);
    }
  }

  // Writes `count` neighbouring elements each to `rows` rows of the result, which lie `stride`
  // apart from `start` on and number from `row`; element n of them lies at `from + n * step`.
  void unpack(const A* from, int64_t step, int64_t row, int64_t rows, int64_t stride, int64_t start,
              int64_t count) const {
    UnpackTask<T> task = {};
    task.from = from;
    task.step = step;
    task.rows = rows;
    task.count = count;
    task.to = fused_ + row * stride + start;
    task.stride = stride;
    task.stream = stream_;
    turns.unpack(task);
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

  void add_part(const Rows& rows, int64_t part) {
    if (params.conv_bias == nullptr) return;
    const double* sums = sums_.data() + part * part_width_;
    for (int64_t f = 0; f < rows.width; ++f) bias_[static_cast<size_t>(rows.first + f)] += sums[f];
  }

  void write_bias() const {
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

  void pack_piece(const Rows& rows, Range channels, int64_t source, int64_t count, A* to,
                  int64_t step, double* sums, bool stream) const {
    const T* conv_bias = static_cast<const T*>(params.conv_bias);
    const int64_t all = (channels.last - channels.first) * count;
    const T* from = linear_ + rows.first * params.linear_stride[0] +
                    (channels.first * g.out_positions() + source) * params.linear_stride[1];
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
      task.from = from + first * params.linear_stride[1];
      task.stride = params.linear_stride[0];
      task.rows = rows.count;
      task.count = some;
      task.vectors = static_cast<int>(rows.vectors);
      task.next = count == g.out_positions() ? 0 : g.out_positions() * params.linear_stride[1];
      task.place = to == nullptr ? nullptr : place;
      task.to = to;
      task.stream = stream;
      task.sums = sums;
      task.scale = scale;
      if (params.linear_stride[1] == 1) {
        turns.pack(task);
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
        const T* column = from + n * params.linear_stride[1];
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
