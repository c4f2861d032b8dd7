// fused[f, (c_in, i)] = sum over the taps (o, k) of i and over c_out of
//                       linear[f, (c_out, o)] * weight[c_out, c_in, k]
//
// Here neighbouring input positions fill a vector: for few rows f, which would leave most of its
// lanes empty, and where an element of the Linear meets few kernel elements, as turning it would
// cost as much. A row of the Linear is a set of images, which need not be turned, only framed;
// those of a kernel of one element not even that.
//
//   unit     neighbouring segments of an image: what a thread takes
//
// image_frame.h and fuse_conv_linear_images.h have the other words.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "fuse_conv_linear_by_position.h"
#include "fuse_conv_linear_cost.h"
#include "fuse_conv_linear_images.h"

namespace linfuse {
namespace {

// Two thirds of the second-level cache of a current server, and how many keep a thread busy.
constexpr int64_t kOwnImageBytes = int64_t{11} << 17;
constexpr int64_t kLeastImages = 3;
constexpr int64_t kUnitsPerThread = 8;
// Of its image, that a thread reads again for each block, from the second-level cache: not of many
// planes, as each is a place of its own there.
constexpr int64_t kRereadBytes = int64_t{192} << 10;
constexpr int64_t kFewPlanes = 32;
// Of lists of segments, beside all else.
constexpr double kMostListBytes = 8e6;
// A result of so much is beyond all caches.
constexpr int64_t kFarBytes = int64_t{1} << 26;
// What it costs beside its products (fuse_conv_linear_cost.h), whatever multiplies.
struct RowWeights {
  double framed;     // a vector of an image
  double in_place;   // one that is read where it lies
  double part;       // an element of an image that has parts
  double part_line;  // a line of those
  double scattered;  // an element of a result that has phases
  double line;       // of an image or of the result
  double far;        // a vector of a result beyond the caches
  double repacked;   // a weight
  double launch;
};
struct Weights {
  double load;     // a vector that a tile reads, as most lie across lines of memory
  double segment;  // a block of one
  RowWeights row;
};
constexpr Measured<Weights> kWeights = {
    .narrow = {.load = 0.8,
               .segment = 220,
               .row = {.framed = 20,
                       .in_place = 12,
                       .part = 2.5,
                       .part_line = 19,
                       .scattered = 3.5,
                       .line = 30,
                       .far = 28,
                       .repacked = 0,
                       .launch = 57e4}},
    .wide = {.load = 1.5,
             .segment = 420,
             .row = {.framed = 29,
                     .in_place = 20,
                     .part = 2.8,
                     .part_line = 32,
                     .scattered = 4.6,
                     .line = 20,
                     .far = 67,
                     .repacked = 20,
                     .launch = 44e4}},
};
// By matrix tiles, in the same unit: a product is of one input channel's weights and a vector of
// the image.
struct TileWeights {
  double product;
  double load;     // a line of pairs that a tile reads
  double segment;  // of a block, for an input channel
  RowWeights row;
};
constexpr TileWeights kTileWeights = {.product = 1.6,
                                      .load = 6.8,
                                      .segment = 59,
                                      .row = {.framed = 61,
                                              .in_place = 0,  // never
                                              .part = 1.9,
                                              .part_line = 35,
                                              .scattered = 7.2,
                                              .line = 31,
                                              .far = 67,
                                              .repacked = 16,
                                              .launch = 56e4}};
// Bytes from channel to channel that leave too few sets of a cache to a segment.
constexpr int64_t kCrowded = 1024;

// Whether input and output positions are the same, and each is tied to itself alone.
bool is_pointwise(const Geometry& g) {
  return std::all_of(g.axis, g.axis + kAxes, [](const Axis& axis) {
    return axis.kernel == 1 && axis.stride == 1 && axis.pad_low == 0 && axis.in == axis.out;
  });
}

// Whether images may be read where a matrix has them. What lies elsewhere is copied, but goes the
// same way: the bits must not depend on it.
template <typename T, typename Element>
bool is_read_in_place(const Geometry& g, const ImageShape& shape) {
  return std::is_same_v<T, Element> && is_pointwise(g) &&
         (shape.blocks == 1 || g.out_positions() * static_cast<int64_t>(sizeof(T)) % kCrowded != 0);
}

template <typename T, typename Engine>
class ByPosition {
  using A = Accumulate<T>;
  using Element = typename Engine::Element;
  static constexpr int64_t kChannels = Engine::kChannels;

