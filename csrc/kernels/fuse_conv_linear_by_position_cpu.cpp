// fused[f, (c_in, i)] = sum over the taps (o, k) of i and over c_out of
//                       linear[f, (c_out, o)] * weight[c_out, c_in, k]
//
// For few rows f, which would leave most lanes of a vector empty: here neighbouring input positions
// fill it. A row of the Linear is a set of images, which need not be turned, only framed.
//
//   slab     a range of input positions on one axis (slab.h), if all are too many for an image
//   image    the output positions of one row and group that a slab reads, [c_out][place], with
//            zeros around them
//   place    where a position lies in the image
//   phase    the input positions that have the same remainder by the stride, on every axis: they
//            have the same taps, each of which reads neighbouring places for neighbours of a phase
//   segment  neighbouring places of a phase, as many as a tile (tile.h) holds
//   unit     neighbouring segments of an image: what a thread takes
//
// With zeros where a tap falls off the output, all places of a segment have all taps. The lines of
// a phase follow one another with the gaps of the frame, and what is computed for a gap is dropped.
// A transposed convolution has its phases in the image, as its output positions are the fine ones.
#include <cmath>
#include <cstring>
#include <numeric>

#include "fuse_conv_linear_by_position.h"
#include "fuse_conv_linear_engines.h"

namespace linfuse {
namespace {

constexpr int64_t kStageBytes = int64_t{16} << 20;
// Two thirds of the second-level cache of a current server, and how many keep a thread busy.
constexpr int64_t kOwnImageBytes = int64_t{11} << 17;
constexpr int64_t kLeastImages = 3;
constexpr int64_t kMostWeightBytes = int64_t{16} << 20;
constexpr int64_t kUnitsPerThread = 8;
// About half of a core's first-level cache.
constexpr int64_t kCacheBytes = int64_t{24} << 10;
// Rows that fill their vectors themselves are better turned.
constexpr int64_t kMostRows = 16;
// Of the lanes, that hold a position: below it other ways win.
constexpr double kLeastFilled = 0.4;

// A kernel element that positions of a phase have.
struct AxisTap {
  int64_t k;
  int64_t part;   // of the output positions
  int64_t steps;  // from the first of them to what the first of the phase reads
};

struct AxisPhase {
  int64_t first;  // input position
  int64_t count;
  std::vector<AxisTap> taps;
};

// An axis of the images, and its phases.
struct AxisFrame {
  int64_t step;   // from one input position of a phase to the next
  int64_t parts;  // that output positions are split into, by their remainder
  int64_t low;    // places of a part before its first output position
  int64_t pitch;  // places of a part
  std::vector<AxisPhase> phases;
};

AxisFrame make_frame(const Geometry& g, int a) {
  const Axis& axis = g.axis[a];
  AxisFrame frame = {};
  frame.step = g.transposed ? 1 : axis.stride;
  frame.parts = g.transposed ? axis.stride : 1;
  const int64_t outs = divide_up(axis.out, frame.parts);
  int64_t high = 0;  // places read behind the last output position
  int64_t most_in = 0;
  for (int64_t first = 0; first < std::min(frame.step, axis.in); ++first) {
    AxisPhase phase = {first, divide_up(axis.in - first, frame.step), {}};
    for (int64_t k = 0; k < axis.kernel; ++k) {
      // What the first of the phase reads: an output position times the stride, or of it a part.
      const int64_t reach = g.transposed ? k * axis.dilation - axis.pad_low
                                         : first + axis.pad_low - k * axis.dilation;
      const int64_t rest = (reach % axis.stride + axis.stride) % axis.stride;
      const int64_t steps = (reach - rest) / axis.stride;
      if (!g.transposed && rest != 0) continue;
      if (steps + phase.count <= 0 || steps >= outs) continue;  // all of it falls off
      frame.low = std::max(frame.low, -steps);
      high = std::max(high, steps + phase.count - outs);
      phase.taps.push_back({k, rest, steps});
    }
    most_in = std::max(most_in, phase.count);
    frame.phases.push_back(std::move(phase));
  }
  // What lies behind a line lies before the next one. Those of a phase must not meet.
  frame.pitch = std::max(outs + std::max(frame.low, high), most_in);
  return frame;
}

// Neighbours in a segment that are positions, one behind the other on the innermost axis.
struct RunOfPlaces {
  int64_t lane;
  int64_t count;
  int64_t position;  // of the input
};

struct Segment {
  size_t phase;
  int64_t place;  // from the phase's first
  size_t first_run;
  size_t last_run;
};

// The taps of a phase, as a tile wants them.
struct Phase {
  std::vector<int64_t> place;
  std::vector<int64_t> k;
};

struct Frame {
  AxisFrame axis[kAxes] = {};
  int64_t width = 0;  // lanes of a segment
  std::vector<Phase> phases;
  std::vector<Segment> segments;
  std::vector<RunOfPlaces> runs;

