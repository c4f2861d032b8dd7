// Builds a Geometry from the arguments of an op, or says what is wrong with them.
//
// Throws std::invalid_argument, worded "op: `argument` requirement, got value". Whatever comes in,
// no sum or product overflows: everything goes through checked(), and a Geometry that was returned
// has rows() * cols() within int64, so that no kernel need check again.
// linfuse_ext/geometry.py mirrors these rules for symbolic sizes; a test holds the two together.
#pragma once

#include <cstdint>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "geometry.h"

namespace linfuse {

// Numbers that somebody else holds: each copy would be an allocation, of which a small op feels
// every one.
using Numbers = std::span<const int64_t>;

struct ConvArguments {
  Numbers weight_size;
  Numbers input_size;
  Numbers stride;
  Numbers padding;  // one value per axis, or (low, high) pairs, or a single value
  Numbers dilation;
  int64_t groups = 1;
  bool transposed = false;
  Numbers output_padding;
  std::string_view padding_mode = "zeros";
};

namespace detail {

// One value for each axis, or two.
class PerAxis {
 public:
  PerAxis(Numbers values, size_t size) : size_(size) {
    for (size_t n = 0; n < size; ++n) at_[n] = values[values.size() == 1 ? 0 : n];
  }
  size_t size() const { return size_; }
  int64_t& operator[](size_t n) { return at_[n]; }
  int64_t operator[](size_t n) const { return at_[n]; }

 private:
  int64_t at_[2 * kAxes];
  size_t size_;
};

template <typename Values>
std::string to_text(const Values& values) {
  std::ostringstream text;
  text << "(";
  for (size_t n = 0; n < values.size(); ++n) text << (n == 0 ? "" : ", ") << values[n];
  text << (values.size() == 1 ? ",)" : ")");
  return text.str();
}

[[noreturn]] inline void reject(const std::string& op, const std::string& message) {
  throw std::invalid_argument(op + ": " + message);
}

// int64 arithmetic that rejects instead of wrapping around.
class Checked {
 public:
  explicit Checked(const char* op) : op_(op) {}

  int64_t add(int64_t left, int64_t right) const {
    int64_t result = 0;
    if (__builtin_add_overflow(left, right, &result)) overflow();
    return result;
  }
  int64_t subtract(int64_t left, int64_t right) const {
    int64_t result = 0;
    if (__builtin_sub_overflow(left, right, &result)) overflow();
    return result;
  }
  int64_t multiply(int64_t left, int64_t right) const {
    int64_t result = 0;
    if (__builtin_mul_overflow(left, right, &result)) overflow();
    return result;
  }

 private:
  [[noreturn]] void overflow() const { reject(op_, "the sizes must fit in 63 bits, they do not"); }

