// What multiplies in fuse_conv_linear_by_position_cpu.cpp: an engine says how images and the
// weights are packed, and computes a segment for a block of input channels. Terms, besides those of
// image_frame.h
//
//   plane  all places of an image for one step of a product: of one output channel, or of a pair
//   block  neighbouring input channels of a group, as many as the engine takes at a time
//
// ImageVectors serves all types and machines: an element is an Accumulate<T> (tile.h). ImageTiles
// serves half types where the machine has AMX: an element is a pair (amx.h).
#pragma once

#include "fuse_conv_linear_engines.h"
#include "image_frame.h"

namespace linfuse {

// About half of a core's first-level cache.
constexpr int64_t kImageCacheBytes = int64_t{24} << 10;
// Elements of a line that are converted at a time.
constexpr int64_t kAtATime = 256;

template <typename T>
class ImageVectors {
  using A = Accumulate<T>;

 public:
  using Element = A;
  static constexpr int64_t kChannels = 1;  // of a plane

  struct Session {
    explicit Session(const ImageVectors&) {}
  };

  explicit ImageVectors(const Work<T>& work) : work_(work), shape_(shape(work.g)) {}

  static ImageShape shape(const Geometry& g) {
    const TileSet<A>& tiles = simd_kernels(simd_level());
    ImageShape shape = {};
    shape.element_bytes = sizeof(Element);
    shape.lanes = tiles.lanes;
    shape.planes = g.out_channels_per_group();
    shape.blocks = divide_up(g.in_channels_per_group(), tiles.most_channels);
    // As many vectors as columns leave registers for.
    shape.columns = divide_up(g.in_channels_per_group(), shape.blocks);
    shape.most_vectors = tiles.most_vectors(shape.columns);
    shape.weights = g.kernel_positions() * shape.planes * shape.columns;
    return shape;
  }

  int64_t weight_tasks() const { return tasks_of_weight(work_.g); }

  void pack_weight(int64_t c_out, int64_t task, int64_t c_in, int64_t channels,
                   Element* packed) const {
    pack_channels(work_, c_out, channels_of_task(work_.g, task), c_in, channels, channels, packed);
  }

  // Neighbouring positions of a plane, of whose channels so many exist.
  void copy(const T* from, int64_t, int64_t count, Element* to) const {
    const int64_t step = work_.params.linear_stride.position;
    // A short line that needs no conversion is copied sooner than a function is called.
    constexpr int64_t kShort = std::is_same_v<T, A> ? 32 : 0;
    if (step == 1 && count > kShort) {
      work_.turns.widen(from, count, to);
      return;
    }
    for (int64_t n = 0; n < count; ++n) to[n] = static_cast<A>(from[n * step]);
  }

  // The same where they are: `from` itself where nothing is to be converted, else `buffer`.
  const Element* converted(const T* from, int64_t channels, int64_t count, Element* buffer) const {
    if constexpr (std::is_same_v<T, A>) {
      if (work_.params.linear_stride.position == 1) return from;
    }
    copy(from, channels, count, buffer);
    return buffer;
  }

  // Output channels of which sums are made at a time: few enough to stay in the first-level cache
  // for all taps of a segment.
  bool sums_at_once(const Phase& phase, int64_t width) const {
    return channels_at_once(phase, width) >= shape_.planes;
  }

  // A segment as [c_in][place], of which neighbours are `line` apart. The image is read from where
  // the segment begins, and has its planes `pitch` apart.
  void multiply(const Element* image, int64_t pitch, const Phase& phase, const Element* weight,
                int64_t channels, int64_t vectors, A* sums, int64_t line) const {
    const int64_t width = vectors * shape_.lanes;
    const int64_t at_once = channels_at_once(phase, width);
    alignas(64) A more[kMostSums];
    TileTask<A> task = {};
    task.linear_start = phase.place.data();
    task.linear_line = pitch;
    task.kernel = phase.k.data();
    task.taps = static_cast<int64_t>(phase.k.size());
    task.tile_line = line;
    task.weight_line = channels;
    task.weight_step = shape_.planes * channels;
    for (int64_t c = 0; c < shape_.planes; c += at_once) {
      task.linear = image + c * pitch;
      task.weight = weight + c * channels;
      task.channels = std::min(at_once, shape_.planes - c);
      work_.tiles.tile[vectors][channels](task, c == 0 ? sums : more);
      for (int64_t n = 0; c > 0 && n < channels * width; ++n) sums[n] += more[n];
    }
  }

