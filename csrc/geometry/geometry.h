// The index map of a convolution, and the only place that knows it.
//
// Terms
//   row       c_out * prod(out) + o      a row of the matrix, in the order of torch.flatten
//   col       c_in  * prod(in)  + i      a column of the matrix, likewise
//   tap       one kernel element k at one output position: it ties an o to an i, or to padding
//   coarse    the side that is stepped with `stride`: o of a convolution, i of a transposed one
//   fine      the other side; a tap reads  fine = coarse * stride + k * dilation - pad_low
//
// A convolution maps fine -> coarse, a transposed convolution coarse -> fine; apart from that they
// share every formula below, which is why one struct serves both.
//
// Header only, int64 throughout, no torch, no CUDA API: the same lines run on the host and on a
// card. make_geometry.h builds a Geometry and guarantees that nothing here can overflow.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LINFUSE_HD __host__ __device__
#else
#define LINFUSE_HD
#endif

namespace linfuse {

// Of a value that is not negative: no sum that could overflow.
LINFUSE_HD inline int64_t divide_up(int64_t value, int64_t by) {
  return value / by + (value % by > 0 ? 1 : 0);
}

// A 1-d or 2-d convolution is a 3-d one with leading axes of size one.
constexpr int kAxes = 3;

enum class PaddingMode : int { kZeros, kReflect, kReplicate, kCircular };

struct Axis {
  int64_t in = 1;
  int64_t kernel = 1;
  int64_t out = 1;
  int64_t stride = 1;
  int64_t pad_low = 0;
  int64_t pad_high = 0;
  int64_t dilation = 1;
};

struct Position {
  int64_t at[kAxes];
};

// Where a position of the padded axis reads the unpadded one of `size` elements; -1 is padding.
// Padding is shorter than `size` for reflect and at most `size` for circular, so that one fold is
// enough.
LINFUSE_HD inline int64_t fold(int64_t position, int64_t size, PaddingMode mode) {
  if (position >= 0 && position < size) return position;
  switch (mode) {
    case PaddingMode::kReflect:
      return position < 0 ? -position : 2 * (size - 1) - position;
    case PaddingMode::kReplicate:
      return position < 0 ? 0 : size - 1;
    case PaddingMode::kCircular:
      return position < 0 ? position + size : position - size;
    case PaddingMode::kZeros:
      break;
  }
  return -1;
}

// The inverse of fold: calls visit(first, last) for the ranges [first, last) of positions of the
// padded axis that read `index`. Only a replicated rim makes one of more than a position, and that
// may be far too many to go through.
template <typename Visitor>
inline void for_each_unfolded(int64_t index, int64_t size, int64_t pad_low, int64_t pad_high,
                              PaddingMode mode, Visitor&& visit) {
  visit(index, index + 1);
  switch (mode) {
    case PaddingMode::kReflect:
      if (index > 0 && index <= pad_low) visit(-index, -index + 1);
      if (index < size - 1 && index >= size - 1 - pad_high) {
        visit(2 * (size - 1) - index, 2 * (size - 1) - index + 1);
      }
      break;
    case PaddingMode::kReplicate:
      if (index == 0 && pad_low > 0) visit(-pad_low, 0);
      if (index == size - 1 && pad_high > 0) visit(size, size + pad_high);
      break;
    case PaddingMode::kCircular:
      if (index >= size - pad_low) visit(index - size, index - size + 1);
      if (index < pad_high) visit(index + size, index + size + 1);
      break;
    case PaddingMode::kZeros:
      break;
  }
}

struct Geometry {
  Axis axis[kAxes];
  int64_t in_channels = 1;
  int64_t out_channels = 1;
  int64_t groups = 1;
  bool transposed = false;
  PaddingMode padding_mode = PaddingMode::kZeros;

  LINFUSE_HD int64_t in_positions() const { return axis[0].in * axis[1].in * axis[2].in; }
  LINFUSE_HD int64_t out_positions() const { return axis[0].out * axis[1].out * axis[2].out; }
  LINFUSE_HD int64_t kernel_positions() const {
    return axis[0].kernel * axis[1].kernel * axis[2].kernel;
  }
  LINFUSE_HD int64_t rows() const { return out_channels * out_positions(); }
  LINFUSE_HD int64_t cols() const { return in_channels * in_positions(); }
  LINFUSE_HD int64_t in_channels_per_group() const { return in_channels / groups; }
  LINFUSE_HD int64_t out_channels_per_group() const { return out_channels / groups; }
  LINFUSE_HD int64_t group_of_out_channel(int64_t c_out) const {
    return c_out / out_channels_per_group();
  }

  LINFUSE_HD int64_t coarse_size(int a) const { return transposed ? axis[a].in : axis[a].out; }
  LINFUSE_HD int64_t fine_size(int a) const { return transposed ? axis[a].out : axis[a].in; }

  // The fine position that kernel element k ties to a coarse one; -1 where it falls on padding.
  LINFUSE_HD int64_t fine_position(int a, int64_t coarse, int64_t k) const {
    const int64_t position = coarse * axis[a].stride + k * axis[a].dilation - axis[a].pad_low;
    return fold(position, fine_size(a), padding_mode);
  }