 public:
  ByPosition(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
             const Allocate& allocate)
      : work_(params, parallel_for),
        g_(work_.g),
        engine_(work_),
        shape_(Engine::shape(g_)),
        out_channels_(g_.out_channels_per_group()),
        in_channels_(g_.in_channels_per_group()),
        plan_(make_image_plan(g_, shape_)),
        in_place_(is_read_in_place<T, Element>(g_, shape_) && params.linear_stride.position == 1 &&
                  params.linear_stride.channel == g_.out_positions() &&
                  params.linear_stride.row == g_.rows()) {
    const int64_t image_bytes = plan_.size * int64_t{sizeof(Element)};
    alone_ = image_bytes <= kOwnImageBytes && images() >= kLeastImages * params.threads;
    stage_ = alone_ ? std::min<int64_t>(params.threads, kMostScratchBytes / image_bytes)
                    : std::clamp<int64_t>(ImagePlan::kMostBytes / image_bytes, 1, images());
    const int64_t weight_bytes =
        aligned(g_.groups * shape_.blocks * shape_.weights * int64_t{sizeof(Element)});
    weight_ = reinterpret_cast<Element*>(allocate(weight_bytes + stage_ * image_bytes));
    advise_huge_pages(weight_, weight_bytes + stage_ * image_bytes);
    image_ = reinterpret_cast<Element*>(reinterpret_cast<char*>(weight_) + weight_bytes);
    work_.make_parts(alone_ ? images() : stage_ * shape_.planes, 1);
  }

  void run() {
    pack_weight();
    for (int64_t number = 0; number < plan_.slabs.count; ++number) {
      slab_ = make_position_slab(g_, plan_.slabs, number);
      frame_ = Frame(slab_.geometry, shape_.lanes, plan_.vectors);
      frame_.list(slab_.geometry);
      alone_ ? run_alone() : run_together();
    }
    work_.write_bias();
  }

 private:
  int64_t images() const { return work_.params.features * g_.groups; }
  int64_t block_start(int64_t block) const { return block * in_channels_ / shape_.blocks; }
  int64_t group_weights() const { return g_.kernel_positions() * out_channels_ * in_channels_; }

  void pack_weight() const {
    const int64_t tasks = engine_.weight_tasks();
    const int64_t count = g_.groups * shape_.blocks * tasks;
    for_each(work_.parallel_for, count, shape_.weights / tasks, [&](int64_t n) {
      const int64_t group = n / tasks / shape_.blocks;
      const int64_t block = n / tasks % shape_.blocks;
      const int64_t start = block_start(block);
      engine_.pack_weight(group * out_channels_, n % tasks, start, block_start(block + 1) - start,
                          weight_of(group, block));
    });
  }

  Element* weight_of(int64_t group, int64_t block) const {
    return weight_ + (group * shape_.blocks + block) * shape_.weights;
  }

  // An image for each thread at a time, which stays in its cache.
  void run_alone() {
    const auto segments = static_cast<int64_t>(frame_.segments.size());
    work_.share(images(), group_weights() * g_.in_positions(), stage_,
                [&](int64_t thread, int64_t image) {
                  const Image read = image_of(image, image_ + thread * plan_.size);
                  double* sum = work_.start_part(image);
                  for (int64_t plane = 0; plane < shape_.planes; ++plane) {
                    const double of_plane = make_plane(image, plane, read);
                    if (sum != nullptr) *sum += of_plane;
                  }
                  multiply(image, read, {0, segments});
                });
    for (int64_t n = 0; n < images(); ++n) work_.add_part({n / g_.groups, 1, 1, 1}, n);
  }

