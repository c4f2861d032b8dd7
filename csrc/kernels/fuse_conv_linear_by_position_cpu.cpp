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
// image_frame.h has the other words.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "fuse_conv_linear_by_position.h"
#include "fuse_conv_linear_cost.h"
#include "fuse_conv_linear_engines.h"
#include "image_frame.h"

namespace linfuse {
namespace {

// Two thirds of the second-level cache of a current server, and how many keep a thread busy.
constexpr int64_t kOwnImageBytes = int64_t{11} << 17;
constexpr int64_t kLeastImages = 3;
constexpr int64_t kUnitsPerThread = 8;
// Of its image, that a thread reads again for each block, from the second-level cache: not of many
// channels, as each is a place of its own there.
constexpr int64_t kRereadBytes = int64_t{192} << 10;
constexpr int64_t kFewChannels = 32;
// About half of a core's first-level cache.
constexpr int64_t kCacheBytes = int64_t{24} << 10;
// A result of so much is beyond all caches.
constexpr int64_t kFarBytes = int64_t{1} << 26;
// What it costs beside its products (fuse_conv_linear_cost.h).
struct Weights {
  double load;       // a vector that a tile reads, as most lie across lines of memory
  double segment;    // a block of one
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
constexpr Measured<Weights> kWeights = {
    .narrow = {.load = 0.8,
               .segment = 220,
               .framed = 20,
               .in_place = 12,
               .part = 2.5,
               .part_line = 19,
               .scattered = 3.5,
               .line = 30,
               .far = 28,
               .repacked = 0,
               .launch = 57e4},
    .wide = {.load = 1.5,
             .segment = 420,
             .framed = 29,
             .in_place = 20,
             .part = 2.8,
             .part_line = 32,
             .scattered = 4.6,
             .line = 20,
             .far = 67,
             .repacked = 20,
             .launch = 44e4},
};
// Bytes from channel to channel that leave too few sets of a cache to a segment.
constexpr int64_t kCrowded = 1024;
// Elements of a line that are converted at a time.
constexpr int64_t kAtATime = 256;

// Whether input and output positions are the same, and each is tied to itself alone.
bool is_pointwise(const Geometry& g) {
  return std::all_of(g.axis, g.axis + kAxes, [](const Axis& axis) {
    return axis.kernel == 1 && axis.stride == 1 && axis.pad_low == 0 && axis.in == axis.out;
  });
}

// Whether images may be read where a matrix has them. What lies elsewhere is copied, but goes the
// same way: the bits must not depend on it.
template <typename T>
bool is_read_in_place(const Geometry& g) {
  const TileSet<Accumulate<T>>& tiles = simd_kernels(simd_level());
  const bool is_read_once = g.in_channels_per_group() <= tiles.most_channels;
  return std::is_same_v<T, Accumulate<T>> && is_pointwise(g) &&
         (is_read_once || g.out_positions() * static_cast<int64_t>(sizeof(T)) % kCrowded != 0);
}

template <typename T>
class ByPosition {
  using A = Accumulate<T>;

 public:
  ByPosition(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
             const Allocate& allocate)
      : work_(params, parallel_for),
        g_(work_.g),
        out_channels_(g_.out_channels_per_group()),
        in_channels_(g_.in_channels_per_group()),
        blocks_(divide_up(in_channels_, work_.tiles.most_channels)),
        plan_(make_image_plan<A>(g_, work_.tiles)),
        in_place_(is_read_in_place<T>(g_) && params.linear_stride.position == 1 &&
                  params.linear_stride.channel == g_.out_positions() &&
                  params.linear_stride.row == g_.rows()) {
    const int64_t image_bytes = plan_.size * int64_t{sizeof(A)};
    alone_ = image_bytes <= kOwnImageBytes && images() >= kLeastImages * params.threads;
    stage_ = alone_ ? std::min<int64_t>(params.threads, kMostScratchBytes / image_bytes)
                    : std::clamp<int64_t>(ImagePlan::kMostBytes / image_bytes, 1, images());
    const int64_t weight_bytes =
        aligned(g_.groups * group_weights() * static_cast<int64_t>(sizeof(A)));
    weight_ = reinterpret_cast<A*>(allocate(weight_bytes + stage_ * image_bytes));
    advise_huge_pages(weight_, weight_bytes + stage_ * image_bytes);
    image_ = reinterpret_cast<A*>(reinterpret_cast<char*>(weight_) + weight_bytes);
    work_.make_parts(alone_ ? images() : stage_ * out_channels_, 1);
  }

  void run() {
    pack_weight();
    for (int64_t number = 0; number < plan_.slabs.count; ++number) {
      slab_ = make_position_slab(g_, plan_.slabs, number);
      frame_ = Frame(slab_.geometry, work_.tiles.lanes, plan_.vectors);
      frame_.list(slab_.geometry);
      alone_ ? run_alone() : run_together();
    }
    work_.write_bias();
  }

