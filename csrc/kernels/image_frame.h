// The Linear's rows as framed images: the words and plans of fuse_conv_linear_by_position_cpu.cpp.
//
//   slab     a range of input positions on one axis (slab.h), if all are too many for an image
//   image    the output positions of one row and group that a slab reads, [plane][place], with
//            zeros around them; a plane is of one output channel, or of a pair (amx.h)
//   place    where a position lies in the image
//   phase    the input positions that have the same remainder by the stride, on every axis: they
//            have the same taps, each of which reads neighbouring places for neighbours of a phase
//   segment  neighbouring places of a phase, as many as a tile (tile.h) holds
//
// With zeros where a tap falls off the output, all places of a segment have all taps. The lines of
// a phase follow one another with the gaps of the frame, and what is computed for a gap is dropped.
// A transposed convolution has its phases in the image, as its output positions are the fine ones.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "slab.h"

namespace linfuse {

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
  std::vector<int64_t> parts_read;  // by any tap, ascending

  bool is_read(int64_t part) const {
    return std::binary_search(parts_read.begin(), parts_read.end(), part);
  }
};

inline AxisFrame make_frame(const Geometry& g, int a) {
  const Axis& axis = g.axis[a];
  AxisFrame frame = {};
  // Strides beyond the size leave phases, or parts, without a position.
  frame.step = g.transposed ? 1 : std::min(axis.stride, axis.in);
  frame.parts = g.transposed ? std::min(axis.stride, std::max<int64_t>(1, axis.out)) : 1;
  const int64_t outs = divide_up(axis.out, frame.parts);
  int64_t most_in = 0;
  frame.phases.reserve(static_cast<size_t>(frame.step));
  for (int64_t first = 0; first < frame.step; ++first) {
    frame.phases.push_back({first, divide_up(axis.in - first, frame.step), {}});
    most_in = std::max(most_in, frame.phases.back().count);
  }
  int64_t high = 0;  // places read behind the last output position
  for (int64_t k = 0; k < axis.kernel; ++k) {
    // What input position 0 is tied to is an output position times the stride, or of it a part.
    const int64_t reach = k * axis.dilation - axis.pad_low;
    const int64_t rest = reach % axis.stride + (reach % axis.stride < 0 ? axis.stride : 0);
    if (rest >= (g.transposed ? frame.parts : frame.step)) continue;
    AxisPhase& phase = frame.phases[static_cast<size_t>(g.transposed ? 0 : rest)];
    const int64_t steps = (g.transposed ? reach - rest : rest - reach) / axis.stride;
    if (steps + phase.count <= 0 || steps >= outs) continue;  // all of it falls off
    frame.low = std::max(frame.low, -steps);
    high = std::max(high, steps + phase.count - outs);
    phase.taps.push_back({k, g.transposed ? rest : 0, steps});
    frame.parts_read.push_back(phase.taps.back().part);
  }
  std::vector<int64_t>& parts = frame.parts_read;
  std::sort(parts.begin(), parts.end());
  parts.erase(std::unique(parts.begin(), parts.end()), parts.end());
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
  int64_t place;    // from the phase's first
  int64_t vectors;  // of places
  size_t first_run;
  size_t last_run;
};

// The taps of a phase, as a tile wants them.
struct Phase {
  std::vector<int64_t> place;
  std::vector<int64_t> k;
};

// Of a frame, for an output and an input channel.
struct Counts {
  double products;  // those of taps and positions that do not exist are among them
  double segments;
};

struct Frame {
  AxisFrame axis[kAxes] = {};
  int64_t lanes = 0;  // of a vector
  int64_t width = 0;  // of a segment, but for the last of a phase
  std::vector<Phase> phases;
  std::vector<Segment> segments;
  std::vector<RunOfPlaces> runs;

  Frame() = default;
  Frame(const Geometry& g, int64_t lanes, int64_t vectors) : lanes(lanes), width(vectors * lanes) {
    for (int a = 0; a < kAxes; ++a) axis[a] = make_frame(g, a);
  }

  // More places than that are not counted: what they are multiplied with must not overflow.
  static constexpr int64_t kMostPlaces = int64_t{1} << 40;

  int64_t part_places() const { return axis[0].pitch * axis[1].pitch * axis[2].pitch; }
  int64_t parts() const { return axis[0].parts * axis[1].parts * axis[2].parts; }
  int64_t places() const {
    double places = 1;
    for (const AxisFrame& one : axis) {
      places *= static_cast<double>(one.parts) * static_cast<double>(one.pitch);
    }
    return places > static_cast<double>(kMostPlaces) ? kMostPlaces : parts() * part_places();
  }