  // All threads share some images.
  void run_together() {
    const auto segments = static_cast<int64_t>(frame_.segments.size());
    for (int64_t first = 0; first < images(); first += stage_) {
      const int64_t count = std::min(stage_, images() - first);
      const int64_t planes = shape_.planes;
      for_each(work_.parallel_for, count * planes, plan_.pitch, [&](int64_t n) {
        const int64_t image = n / planes;
        double* sum = work_.start_part(n);
        const double of_plane = make_plane(first + image, n % planes,
                                           image_of(first + image, image_ + image * plan_.size));
        if (sum != nullptr) *sum = of_plane;
      });
      for (int64_t n = 0; n < count; ++n) {
        work_.add_parts({(first + n) / g_.groups, 1, 1, 1}, {n * planes, (n + 1) * planes});
      }
      const int64_t threads = work_.params.threads;
      const int64_t strips = std::min(segments, divide_up(kUnitsPerThread * threads, count));
      const int64_t cost = divide_up(segments, strips) * frame_.width * group_weights();
      work_.share(count * strips, cost, threads, [&](int64_t, int64_t unit) {
        const int64_t image = unit / strips;
        const int64_t strip = unit % strips;
        multiply(first + image, image_of(first + image, image_ + image * plan_.size),
                 {strip * segments / strips, (strip + 1) * segments / strips});
      });
    }
  }

  // What an image is read from, and how far apart its planes are there: `copy`, or the Linear.
  struct Image {
    const Element* from;
    int64_t pitch;
    Element* copy;  // null if there is none
  };

  Image image_of(int64_t image, Element* copy) const {
    if constexpr (std::is_same_v<T, Element>) {
      const int64_t pitch = work_.params.linear_stride.channel;
      const int64_t c_out = image % g_.groups * out_channels_;
      const T* from = work_.linear(image / g_.groups, c_out, slab_.out_first);
      // A segment may reach beyond the image's end, but not beyond the Linear's.
      const int64_t end = from - work_.linear(0, 0, 0) + (out_channels_ - 1) * pitch +
                          frame_.places() + frame_.width;
      if (in_place_ && end <= work_.params.features * g_.rows()) return {from, pitch, nullptr};
    }
    return {copy, plan_.pitch, copy};
  }

  // Copies a plane into its frame, if it is not read in place, and returns what conv_bias gives to
  // the row.
  double make_plane(int64_t image, int64_t plane, const Image& read) const {
    const int64_t f = image / g_.groups;
    const int64_t first = plane * kChannels;
    const int64_t channels = std::clamp<int64_t>(out_channels_ - first, 0, kChannels);
    const int64_t c_out = image % g_.groups * out_channels_ + first;
    if (read.copy != nullptr) copy_plane(f, c_out, channels, plane, read);
    const T* conv_bias = static_cast<const T*>(work_.params.conv_bias);
    const int64_t count = slab_.share.last - slab_.share.first;
    if (conv_bias == nullptr || count == 0) return 0;
    double total = 0;
    for (int64_t c = c_out; c < c_out + channels; ++c) {
      const double sum = sum_of(work_.linear(f, c, slab_.share.first), count);
      total += sum * static_cast<double>(static_cast<A>(conv_bias[c]));
    }
    return total;
  }

  void copy_plane(int64_t f, int64_t c_out, int64_t channels, int64_t plane,
                  const Image& image) const {
    const Geometry& g = slab_.geometry;
    Element* const to = image.copy + plane * image.pitch;
    const bool is_last = plane == shape_.planes - 1;
    Element* const end = is_last ? image.copy + plan_.size : to + image.pitch;
    if (channels == 0) {
      std::fill(to, end, Element{});
      return;
    }
    const int64_t step = work_.params.linear_stride.position;
    const T* from = work_.linear(f, c_out, slab_.out_first);
    if (frame_.is_gapless(g) && step == 1) {
      Element* const first = to + frame_.place({}, {});
      std::fill(to, first, Element{});
      engine_.copy(from, channels, g.out_positions(), first);
      std::fill(first + g.out_positions(), end, Element{});
      return;
    }
    std::fill(to, end, Element{});
    const int64_t count = g.axis[2].out;
    for (int64_t o0 = 0; o0 < g.axis[0].out; ++o0) {
      for (int64_t o1 = 0; o1 < g.axis[1].out; ++o1, from += count * step) {
        if (frame_.parts() == 1) {
          engine_.copy(from, channels, count, to + frame_.place({}, {{o0, o1, 0}}));
        } else {
          copy_in_parts(from, channels, o0, o1, count, to);
        }
      }
    }
  }