  // The coarse position that kernel element k ties to a position of the padded axis; -1 where there
  // is none.
  LINFUSE_HD int64_t coarse_position(int a, int64_t fine, int64_t k) const {
    const int64_t step = fine + axis[a].pad_low - k * axis[a].dilation;
    if (step < 0 || step % axis[a].stride != 0) return -1;
    const int64_t coarse = step / axis[a].stride;
    return coarse < coarse_size(a) ? coarse : -1;
  }

  // How often the padded axis may hold one fine position: itself, then its copies in the padding.
  LINFUSE_HD int64_t copies(int a) const {
    if (axis[a].pad_low == 0 && axis[a].pad_high == 0) return 1;
    switch (padding_mode) {
      case PaddingMode::kReflect:
      case PaddingMode::kCircular:
        return 3;
      case PaddingMode::kReplicate:
        return 1 + axis[a].pad_low + axis[a].pad_high;
      case PaddingMode::kZeros:
        break;
    }
    return 1;
  }

  // Where on the padded axis that copy of a fine position is, counted from the first element that
  // is no padding; -1 - pad_low, which no tap reads, where there is none. The inverse of fold.
  LINFUSE_HD int64_t unfold(int a, int64_t fine, int64_t copy) const {
    if (copy == 0) return fine;
    const int64_t last = fine_size(a) - 1;
    const int64_t low = axis[a].pad_low;
    const int64_t high = axis[a].pad_high;
    int64_t position = -1 - low;
    bool is_low = copy == 1;
    if (padding_mode == PaddingMode::kReflect) {
      position = is_low ? -fine : 2 * last - fine;
    } else if (padding_mode == PaddingMode::kCircular) {
      position = is_low ? fine - (last + 1) : fine + (last + 1);
    } else {
      is_low = copy <= low;
      const bool is_rim = fine == (is_low ? 0 : last);
      if (is_rim) position = is_low ? -copy : last + copy - low;
    }
    const bool is_padding =
        is_low ? position < 0 && position >= -low : position > last && position <= last + high;
    return is_padding ? position : -1 - low;
  }

  // The output position that kernel element k ties to a copy of input position i; -1 where there is
  // none.
  LINFUSE_HD int64_t out_of_tap(int a, int64_t i, int64_t copy, int64_t k) const {
    return transposed ? fine_position(a, i, k) : coarse_position(a, unfold(a, i, copy), k);
  }

  // The column of an input position; c_in counts within the group of c_out.
  LINFUSE_HD int64_t column(int64_t c_out, int64_t c_in, const Position& i) const {
    const int64_t channel = group_of_out_channel(c_out) * in_channels_per_group() + c_in;
    return ((channel * axis[0].in + i.at[0]) * axis[1].in + i.at[1]) * axis[2].in + i.at[2];
  }

  // Start of the kernel elements of one pair of channels; c_in counts within the group of c_out.
  // Weights are [C_out, C_in / groups, kernel...], transposed ones [C_in, C_out / groups,
  // kernel...].
  LINFUSE_HD int64_t weight_index(int64_t c_out, int64_t c_in) const {
    if (!transposed) return (c_out * in_channels_per_group() + c_in) * kernel_positions();
    const int64_t group = group_of_out_channel(c_out);
    const int64_t global_c_in = group * in_channels_per_group() + c_in;
    const int64_t local_c_out = c_out - group * out_channels_per_group();
    return (global_c_in * out_channels_per_group() + local_c_out) * kernel_positions();
  }

  // Kernel elements from one pair of channels to that of the next c_out, or c_in, of the group.
  LINFUSE_HD int64_t weight_step_out() const {
    return kernel_positions() * (transposed ? 1 : in_channels_per_group());
  }
  LINFUSE_HD int64_t weight_step_in() const {
    return kernel_positions() * (transposed ? out_channels_per_group() : 1);
  }

  // True where several taps of one row may read the same input position, and so must be summed.
  LINFUSE_HD bool taps_may_collide() const {
    if (padding_mode == PaddingMode::kZeros) return false;
    for (int a = 0; a < kAxes; ++a) {
      if (axis[a].pad_low > 0 || axis[a].pad_high > 0) return true;
    }
    return false;
  }
};

// The convolution whose matrix, of the same weight, is the transpose: a transposed one for a plain
// one, and the other way round.
inline Geometry adjoint(Geometry g) {
  for (Axis& axis : g.axis) {
    const int64_t in = axis.in;
    axis.in = axis.out;
    axis.out = in;
  }
  const int64_t in_channels = g.in_channels;
  g.in_channels = g.out_channels;
  g.out_channels = in_channels;
  g.transposed = !g.transposed;
  return g;
}

LINFUSE_HD inline Position unravel(int64_t index, int64_t size1, int64_t size2) {
  Position position;
  position.at[2] = index % size2;
  const int64_t rest = index / size2;
  position.at[1] = rest % size1;
  position.at[0] = rest / size1;
  return position;
}

LINFUSE_HD inline Position out_position(const Geometry& g, int64_t o) {
  return unravel(o, g.axis[1].out, g.axis[2].out);
}

LINFUSE_HD inline Position in_position(const Geometry& g, int64_t i) {
  return unravel(i, g.axis[1].in, g.axis[2].in);
}

LINFUSE_HD inline Position kernel_position(const Geometry& g, int64_t k) {
  return unravel(k, g.axis[1].kernel, g.axis[2].kernel);
}

}  // namespace linfuse