 private:
  int64_t images() const { return work_.params.features * g_.groups; }
  int64_t block_start(int64_t block) const { return block * in_channels_ / blocks_; }
  int64_t group_weights() const { return g_.kernel_positions() * out_channels_ * in_channels_; }

  void pack_weight() const {
    const int64_t tasks = tasks_of_weight(g_);
    const int64_t count = g_.groups * blocks_ * tasks;
    for_each(work_.parallel_for, count, group_weights() / blocks_ / tasks, [&](int64_t n) {
      const int64_t group = n / tasks / blocks_;
      const int64_t block = n / tasks % blocks_;
      const int64_t task = n % tasks;
      const int64_t start = block_start(block);
      const int64_t channels = block_start(block + 1) - start;
      pack_channels(work_, group * out_channels_,
                    {task * out_channels_ / tasks, (task + 1) * out_channels_ / tasks}, start,
                    channels, channels, weight_of(group, block));
    });
  }

  A* weight_of(int64_t group, int64_t block) const {
    return weight_ + group * group_weights() +
           block_start(block) * g_.kernel_positions() * out_channels_;
  }

  // An image for each thread at a time, which stays in its cache.
  void run_alone() {
    const auto segments = static_cast<int64_t>(frame_.segments.size());
    work_.share(images(), group_weights() * g_.in_positions(), stage_,
                [&](int64_t thread, int64_t image) {
                  const Image read = image_of(image, image_ + thread * plan_.size);
                  double* sum = work_.start_part(image);
                  for (int64_t c = 0; c < out_channels_; ++c) {
                    const double of_channel = make_channel(image, c, read);
                    if (sum != nullptr) *sum += of_channel;
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
      for_each(work_.parallel_for, count * out_channels_, plan_.pitch, [&](int64_t n) {
        const int64_t image = n / out_channels_;
        double* sum = work_.start_part(n);
        const double of_channel = make_channel(
            first + image, n % out_channels_, image_of(first + image, image_ + image * plan_.size));
        if (sum != nullptr) *sum = of_channel;
      });
      for (int64_t n = 0; n < count; ++n) {
        const Range channels = {n * out_channels_, (n + 1) * out_channels_};
        work_.add_parts({(first + n) / g_.groups, 1, 1, 1}, channels);
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

  // What an image is read from, and how far apart its channels are there: `copy`, or the Linear.
  struct Image {
    const A* from;
    int64_t pitch;
    A* copy;  // null if there is none
  };

  Image image_of(int64_t image, A* copy) const {
    if constexpr (std::is_same_v<T, A>) {
      const int64_t pitch = work_.params.linear_stride.channel;
      const int64_t c_out = image % g_.groups * out_channels_;
      const A* from = work_.linear(image / g_.groups, c_out, slab_.out_first);
      // A segment may reach beyond the image's end, but not beyond the Linear's.
      const int64_t end = from - work_.linear(0, 0, 0) + (out_channels_ - 1) * pitch +
                          frame_.places() + frame_.width;
      if (in_place_ && end <= work_.params.features * g_.rows()) return {from, pitch, nullptr};
    }
    return {copy, plan_.pitch, copy};
  }

  // Copies an output channel of a group into its frame, if it is not read in place, and returns
  // what conv_bias gives to the row.
  double make_channel(int64_t image, int64_t channel, const Image& read) const {
    const int64_t f = image / g_.groups;
    const int64_t c_out = image % g_.groups * out_channels_ + channel;
    const int64_t step = work_.params.linear_stride.position;
    if (read.copy != nullptr) copy_channel(work_.linear(f, c_out, slab_.out_first), channel, read);
    const T* conv_bias = static_cast<const T*>(work_.params.conv_bias);
    const int64_t count = slab_.share.last - slab_.share.first;
    if (conv_bias == nullptr || count == 0) return 0;
    const double sum = sum_of(work_.linear(f, c_out, slab_.share.first), step, count);
    return sum * static_cast<double>(static_cast<A>(conv_bias[c_out]));
  }

  void copy_channel(const T* from, int64_t channel, const Image& image) const {
    const Geometry& g = slab_.geometry;
    const int64_t step = work_.params.linear_stride.position;
    A* const to = image.copy + channel * image.pitch;
    const bool is_last = channel == out_channels_ - 1;
    A* const end = is_last ? image.copy + plan_.size : to + image.pitch;
    if (frame_.is_gapless(g) && step == 1) {
      A* const first = to + frame_.place({}, {});
      std::fill(to, first, A{});
      work_.turns.widen(from, g.out_positions(), first);
      std::fill(first + g.out_positions(), end, A{});
      return;
    }
    std::fill(to, end, A{});
    const int64_t count = g.axis[2].out;
    for (int64_t o0 = 0; o0 < g.axis[0].out; ++o0) {
      for (int64_t o1 = 0; o1 < g.axis[1].out; ++o1, from += count * step) {
        if (frame_.parts() == 1) {
          widen(from, step, count, to + frame_.place({}, {{o0, o1, 0}}));
        } else {
          copy_in_parts(from, step, o0, o1, count, to);
        }
      }
    }
  }

  // A line, but for the parts that no tap reads.
  void copy_in_parts(const T* from, int64_t step, int64_t o0, int64_t o1, int64_t count,
                     A* image) const {
    const AxisFrame(&axis)[kAxes] = frame_.axis;
    const Position part = {{o0 % axis[0].parts, o1 % axis[1].parts, 0}};
    if (!axis[0].is_read(part.at[0]) || !axis[1].is_read(part.at[1])) return;
    A* const to = image + frame_.place(part, {{o0 / axis[0].parts, o1 / axis[1].parts, 0}});
    const int64_t parts = axis[2].parts;
    A buffer[kAtATime];
    for (int64_t first = 0; first < count; first += kAtATime) {
      const int64_t some = std::min(kAtATime, count - first);
      const A* line = widened(from + first * step, step, some, buffer);
      // Where the pieces of a line begin need not be a multiple of `parts`: those from that part
      // on, then those before it.
      const int64_t whole = first / parts * parts;
      copy_parts(line, {first - whole, parts}, first - whole, some, to + whole / parts);
      copy_parts(line, {0, first - whole}, first - whole - parts, some, to + whole / parts + 1);
    }
  }

  // Of a piece of a line, some of the parts: part p has elements p - begin, and so on by parts.
  void copy_parts(const A* line, Range parts, int64_t begin, int64_t count, A* to) const {
    const std::vector<int64_t>& read = frame_.axis[2].parts_read;
    const int64_t end = std::min(parts.last, begin + count);
    for (auto part = std::lower_bound(read.begin(), read.end(), parts.first);
         part != read.end() && *part < end; ++part) {
      A* at = to + *part * frame_.part_places();
      for (int64_t n = *part - begin; n < count; n += frame_.axis[2].parts) *at++ = line[n];
    }
  }

  void widen(const T* from, int64_t step, int64_t count, A* to) const {
    // A short line that needs no conversion is copied sooner than a function is called.
    constexpr int64_t kShort = std::is_same_v<T, A> ? 32 : 0;
    if (step == 1 && count > kShort) {
      work_.turns.widen(from, count, to);
      return;
    }
    for (int64_t n = 0; n < count; ++n) to[n] = static_cast<A>(from[n * step]);
  }

  // `from` itself where nothing is to be converted, else `buffer`.
  const A* widened(const T* from, int64_t step, int64_t count, A* buffer) const {
    if constexpr (std::is_same_v<T, A>) {
      if (step == 1) return from;
    }
    widen(from, step, count, buffer);
    return buffer;
  }

  double sum_of(const T* from, int64_t step, int64_t count) const {
    constexpr int64_t kApart = 16;
    A buffer[kAtATime];
    double total = 0;
    for (; count > 0; count -= kAtATime, from += kAtATime * step) {
      const int64_t some = std::min(count, kAtATime);
      const A* line = widened(from, step, some, buffer);
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
    const int64_t bytes = out_channels_ * frame_.places_read() * static_cast<int64_t>(sizeof(A));
    const bool by_block = bytes <= (out_channels_ <= kFewChannels ? kRereadBytes : kCacheBytes);
    const int64_t at_once = by_block ? 1 : blocks_;
    for (int64_t block = 0; block < blocks_; block += at_once) {
      for (int64_t n = segments.first; n < segments.last; ++n) {
        multiply_segment(image, read, frame_.segments[static_cast<size_t>(n)],
                         {block, block + at_once});
      }
    }
  }

  void multiply_segment(int64_t image, const Image& read, const Segment& segment,
                        Range blocks) const {
    constexpr int kMost = TileSet<A>::kMostVectors * TileSet<A>::kMostChannels;
    alignas(64) A sums[kMost * TileSet<A>::kMostLanes];
    alignas(64) A more[kMost * TileSet<A>::kMostLanes];
    const int64_t group = image % g_.groups;
    const Phase& phase = frame_.phases[segment.phase];
    TileTask<A> task = {};
    task.linear_start = phase.place.data();
    task.linear_line = read.pitch;
    const int64_t width = segment.vectors * frame_.lanes;
    T* const result = work_.result(image / g_.groups, group * in_channels_, slab_.in_first);
    task.kernel = phase.k.data();
    task.taps = static_cast<int64_t>(phase.k.size());
    const int64_t at_once =
        task.taps == 1
            ? out_channels_
            : std::max<int64_t>(1, kCacheBytes / (width * static_cast<int64_t>(sizeof(A))));
    const RunOfPlaces& run = frame_.runs[segment.first_run];
    const bool is_one_run = segment.last_run - segment.first_run == 1 && run.count == width;
    A* const in_result = is_one_run && at_once >= out_channels_ ? sums_in(result, run) : nullptr;
    task.tile_line = in_result != nullptr ? work_.params.weight_stride.channel : width;
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const int64_t start = block_start(block);
      const int64_t channels = block_start(block + 1) - start;
      A* const tile = in_result != nullptr ? in_result + start * task.tile_line : sums;
      task.weight_line = channels;
      task.weight_step = out_channels_ * channels;
      // Few enough output channels at a time to stay in the first-level cache for all taps.
      for (int64_t c = 0; c < out_channels_; c += at_once) {
        task.linear = read.from + c * read.pitch + segment.place;
        task.weight = weight_of(group, block) + c * channels;
        task.channels = std::min(at_once, out_channels_ - c);
        work_.tiles.tile[segment.vectors][channels](task, c == 0 ? tile : more);
        for (int64_t n = 0; c > 0 && n < channels * width; ++n) sums[n] += more[n];
      }
      for (int64_t n = 0; in_result == nullptr && n < channels; ++n) {
        T* const to = result + (start + n) * work_.params.weight_stride.channel;
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
  const int64_t out_channels_;  // of a group, like the next two
  const int64_t in_channels_;
  const int64_t blocks_;
  const ImagePlan plan_;
  const bool in_place_;
  PositionSlab slab_ = {};  // at hand, and its frame
  Frame frame_;
  A* weight_ = nullptr;  // [group][block][k][c_out][c_in of the block]
  A* image_ = nullptr;   // [image of the stage][c_out][place]
  bool alone_ = false;
  int64_t stage_ = 1;  // images that are held at a time
};

template <typename T>
bool all_finite(const void* values, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  const auto exponent =
      std::bit_cast<Bits>(static_cast<T>(std::numeric_limits<Accumulate<T>>::infinity()));
  const T* from = static_cast<const T*>(values);
  Bits found = 0;
  for (int64_t n = 0; n < count; ++n) {
    found |= static_cast<Bits>((std::bit_cast<Bits>(from[n]) & exponent) == exponent);
  }
  return found == 0;
}

template <typename T>
double cost(const FuseConvLinearParams& params) {
  using A = Accumulate<T>;
  const Geometry& g = params.geometry;
  const TileSet<A>& tiles = simd_kernels(simd_level());
  if (weights_of(g) * static_cast<int64_t>(sizeof(A)) > kMostWeightBytes) return kNever;
  const ImagePlan plan = make_image_plan<A>(g, tiles);
  if (!plan.fits) return kNever;

  const Frame frame(g, tiles.lanes, plan.vectors);
  const auto lanes = static_cast<double>(tiles.lanes);
  const auto rows = static_cast<double>(g.rows());
  const auto cols = static_cast<double>(g.cols());
  const auto channels = static_cast<double>(g.in_channels);
  const Tiling tiling(tiles, plan.vectors, g.in_channels_per_group());
  const Counts counts = frame.counts();
  const Weights& weights = kWeights.now();
  const double products =
      counts.products / lanes * channels * static_cast<double>(g.out_channels_per_group());
  double row = products * (1 + weights.load / tiling.columns) +
               weights.segment * counts.segments * channels / tiling.columns;
  row += (is_read_in_place<T>(g) ? weights.in_place : weights.framed) * rows / lanes;
  if (!frame.is_gapless(g)) row += weights.line * rows / static_cast<double>(g.axis[2].out);
  if (frame.parts() > 1) {
    const double read = std::min(rows, static_cast<double>(g.out_channels) * valid_taps(g));
    row += weights.part * read + weights.part_line * read / static_cast<double>(g.axis[2].in);
  }
  const bool is_scattered = frame.axis[2].step * params.weight_stride.position > 1;
  if (is_scattered) row += weights.scattered * cols;
  if (g.kernel_positions() > 1) {
    row += weights.line * cols / static_cast<double>(g.axis[2].in);
    const bool is_far = params.features * g.cols() >= kFarBytes / static_cast<int64_t>(sizeof(T));
    if (is_far) row += weights.far * cols / lanes;
  }
  return weights.launch + weights.repacked * static_cast<double>(weights_of(g)) +
         row * static_cast<double>(params.features);
}

}  // namespace

double cost_by_position(const FuseConvLinearParams& params) {
  if (params.geometry.taps_may_collide()) return kNever;
  return dispatch(params.dtype, [&](auto zero) { return cost<decltype(zero)>(params); });
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
  dispatch(params.dtype,
           [&](auto zero) { ByPosition<decltype(zero)>(params, parallel_for, allocate).run(); });
}

}  // namespace linfuse