  // A line, but for the parts that no tap reads.
  void copy_in_parts(const T* from, int64_t channels, int64_t o0, int64_t o1, int64_t count,
                     Element* plane) const {
    const AxisFrame(&axis)[kAxes] = frame_.axis;
    const Position part = {{o0 % axis[0].parts, o1 % axis[1].parts, 0}};
    if (!axis[0].is_read(part.at[0]) || !axis[1].is_read(part.at[1])) return;
    Element* const to = plane + frame_.place(part, {{o0 / axis[0].parts, o1 / axis[1].parts, 0}});
    const int64_t parts = axis[2].parts;
    const int64_t step = work_.params.linear_stride.position;
    Element buffer[kAtATime];
    for (int64_t first = 0; first < count; first += kAtATime) {
      const int64_t some = std::min(kAtATime, count - first);
      const Element* line = engine_.converted(from + first * step, channels, some, buffer);
      // Where the pieces of a line begin need not be a multiple of `parts`: those from that part
      // on, then those before it.
      const int64_t whole = first / parts * parts;
      copy_parts(line, {first - whole, parts}, first - whole, some, to + whole / parts);
      copy_parts(line, {0, first - whole}, first - whole - parts, some, to + whole / parts + 1);
    }
  }

  // Of a piece of a line, some of the parts: part p has elements p - begin, and so on by parts.
  void copy_parts(const Element* line, Range parts, int64_t begin, int64_t count,
                  Element* to) const {
    const std::vector<int64_t>& read = frame_.axis[2].parts_read;
    const int64_t end = std::min(parts.last, begin + count);
    for (auto part = std::lower_bound(read.begin(), read.end(), parts.first);
         part != read.end() && *part < end; ++part) {
      Element* at = to + *part * frame_.part_places();
      for (int64_t n = *part - begin; n < count; n += frame_.axis[2].parts) *at++ = line[n];
    }
  }

  // Of neighbouring positions.
  double sum_of(const T* from, int64_t count) const {
    constexpr int64_t kApart = 16;
    const int64_t step = work_.params.linear_stride.position;
    A buffer[kAtATime];
    double total = 0;
    for (; count > 0; count -= kAtATime, from += kAtATime * step) {
      const int64_t some = std::min(count, kAtATime);
      const A* line = values_.converted(from, 1, some, buffer);
      A sums[kApart] = {};
      int64_t o = 0;
      for (; o + kApart <= some; o += kApart) {
        for (int64_t n = 0; n < kApart; ++n) sums[n] += line[o + n];
      }
      for (; o < some; ++o) sums[o % kApart] += line[o];
      for (const A sum : sums) total += static_cast<double>(sum);
    }
    return total;
  }

  // All segments of a block follow each other where the next one finds the image in a cache: the
  // result is then written a few channels at a time, in order.
  void multiply(int64_t image, const Image& read, Range segments) const {
    const typename Engine::Session session(engine_);
    const int64_t bytes =
        shape_.planes * frame_.places_read() * static_cast<int64_t>(sizeof(Element));
    const bool by_block = bytes <= (shape_.planes <= kFewPlanes ? kRereadBytes : kImageCacheBytes);
    const int64_t at_once = by_block ? 1 : shape_.blocks;
    for (int64_t block = 0; block < shape_.blocks; block += at_once) {
      for (int64_t n = segments.first; n < segments.last; ++n) {
        multiply_segment(image, read, frame_.segments[static_cast<size_t>(n)],
                         {block, block + at_once});
      }
    }
  }

  void multiply_segment(int64_t image, const Image& read, const Segment& segment,
                        Range blocks) const {
    alignas(64) A sums[Engine::kMostSums];
    const int64_t group = image % g_.groups;
    const Phase& phase = frame_.phases[segment.phase];
    const int64_t width = segment.vectors * shape_.lanes;
    const int64_t channel = work_.params.weight_stride.channel;
    T* const result = work_.result(image / g_.groups, group * in_channels_, slab_.in_first);
    const RunOfPlaces& run = frame_.runs[segment.first_run];
    const bool is_one_run = segment.last_run - segment.first_run == 1 && run.count == width;
    A* const in_result =
        is_one_run && engine_.sums_at_once(phase, width) ? sums_in(result, run) : nullptr;
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const int64_t start = block_start(block);
      const int64_t channels = block_start(block + 1) - start;
      engine_.multiply(read.from + segment.place, read.pitch, phase, weight_of(group, block),
                       channels, segment.vectors,
                       in_result != nullptr ? in_result + start * channel : sums,
                       in_result != nullptr ? channel : width);
      for (int64_t n = 0; in_result == nullptr && n < channels; ++n) {
        T* const to = result + (start + n) * channel;
        for (size_t r = segment.first_run; r < segment.last_run; ++r) {
          write_run(frame_.runs[r], sums + n * width, to);
        }
      }
    }
  }