  static constexpr int64_t kMostSums =
      TileSet<A>::kMostVectors * TileSet<A>::kMostChannels * TileSet<A>::kMostLanes;

 private:
  int64_t channels_at_once(const Phase& phase, int64_t width) const {
    if (phase.k.size() == 1) return shape_.planes;
    return std::max<int64_t>(1, kImageCacheBytes / (width * static_cast<int64_t>(sizeof(A))));
  }

  const Work<T>& work_;
  const ImageShape shape_;
};

template <typename T>
class ImageTiles {
 public:
  using Element = Pair;
  static constexpr int64_t kChannels = AmxPairs<T>::kChannels;
  static constexpr int64_t kMostSums =
      Amx::kMostRows * Amx::kMostTiles * Amx::kLanes * Amx::kMostTiles;

  using Session = AmxSession;

  explicit ImageTiles(const Work<T>& work)
      : work_(work), kernels_(*amx_kernels()), cut_(work.g), registers_(cut_.rows, cut_.depth) {}

  static ImageShape shape(const Geometry& g) {
    const TileCut<T> cut(g);
    ImageShape shape = {};
    shape.element_bytes = sizeof(Element);
    shape.lanes = Amx::kLanes;
    shape.planes = cut.lines();
    shape.blocks = cut.blocks;
    shape.columns = cut.columns();
    shape.most_vectors = Amx::kMostTiles;
    shape.weights = g.kernel_positions() * cut.weights();
    return shape;
  }

  const AmxShapes& registers() const { return registers_; }

  int64_t weight_tasks() const { return cut_.parts; }

  void pack_weight(int64_t c_out, int64_t task, int64_t c_in, int64_t channels,
                   Element* packed) const {
    pack_pairs(work_, cut_, c_out, task, c_in, channels, packed);
  }

  void copy(const T* from, int64_t channels, int64_t count, Element* to) const {
    const ImageStrides& strides = work_.params.linear_stride;
    if (strides.position == 1) {
      kernels_.AmxTurns<T>::pair(from, strides.channel, channels, count, to);
      return;
    }
    T line[kChannels][kAtATime];
    for (int64_t first = 0; first < count; first += kAtATime) {
      const int64_t some = std::min(kAtATime, count - first);
      for (int64_t c = 0; c < std::min(channels, kChannels); ++c) {
        const T* channel = from + c * strides.channel + first * strides.position;
        for (int64_t n = 0; n < some; ++n) line[c][n] = channel[n * strides.position];
      }
      kernels_.AmxTurns<T>::pair(line[0], kAtATime, channels, some, to + first);
    }
  }

  const Element* converted(const T* from, int64_t channels, int64_t count, Element* buffer) const {
    copy(from, channels, count, buffer);
    return buffer;
  }

  bool sums_at_once(const Phase&, int64_t) const { return true; }

  void multiply(const Element* image, int64_t pitch, const Phase& phase, const Element* weight,
                int64_t, int64_t vectors, float* sums, int64_t line) const {
    AmxTask task = {};
    task.linear = image;
    task.linear_start = phase.place.data();
    task.linear_line = pitch;
    task.weight = weight;
    task.kernel = phase.k.data();
    task.weight_step = cut_.weights();
    task.taps = static_cast<int64_t>(phase.k.size());
    task.parts = cut_.parts;
    task.factors = AmxPairs<T>::kFactors;
    task.depth = cut_.depth;
    task.rows = cut_.rows;
    task.width = line;
    kernels_.multiply[cut_.tiles][vectors](task, sums);
  }

 private:
  const Work<T>& work_;
  const AmxKernels& kernels_;
  const TileCut<T> cut_;
  const AmxShapes registers_;
};

}  // namespace linfuse