  Frame() = default;
  Frame(const Geometry& g, int64_t width) : width(width) {
    for (int a = 0; a < kAxes; ++a) axis[a] = make_frame(g, a);
  }

  int64_t part_places() const { return axis[0].pitch * axis[1].pitch * axis[2].pitch; }
  int64_t parts() const { return axis[0].parts * axis[1].parts * axis[2].parts; }
  int64_t places() const { return parts() * part_places(); }

  // One part lies behind the other, and in each one line behind the other.
  int64_t place(const Position& part, const Position& within) const {
    const int64_t number = (part.at[0] * axis[1].parts + part.at[1]) * axis[2].parts + part.at[2];
    const int64_t line = (within.at[0] + axis[0].low) * axis[1].pitch + within.at[1] + axis[1].low;
    return number * part_places() + line * axis[2].pitch + within.at[2] + axis[2].low;
  }

  // From the first place of a phase to behind its last, gaps included.
  int64_t span(const AxisPhase& p0, const AxisPhase& p1, const AxisPhase& p2) const {
    return ((p0.count - 1) * axis[1].pitch + p1.count - 1) * axis[2].pitch + p2.count;
  }

  // Lanes of all segments, over the positions that they hold.
  double filled(const Geometry& g) const {
    double lanes = 0;
    for_each_phase([&](const AxisPhase& p0, const AxisPhase& p1, const AxisPhase& p2) {
      lanes += static_cast<double>(divide_up(span(p0, p1, p2), width) * width);
    });
    return static_cast<double>(g.in_positions()) / lanes;
  }

  void list(const Geometry& g) {
    for_each_phase([&](const AxisPhase& p0, const AxisPhase& p1, const AxisPhase& p2) {
      list_taps(g, p0, p1, p2);
      const int64_t all = span(p0, p1, p2);
      for (int64_t place = 0; place < all; place += width) {
        const size_t first = runs.size();
        list_runs(g, p0, p1, p2, place, std::min(all, place + width));
        // A segment may be a gap.
        if (runs.size() > first) segments.push_back({phases.size() - 1, place, first, runs.size()});
      }
    });
  }

 private:
  template <typename Visitor>
  void for_each_phase(const Visitor& visit) const {
    for (const AxisPhase& p0 : axis[0].phases) {
      for (const AxisPhase& p1 : axis[1].phases) {
        for (const AxisPhase& p2 : axis[2].phases) visit(p0, p1, p2);
      }
    }
  }

  void list_taps(const Geometry& g, const AxisPhase& p0, const AxisPhase& p1, const AxisPhase& p2) {
    Phase phase;
    for (const AxisTap& t0 : p0.taps) {
      for (const AxisTap& t1 : p1.taps) {
        const int64_t k_line = (t0.k * g.axis[1].kernel + t1.k) * g.axis[2].kernel;
        for (const AxisTap& t2 : p2.taps) {
          phase.place.push_back(
              place({{t0.part, t1.part, t2.part}}, {{t0.steps, t1.steps, t2.steps}}));
          phase.k.push_back(k_line + t2.k);
        }
      }
    }
    phases.push_back(std::move(phase));
  }