  // Where a run may be summed in the result itself; null where it may not.
  A* sums_in(T* result, const RunOfPlaces& run) const {
    if constexpr (std::is_same_v<T, A>) {
      if (frame_.axis[2].step * work_.params.weight_stride.position == 1) {
        return result + run.position;
      }
    }
    return nullptr;
  }

  void write_run(const RunOfPlaces& run, const A* sums, T* to) const {
    const int64_t position = work_.params.weight_stride.position;
    const int64_t step = frame_.axis[2].step * position;
    T* at = to + run.position * position;
    const A* from = sums + run.lane;
    if (step > 1) {
      for (int64_t n = 0; n < run.count; ++n) at[n * step] = static_cast<T>(from[n]);
    } else if constexpr (std::is_same_v<T, A>) {
      std::memcpy(static_cast<void*>(at), from, static_cast<size_t>(run.count) * sizeof(T));
    } else {
      work_.turns.narrow(from, run.count, at);
    }
  }

  Work<T> work_;
  const Geometry& g_;
  const Engine engine_;
  const ImageVectors<T> values_{work_};  // of the Linear, for the bias
  const ImageShape shape_;
  const int64_t out_channels_;  // of a group, like the next
  const int64_t in_channels_;
  const ImagePlan plan_;
  const bool in_place_;
  PositionSlab slab_ = {};  // at hand, and its frame
  Frame frame_;
  Element* weight_ = nullptr;  // [group][block], as the engine packs them
  Element* image_ = nullptr;   // [image of the stage][plane][place]
  bool alone_ = false;
  int64_t stage_ = 1;  // images that are held at a time
};

// Without their signs, numbers are in the order of their bits: infinity and NaN come last.
template <typename T>
bool all_finite(const void* values, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t,
                                  std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;
  const auto infinity =
      std::bit_cast<Bits>(static_cast<T>(std::numeric_limits<Accumulate<T>>::infinity()));
  const T* from = static_cast<const T*>(values);
  Bits most = 0;
  for (int64_t n = 0; n < count; ++n) {
    const auto magnitude =
        static_cast<Bits>(std::bit_cast<Bits>(from[n]) & std::numeric_limits<Bits>::max());
    most = std::max(most, magnitude);
  }
  return most < infinity;
}

// What a row costs beside its products and segments.
template <typename T, typename Element>
double cost_of_row(const FuseConvLinearParams& params, const Frame& frame, const ImageShape& shape,
                   const RowWeights& weights) {
  const Geometry& g = params.geometry;
  const auto lanes = static_cast<double>(shape.lanes);
  const auto rows = static_cast<double>(g.groups * shape.planes * g.out_positions());
  const auto cols = static_cast<double>(g.cols());
  const bool in_place = is_read_in_place<T, Element>(g, shape);
  double row = (in_place ? weights.in_place : weights.framed) * rows / lanes;
  if (!frame.is_gapless(g)) row += weights.line * rows / static_cast<double>(g.axis[2].out);
  if (frame.parts() > 1) {
    const double read =
        std::min(rows, static_cast<double>(g.groups * shape.planes) * valid_taps(g));
    row += weights.part * read + weights.part_line * read / static_cast<double>(g.axis[2].in);
  }
  const bool is_scattered = frame.axis[2].step * params.weight_stride.position > 1;
  if (is_scattered) row += weights.scattered * cols;
  if (g.kernel_positions() > 1) {
    row += weights.line * cols / static_cast<double>(g.axis[2].in);
    const bool is_far = params.features * g.cols() >= kFarBytes / static_cast<int64_t>(sizeof(T));
    if (is_far) row += weights.far * cols / lanes;
  }
  return row;
}

// At most, what the segments of all slabs take: in a line of a phase, their runs end.
double list_bytes(const Geometry& g, const Frame& frame, const Counts& counts) {
  const double lines = static_cast<double>(g.in_positions() / g.axis[2].in) *
                       static_cast<double>(frame.axis[2].step);
  return counts.segments * double{sizeof(Segment) + sizeof(RunOfPlaces)} +
         lines * double{sizeof(RunOfPlaces)};
}

// Whatever the rows cost.
double fixed_cost(const Geometry& g, const RowWeights& weights) {
  return weights.launch + weights.repacked * static_cast<double>(weights_of(g));
}

// By an engine; `product` says what the products and segments of a row cost.
template <typename T, typename Engine, typename Product>
double cost(const FuseConvLinearParams& params, const RowWeights& weights, const Product& product) {
  using Element = typename Engine::Element;
  const Geometry& g = params.geometry;
  const ImageShape shape = Engine::shape(g);
  if (g.groups * shape.blocks * shape.weights > kMostWeightBytes / shape.element_bytes) {
    return kNever;
  }
  const ImagePlan plan = make_image_plan(g, shape);
  if (!plan.fits) return kNever;
  const Frame frame(g, shape.lanes, plan.vectors);
  const Counts counts = frame.counts();
  if (list_bytes(g, frame, counts) > kMostListBytes) return kNever;
  const double row =
      product(plan, shape, counts) + cost_of_row<T, Element>(params, frame, shape, weights);
  return fixed_cost(g, weights) + row * static_cast<double>(params.features);
}

template <typename T>
double vectors_cost(const FuseConvLinearParams& params) {
  const Geometry& g = params.geometry;
  const Weights& weights = kWeights.now();
  const auto product = [&](const ImagePlan& plan, const ImageShape& shape, const Counts& counts) {
    const TileSet<Accumulate<T>>& tiles = simd_kernels(simd_level());
    const Tiling tiling(tiles, plan.vectors, g.in_channels_per_group());
    const auto channels = static_cast<double>(g.in_channels);
    const double products = counts.products / static_cast<double>(shape.lanes) * channels *
                            static_cast<double>(g.out_channels_per_group());
    return products * (1 + weights.load / tiling.columns) +
           weights.segment * counts.segments * channels / tiling.columns;
  };
  return cost<T, ImageVectors<T>>(params, weights.row, product);
}

template <typename T>
double tiles_cost(const FuseConvLinearParams& params) {
  const Geometry& g = params.geometry;
  const TileWeights& weights = kTileWeights;
  const auto product = [&](const ImagePlan&, const ImageShape& shape, const Counts& counts) {
    const TileCut<T> cut(g);
    const auto blocks = static_cast<double>(g.groups * cut.blocks);
    const double vectors = counts.products / static_cast<double>(shape.lanes);
    const double part =
        weights.product * static_cast<double>(AmxPairs<T>::kFactors * cut.columns()) +
        weights.load * static_cast<double>(cut.depth);
    return blocks * (vectors * static_cast<double>(cut.parts) * part +
                     weights.segment * counts.segments * static_cast<double>(cut.columns()));
  };
  return cost<T, ImageTiles<T>>(params, weights.row, product);
}

}  // namespace