  // Places of the parts that any tap reads.
  int64_t places_read() const {
    int64_t places = part_places();
    for (const AxisFrame& one : axis) places *= static_cast<int64_t>(one.parts_read.size());
    return places;
  }

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

  Counts counts() const {
    Counts counts = {};
    for_each_phase([&](const AxisPhase& p0, const AxisPhase& p1, const AxisPhase& p2) {
      const size_t taps = p0.taps.size() * p1.taps.size() * p2.taps.size();
      const int64_t all = span(p0, p1, p2);
      counts.products +=
          static_cast<double>(taps) * static_cast<double>(divide_up(all, lanes) * lanes);
      counts.segments += static_cast<double>(divide_up(all, width));
    });
    return counts;
  }

  // Whether an image of these output positions has no places between them, only around all.
  bool is_gapless(const Geometry& g) const {
    return parts() == 1 && axis[1].pitch == g.axis[1].out && axis[2].pitch == g.axis[2].out;
  }

  void list(const Geometry& g) {
    for_each_phase([&](const AxisPhase& p0, const AxisPhase& p1, const AxisPhase& p2) {
      list_taps(g, p0, p1, p2);
      const int64_t all = span(p0, p1, p2);
      for (int64_t place = 0; place < all; place += width) {
        const size_t first = runs.size();
        const int64_t end = std::min(all, place + width);
        list_runs(g, p0, p1, p2, place, end);
        // A segment may be a gap.
        if (runs.size() == first) continue;
        const int64_t vectors = divide_up(end - place, lanes);
        segments.push_back({phases.size() - 1, place, vectors, first, runs.size()});
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
    const size_t first = runs.size();
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
        append_run(first, {place - begin, std::min(next - place, p2.count - at2),
                           (i0 * g.axis[1].in + i1) * g.axis[2].in + i2});
      }
      place = next;
    }
  }

  // Lines that follow one another without a gap are one run.
  void append_run(size_t first, const RunOfPlaces& run) {
    if (runs.size() > first && axis[2].step == 1) {
      RunOfPlaces& last = runs.back();
      if (last.lane + last.count == run.lane && last.position + last.count == run.position) {
        last.count += run.count;
        return;
      }
    }
    runs.push_back(run);
  }
};

// A range of input positions as a convolution of its own.
struct PositionSlab {
  Geometry geometry;
  int64_t in_first;   // positions before it
  int64_t out_first;  // likewise, before those that it reads
  Range share;        // output positions whose bias it answers for
};

inline PositionSlab make_position_slab(const Geometry& g, const Slabs& slabs, int64_t number) {
  const int a = slabs.axis;
  const Range in = detail::range_of_slab(g, slabs, number);
  const Range outs = detail::window_of_reads(g, a, in);
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

// What the plan must know of an engine (fuse_conv_linear_images.h).
struct ImageShape {
  int64_t element_bytes;
  int64_t lanes;         // of a vector of places
  int64_t most_vectors;  // of a segment
  int64_t planes;        // of an image
  int64_t blocks;        // of a group's input channels
  int64_t columns;       // of a block: its input channels, or more
  int64_t weights;       // elements of the weights of a block
};

struct ImagePlan {
  static constexpr int64_t kMostBytes = int64_t{16} << 20;

  int64_t vectors;  // of a tile
  Slabs slabs;
  int64_t pitch;  // from one plane of an image to the next
  int64_t size;   // elements of an image
  bool fits;      // what an image may be; else its size means nothing
};

// Slabs as large as images may be; of one position where none is small enough.
inline ImagePlan make_image_plan(const Geometry& g, const ImageShape& shape) {
  const int64_t cache_line = 64 / shape.element_bytes;
  ImagePlan plan = {};
  // No more vectors than are filled.
  plan.vectors = std::min(shape.most_vectors, divide_up(g.in_positions(), shape.lanes));
  const int64_t width = plan.vectors * shape.lanes;
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
      const Frame frame(make_position_slab(g, slabs, number).geometry, shape.lanes, plan.vectors);
      places = std::max(places, frame.places());
    }
    // No power of two from plane to plane. Behind the last one, what its taps read beyond it.
    plan.pitch = divide_up(places, cache_line) * cache_line;
    if (plan.pitch % (16 * cache_line) == 0) plan.pitch += cache_line;
    const int64_t planes = shape.planes + 1;
    const int64_t most = ImagePlan::kMostBytes / shape.element_bytes;
    plan.fits = planes <= most && plan.pitch <= most / planes;
    plan.size = plan.fits ? planes * plan.pitch + divide_up(width, cache_line) * cache_line : 0;
    plan.fits = plan.fits && plan.size <= most;
    if (plan.fits || slabs.length == 1) return plan;
  }
}

}  // namespace linfuse