  void list_runs(const Geometry& g, const AxisPhase& p0, const AxisPhase& p1, const AxisPhase& p2,
                 int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end;) {
      const int64_t at2 = place % axis[2].pitch;
      const int64_t line = place / axis[2].pitch;
      const int64_t at1 = line % axis[1].pitch;
      const int64_t at0 = line / axis[1].pitch;
      const int64_t next = std::min(end, (line + 1) * axis[2].pitch);
      if (at1 < p1.count && at2 < p2.count) {
        const int64_t i0 = p0.first + at0 * axis[0].step;
        const int64_t i1 = p1.first + at1 * axis[1].step;
        const int64_t i2 = p2.first + at2 * axis[2].step;
        runs.push_back({place - begin, std::min(next - place, p2.count - at2),
                        (i0 * g.axis[1].in + i1) * g.axis[2].in + i2});
      }
      place = next;
    }
  }
};

// A range of input positions as a convolution of its own.
struct PositionSlab {
  Geometry geometry;
  int64_t in_first;   // positions before it
  int64_t out_first;  // likewise, before those that it reads
  Range share;        // output positions whose bias it answers for
};

PositionSlab make_position_slab(const Geometry& g, const Slabs& slabs, int64_t number) {
  const int a = slabs.axis;
  const Range in = detail::range_of_slab(g, slabs, number);
  std::vector<int64_t> reads;
  detail::list_reads(g, a, in, reads);
  const Range outs = reads.empty() ? Range{0, 0} : Range{reads.front(), reads.back() + 1};
  const int64_t lines = g.axis[a].out;
  PositionSlab slab = {};
  slab.geometry = g;
  slab.in_first = in.first * inner_in(g, slabs);
  slab.out_first = outs.first * slabs.inner;
  slab.share = {number * lines / slabs.count * slabs.inner,
                (number + 1) * lines / slabs.count * slabs.inner};
  Axis& axis = slab.geometry.axis[a];
  axis.in = in.last - in.first;
  axis.out = outs.last - outs.first;
  // What ties the first ones together.
  axis.pad_low +=
      g.transposed ? outs.first - in.first * axis.stride : in.first - outs.first * axis.stride;
  return slab;
}

struct ImagePlan {
  int64_t vectors;  // of a tile
  Slabs slabs;
  int64_t pitch;  // from one channel of an image to the next
  int64_t size;   // elements of an image
};

// Slabs as large as images may be; of one position where none is small enough.
template <typename A>
ImagePlan make_plan(const Geometry& g, const TileSet<A>& tiles) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(A));
  // As many vectors as columns leave registers for, and no more than are filled.
  const int64_t blocks = divide_up(g.in_channels_per_group(), tiles.most_channels);
  const int64_t most_vectors = tiles.most_vectors(divide_up(g.in_channels_per_group(), blocks));
  ImagePlan plan = {};
  plan.vectors = std::min(most_vectors, divide_up(g.in_positions(), tiles.lanes));
  const int64_t width = plan.vectors * tiles.lanes;
  plan.slabs = one_slab(g);
  if (plan.slabs.outer > 1) {
    // What a slab reads shall be one piece.
    plan.slabs = {0, 1, g.axis[1].out * g.axis[2].out, 1, 1, 0};
  }
  Slabs& slabs = plan.slabs;
  for (;; slabs.length = divide_up(slabs.length, 2)) {
    slabs.count = divide_up(g.axis[slabs.axis].in, slabs.length);
    int64_t places = 0;
    for (int64_t number = 0; number < slabs.count; ++number) {
      const Frame frame(make_position_slab(g, slabs, number).geometry, width);
      places = std::max(places, frame.places());
    }
    // No power of two from channel to channel. Behind the last one, what its taps read beyond it.
    plan.pitch = divide_up(places, kLine) * kLine;
    if (plan.pitch % (16 * kLine) == 0) plan.pitch += kLine;
    plan.size = (g.out_channels_per_group() + 1) * plan.pitch + divide_up(width, kLine) * kLine;
    if (plan.size * static_cast<int64_t>(sizeof(A)) <= kStageBytes || slabs.length == 1) {
      return plan;
    }
  }
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
        plan_(make_plan<A>(g_, work_.tiles)) {
    const int64_t image_bytes = plan_.size * int64_t{sizeof(A)};
    alone_ = image_bytes <= kOwnImageBytes && images() >= kLeastImages * params.threads;
    stage_ = alone_ ? params.threads : std::clamp<int64_t>(kStageBytes / image_bytes, 1, images());
    const int64_t weight_bytes =
        aligned(g_.groups * group_weights() * static_cast<int64_t>(sizeof(A)));
    weight_ = reinterpret_cast<A*>(allocate(weight_bytes + stage_ * image_bytes));
    advise_huge_pages(weight_, weight_bytes + stage_ * image_bytes);
    image_ = reinterpret_cast<A*>(reinterpret_cast<char*>(weight_) + weight_bytes);
    work_.make_parts(images() * out_channels_, 1);
  }

  void run() {
    pack_weight();
    for (int64_t number = 0; number < plan_.slabs.count; ++number) {
      slab_ = make_position_slab(g_, plan_.slabs, number);
      frame_ = Frame(slab_.geometry, plan_.vectors * work_.tiles.lanes);
      frame_.list(slab_.geometry);
      alone_ ? run_alone() : run_together();
      for (int64_t n = 0; n < images() * out_channels_; ++n) {
        work_.add_part({n / out_channels_ / g_.groups, 1, 1, 1}, n);
      }
    }
    work_.write_bias();
  }

 private:
  int64_t images() const { return work_.params.features * g_.groups; }
  int64_t block_start(int64_t block) const { return block * in_channels_ / blocks_; }
  int64_t group_weights() const { return g_.kernel_positions() * out_channels_ * in_channels_; }

  void pack_weight() const {
    for_each(work_.parallel_for, g_.groups * blocks_, group_weights() / blocks_, [&](int64_t n) {
      const int64_t group = n / blocks_;
      const int64_t start = block_start(n % blocks_);
      const int64_t channels = block_start(n % blocks_ + 1) - start;
      pack_channels(work_, group * out_channels_, start, channels, channels,
                    weight_of(group, n % blocks_));
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
                  A* own = image_ + thread * plan_.size;
                  for (int64_t c = 0; c < out_channels_; ++c) make_channel(image, c, own);
                  multiply(image, own, {0, segments});
                });
  }

  // All threads share some images.
  void run_together() {
    const auto segments = static_cast<int64_t>(frame_.segments.size());
    for (int64_t first = 0; first < images(); first += stage_) {
      const int64_t count = std::min(stage_, images() - first);
      for_each(work_.parallel_for, count * out_channels_, plan_.pitch, [&](int64_t n) {
        const int64_t image = n / out_channels_;
        make_channel(first + image, n % out_channels_, image_ + image * plan_.size);
      });
      const int64_t threads = work_.params.threads;
      const int64_t strips = std::min(segments, divide_up(kUnitsPerThread * threads, count));
      const int64_t cost = divide_up(segments, strips) * frame_.width * group_weights();
      work_.share(count * strips, cost, threads, [&](int64_t, int64_t unit) {
        const int64_t image = unit / strips;
        const int64_t strip = unit % strips;
        multiply(first + image, image_ + image * plan_.size,
                 {strip * segments / strips, (strip + 1) * segments / strips});
      });
    }
  }

  // Copies an output channel of a group into its frame, and adds up what conv_bias gives.
  void make_channel(int64_t image, int64_t channel, A* images) {
    const int64_t f = image / g_.groups;
    const int64_t c_out = image % g_.groups * out_channels_ + channel;
    const int64_t step = work_.params.linear_stride.position;
    double* sums = work_.start_part(image * out_channels_ + channel);
    A* to = images + channel * plan_.pitch;
    const bool is_last = channel == out_channels_ - 1;
    const int64_t places = is_last ? plan_.size - channel * plan_.pitch : plan_.pitch;
    std::memset(static_cast<void*>(to), 0, static_cast<size_t>(places) * sizeof(A));
    const T* from = work_.linear(f, c_out, slab_.out_first);
    for (int64_t o0 = 0; o0 < slab_.geometry.axis[0].out; ++o0) {
      for (int64_t o1 = 0; o1 < slab_.geometry.axis[1].out; ++o1) {
        copy_line(from, step, o0, o1, slab_.geometry.axis[2].out, to);
        from += slab_.geometry.axis[2].out * step;
      }
    }
    if (sums == nullptr) return;
    const T* conv_bias = static_cast<const T*>(work_.params.conv_bias);
    const T* share = work_.linear(f, c_out, slab_.share.first);
    *sums += sum_of(share, step, slab_.share.last - slab_.share.first) *
             static_cast<double>(static_cast<A>(conv_bias[c_out]));
  }

  // `o0` and `o1` count within the slab.
  void copy_line(const T* from, int64_t step, int64_t o0, int64_t o1, int64_t count,
                 A* image) const {
    const AxisFrame(&axis)[kAxes] = frame_.axis;
    const int64_t parts = axis[2].parts;
    if (frame_.parts() == 1) {
      A* to = image + frame_.place({}, {{o0, o1, 0}});
      for (int64_t n = 0; n < count; ++n) to[n] = static_cast<A>(from[n * step]);
      return;
    }
    for (int64_t part = 0; part < std::min(parts, count); ++part) {
      A* to = image + frame_.place({{o0 % axis[0].parts, o1 % axis[1].parts, part}},
                                   {{o0 / axis[0].parts, o1 / axis[1].parts, 0}});
      const T* at = from + part * step;
      const int64_t some = divide_up(count - part, parts);
      for (int64_t n = 0; n < some; ++n) to[n] = static_cast<A>(at[n * parts * step]);
    }
  }

  static double sum_of(const T* from, int64_t step, int64_t count) {
    constexpr int64_t kApart = 16;
    constexpr int64_t kAtATime = 16 * kApart;
    double total = 0;
    for (; count > 0; count -= kAtATime, from += kAtATime * step) {
      const int64_t some = std::min(count, kAtATime);
      A sums[kApart] = {};
      int64_t o = 0;
      if (step == 1) {
        for (; o + kApart <= some; o += kApart) {
          for (int64_t n = 0; n < kApart; ++n) sums[n] += static_cast<A>(from[o + n]);
        }
      }
      for (; o < some; ++o) sums[o % kApart] += static_cast<A>(from[o * step]);
      for (const A sum : sums) total += static_cast<double>(sum);
    }
    return total;
  }

  void multiply(int64_t image, const A* from, Range segments) const {
    for (int64_t n = segments.first; n < segments.last; ++n) {
      multiply_segment(image, from, frame_.segments[static_cast<size_t>(n)]);
    }
  }

  void multiply_segment(int64_t image, const A* from, const Segment& segment) const {
    constexpr int kMost = TileSet<A>::kMostVectors * TileSet<A>::kMostChannels;
    alignas(64) A sums[kMost * TileSet<A>::kMostLanes];
    alignas(64) A more[kMost * TileSet<A>::kMostLanes];
    const int64_t group = image % g_.groups;
    const Phase& phase = frame_.phases[segment.phase];
    TileTask<A> task = {};
    task.linear_start = phase.place.data();
    task.linear_line = plan_.pitch;
    task.kernel = phase.k.data();
    task.taps = static_cast<int64_t>(phase.k.size());
    const int64_t at_once =
        std::max<int64_t>(1, kCacheBytes / (frame_.width * static_cast<int64_t>(sizeof(A))));
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t start = block_start(block);
      const int64_t channels = block_start(block + 1) - start;
      task.weight_line = channels;
      task.weight_step = out_channels_ * channels;
      // Few enough output channels at a time to stay in the first-level cache for all taps.
      for (int64_t c = 0; c < out_channels_; c += at_once) {
        task.linear = from + c * plan_.pitch + segment.place;
        task.weight = weight_of(group, block) + c * channels;
        task.channels = std::min(at_once, out_channels_ - c);
        work_.tiles.tile[plan_.vectors][channels](task, c == 0 ? sums : more);
        for (int64_t n = 0; c > 0 && n < channels * frame_.width; ++n) sums[n] += more[n];
      }
      for (int64_t n = 0; n < channels; ++n) {
        T* to = work_.result(image / g_.groups, group * in_channels_ + start + n, slab_.in_first);
        for (size_t r = segment.first_run; r < segment.last_run; ++r) {
          write_run(frame_.runs[r], sums + n * frame_.width, to);
        }
      }
    }
  }

  void write_run(const RunOfPlaces& run, const A* sums, T* to) const {
    const int64_t position = work_.params.weight_stride.position;
    const int64_t step = frame_.axis[2].step * position;
    T* at = to + run.position * position;
    const A* from = sums + run.lane;
    if (step == 1) {
      for (int64_t n = 0; n < run.count; ++n) at[n] = static_cast<T>(from[n]);
    } else {
      for (int64_t n = 0; n < run.count; ++n) at[n * step] = static_cast<T>(from[n]);
    }
  }

  Work<T> work_;
  const Geometry& g_;
  const int64_t out_channels_;  // of a group, like the next two
  const int64_t in_channels_;
  const int64_t blocks_;
  const ImagePlan plan_;
  PositionSlab slab_ = {};  // at hand, and its frame
  Frame frame_;
  A* weight_ = nullptr;  // [group][block][k][c_out][c_in of the block]
  A* image_ = nullptr;   // [image of the stage][c_out][place]
  bool alone_ = false;
  int64_t stage_ = 1;  // images that are held at a time
};