double least_by_position(const FuseConvLinearParams& params) {
  return fixed_cost(params.geometry, kWeights.now().row);
}

double cost_by_position(const FuseConvLinearParams& params) {
  if (params.geometry.taps_may_collide()) return kNever;
  return dispatch(params.dtype, [&](auto zero) { return vectors_cost<decltype(zero)>(params); });
}

double least_by_position_tiles(const FuseConvLinearParams& params) {
  return fixed_cost(params.geometry, kTileWeights.row);
}

double cost_by_position_tiles(const FuseConvLinearParams& params) {
  if (params.geometry.taps_may_collide() || !fits_matrix_tiles(params)) return kNever;
  return dispatch(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) return tiles_cost<T>(params);
    return kNever;
  });
}

bool takes_by_position(const FuseConvLinearParams& params) {
  const Geometry& g = params.geometry;
  return dispatch(params.dtype, [&](auto zero) {
    return all_finite<decltype(zero)>(
        params.conv_weight, g.out_channels * g.in_channels_per_group() * g.kernel_positions());
  });
}

void fuse_conv_linear_by_position(const FuseConvLinearParams& params,
                                  const ParallelFor& parallel_for, const Allocate& allocate) {
  dispatch(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    ByPosition<T, ImageVectors<T>>(params, parallel_for, allocate).run();
  });
}

void fuse_conv_linear_by_position_tiles(const FuseConvLinearParams& params,
                                        const ParallelFor& parallel_for, const Allocate& allocate) {
  dispatch(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      ByPosition<T, ImageTiles<T>>(params, parallel_for, allocate).run();
    }
  });
}

}  // namespace linfuse