  const char* op_;
};

inline PerAxis per_axis(const char* op, const char* name, Numbers values, size_t axes,
                        int64_t least) {
  if (values.size() != axes && values.size() != 1) {
    reject(op, std::string("`") + name + "` must have one value or " + std::to_string(axes) +
                   ", got " + to_text(values));
  }
  for (int64_t value : values) {
    if (value < least) {
      reject(op, std::string("`") + name + "` must be " +
                     (least > 0 ? "positive" : "non-negative") + ", got " + to_text(values));
    }
  }
  return PerAxis(values, axes);
}

inline PaddingMode padding_mode_from(const char* op, std::string_view name) {
  if (name == "zeros") return PaddingMode::kZeros;
  if (name == "reflect") return PaddingMode::kReflect;
  if (name == "replicate") return PaddingMode::kReplicate;
  if (name == "circular") return PaddingMode::kCircular;
  reject(op, "`padding_mode` must be 'zeros', 'reflect', 'replicate' or 'circular', got '" +
                 std::string(name) + "'");
}

}  // namespace detail

inline Geometry make_geometry(const char* op, const ConvArguments& arguments) {
  using detail::per_axis;
  using detail::reject;
  using detail::to_text;
  const detail::Checked checked(op);

  const Numbers weight_size = arguments.weight_size;
  if (weight_size.size() < 3 || weight_size.size() > 5) {
    reject(op, "the convolution's weight must have 3, 4 or 5 dimensions, got shape " +
                   to_text(weight_size));
  }
  for (int64_t size : weight_size) {
    if (size < 1) {
      reject(op, "the convolution's weight must have no empty dimension, got shape " +
                     to_text(weight_size));
    }
  }
  const size_t axes = weight_size.size() - 2;
  const auto input_size = per_axis(op, "input_size", arguments.input_size, axes, 1);
  const auto stride = per_axis(op, "stride", arguments.stride, axes, 1);
  const auto dilation = per_axis(op, "dilation", arguments.dilation, axes, 1);
  const auto output_padding = per_axis(op, "output_padding", arguments.output_padding, axes, 0);
  const bool pairs = arguments.padding.size() == 2 * axes;
  const auto padding = per_axis(op, "padding", arguments.padding, pairs ? 2 * axes : axes, 0);
  const PaddingMode mode = detail::padding_mode_from(op, arguments.padding_mode);

  const int64_t groups = arguments.groups;
  if (groups < 1) reject(op, "`groups` must be positive, got " + std::to_string(groups));
  if (weight_size[0] % groups != 0) {
    reject(op, std::string("`groups` must divide the ") +
                   (arguments.transposed ? "input" : "output") + " channels (" +
                   std::to_string(weight_size[0]) + "), got " + std::to_string(groups));
  }
  if (arguments.transposed && mode != PaddingMode::kZeros) {
    reject(op, "`padding_mode` must be 'zeros' for a transposed convolution, got '" +
                   std::string(arguments.padding_mode) + "'");
  }

  Geometry g;
  g.groups = groups;
  g.transposed = arguments.transposed;
  g.padding_mode = mode;
  const int64_t other_channels = checked.multiply(weight_size[1], groups);
  g.out_channels = arguments.transposed ? other_channels : weight_size[0];
  g.in_channels = arguments.transposed ? weight_size[0] : other_channels;

  for (size_t n = 0; n < axes; ++n) {
    Axis& axis = g.axis[kAxes - axes + n];
    axis.in = input_size[n];
    axis.kernel = weight_size[2 + n];
    axis.stride = stride[n];
    axis.dilation = dilation[n];
    axis.pad_low = pairs ? padding[2 * n] : padding[n];
    axis.pad_high = pairs ? padding[2 * n + 1] : padding[n];
    const int64_t extent = checked.add(checked.multiply(axis.kernel - 1, axis.dilation), 1);
    const int64_t pad = checked.add(axis.pad_low, axis.pad_high);
    if (arguments.transposed) {
      if (output_padding[n] >= axis.stride && output_padding[n] >= axis.dilation) {
        reject(op, "`output_padding` must be smaller than the stride or the dilation, got " +
                       to_text(output_padding));
      }
      const int64_t full = checked.add(checked.multiply(axis.in - 1, axis.stride), extent);
      axis.out = checked.add(checked.subtract(full, pad), output_padding[n]);
    } else {
      if (output_padding[n] != 0) {
        reject(op, "`output_padding` must be 0 unless the convolution is transposed, got " +
                       to_text(output_padding));
      }
      if ((mode == PaddingMode::kReflect &&
           (axis.pad_low >= axis.in || axis.pad_high >= axis.in)) ||
          (mode == PaddingMode::kCircular && (axis.pad_low > axis.in || axis.pad_high > axis.in))) {
        reject(op, "`padding` must be " +
                       std::string(mode == PaddingMode::kReflect ? "smaller than" : "at most") +
                       " `input_size` in this padding mode, got " + to_text(padding) + " for " +
                       to_text(input_size));
      }
      const int64_t room = checked.subtract(checked.add(axis.in, pad), extent);
      axis.out = room < 0 ? 0 : room / axis.stride + 1;
    }
    if (axis.out < 1) {
      reject(op, "the output must have at least one position per axis, but `input_size` " +
                     to_text(input_size) + " leaves none for a kernel that spans " +
                     std::to_string(extent) + " with padding " + to_text(padding));
    }
  }
  const auto product = [&](int64_t channels, int64_t Axis::* size) {
    int64_t result = channels;
    for (const Axis& axis : g.axis) result = checked.multiply(result, axis.*size);
    return result;
  };
  const int64_t rows = product(g.out_channels, &Axis::out);
  const int64_t cols = product(g.in_channels, &Axis::in);
  checked.multiply(checked.multiply(rows, cols), 8);  // bytes of the widest element
  return g;
}

}  // namespace linfuse