inline bool is_finite(float value) { return (detail::bits_of(value) & 0x7f800000) != 0x7f800000; }
inline bool is_finite(double value) { return std::isfinite(value); }
inline bool is_finite(Float16 value) { return (value.bits & 0x7c00) != 0x7c00; }
inline bool is_finite(BFloat16 value) { return (value.bits & 0x7f80) != 0x7f80; }

template <typename T>
bool all_finite(const void* values, int64_t count) {
  const T* from = static_cast<const T*>(values);
  bool finite = true;
  for (int64_t n = 0; n < count; ++n) finite &= is_finite(from[n]);
  return finite;
}

template <typename T>
bool fits(const FuseConvLinearParams& params) {
  using A = Accumulate<T>;
  constexpr int64_t kSize = sizeof(A);
  const Geometry& g = params.geometry;
  const TileSet<A>& tiles = simd_kernels(simd_level());
  const int64_t weights = g.out_channels * g.in_channels_per_group() * g.kernel_positions();
  if (weights * kSize > kMostWeightBytes) return false;
  const ImagePlan plan = make_plan<A>(g, tiles);
  if (plan.size * kSize > kStageBytes) return false;
  const Frame frame(g, plan.vectors * tiles.lanes);
  return frame.filled(g) >= kLeastFilled && all_finite<T>(params.conv_weight, weights);
}

}  // namespace

bool fits_by_position(const FuseConvLinearParams& params) {
  if (params.features > kMostRows || params.geometry.taps_may_collide() ||
      fits_matrix_tiles(params)) {
    return false;
  }
  return dispatch(params.dtype, [&](auto zero) { return fits<decltype(zero)>(params); });
}

void fuse_conv_linear_by_position(const FuseConvLinearParams& params,
                                  const ParallelFor& parallel_for, const Allocate& allocate) {
  dispatch(params.dtype,
           [&](auto zero) { ByPosition<decltype(zero)>(params, parallel_for, allocate).run(); });
}

}  // namespace linfuse
