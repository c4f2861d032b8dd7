#include <algorithm>
#include <numeric>
#include <type_traits>

#include "fuse_conv_conv.h"
#include "widen.h"

namespace linfuse {
namespace {

using Kernel = FuseConvConvParams::Kernel;

template <typename T>
class Merger {
 public:
  Merger(const FuseConvConvParams& params, const ParallelFor& parallel_for,
         const Allocate& allocate)
      : params_(params),
        parallel_for_(parallel_for),
        allocate_(allocate),
        common_(std::gcd(params.first_groups, params.second_groups)),
        in_(params.in_channels / common_),
        mid_(params.mid_channels / common_),
        out_(params.out_channels / common_),
        first_groups_(params.first_groups / common_),
        second_groups_(params.second_groups / common_) {}

  void run() {
    const int64_t elements = params_.out_channels * in_ * params_.positions();
    first_ = widen(params_.first_weight,
                   params_.mid_channels * (in_ / first_groups_) * params_.first.positions());
    second_ = widen(params_.second_weight,
                    params_.out_channels * (mid_ / second_groups_) * params_.second.positions());
    if constexpr (std::is_same_v<T, double>) {
      merged_ = static_cast<double*>(params_.weight);
    } else {
      merged_ = take(elements);
    }
    if (second_groups_ == 1) {
      multiply_rows_out();
    } else if (first_groups_ == 1) {
      multiply_rows_in();
    } else {
      multiply_blocks();
    }
    if constexpr (!std::is_same_v<T, double>) {
      narrow(merged_, elements, parallel_for_, static_cast<T*>(params_.weight));
    }
    make_bias();
  }

 private:
  // Half types by way of float32, as torch rounds them.
  static T round(double value) { return static_cast<T>(static_cast<Accumulate<T>>(value)); }

  double* take(int64_t count) const {
    return static_cast<double*>(allocate_(count * static_cast<int64_t>(sizeof(double))));
  }

  const double* widen(const void* values, int64_t count) const {
    return linfuse::widen<double>(static_cast<const T*>(values), count, parallel_for_, allocate_);
  }

  // The merged kernel as the input of a convolution with `kernel` whose output is `rest`.
  FuseConvLinearParams product(const Kernel& kernel, const Kernel& rest) const {
    FuseConvLinearParams made;
    for (int a = 0; a < kAxes; ++a) {
      Axis& axis = made.geometry.axis[a];
      axis.in = params_.size(a);
      axis.kernel = kernel.size[a];
      axis.out = rest.size[a];
      axis.stride = rest.step[a];
      axis.dilation = kernel.step[a];
    }
    made.dtype = DType::kFloat64;
    made.threads = params_.threads;
    return made;
  }

  void launch(FuseConvLinearParams& made, const double* weight, const double* linear,
              double* result) const {
    made.conv_weight = weight;
    made.linear_weight = linear;
    made.weight = result;
    launch_fuse_conv_linear_cpu(made, parallel_for_, allocate_);
  }

  // A row for each c_out; the second has no groups of its own beyond the common ones.
  void multiply_rows_out() const {
    // Common groups are those of the product where nothing else needs groups.
    const bool as_groups = first_groups_ == 1;
    const int64_t launches = as_groups ? 1 : common_;
    const int64_t each = common_ / launches;
    const int64_t second_size = out_ * mid_ * params_.second.positions();
    const int64_t merged_size = out_ * in_ * params_.positions();
    FuseConvLinearParams made = product(params_.first, params_.second);
    made.features = out_;
    Geometry& g = made.geometry;
    g.in_channels = in_ * each;
    g.out_channels = mid_ * each;
    g.groups = first_groups_ * each;
    made.linear_stride.row = mid_ * params_.second.positions();
    made.linear_stride.channel = params_.second.positions();
    made.linear_stride.position = 1;
    made.linear_stride.group =
        as_groups ? second_size : mid_ / first_groups_ * params_.second.positions();
    made.weight_stride.row = in_ * params_.positions();
    made.weight_stride.channel = params_.positions();
    made.weight_stride.position = 1;
    made.weight_stride.group = as_groups ? merged_size : in_ / first_groups_ * params_.positions();
    for (int64_t n = 0; n < launches; ++n) {
      launch(made, first_ + n * mid_ * (in_ / first_groups_) * params_.first.positions(),
             second_ + n * second_size, merged_ + n * merged_size);
    }
  }

  // A row for each c_in; the first has no groups of its own beyond the common ones.
  void multiply_rows_in() const {
    FuseConvLinearParams made = product(params_.second, params_.first);
    made.features = in_;
    Geometry& g = made.geometry;
    g.in_channels = out_;
    g.out_channels = mid_;
    g.groups = second_groups_;
    made.linear_stride.row = params_.first.positions();
    made.linear_stride.channel = in_ * params_.first.positions();
    made.linear_stride.position = 1;
    made.linear_stride.group = mid_ / second_groups_ * made.linear_stride.channel;
    made.weight_stride.row = params_.positions();
    made.weight_stride.channel = in_ * params_.positions();
    made.weight_stride.position = 1;
    made.weight_stride.group = out_ / second_groups_ * made.weight_stride.channel;
    const double* second = second_by_mid_channel();
    for (int64_t n = 0; n < common_; ++n) {
      launch(made, second + n * mid_ * (out_ / second_groups_) * params_.second.positions(),
             first_ + n * mid_ * made.linear_stride.channel,
             merged_ + n * out_ * made.weight_stride.channel);
    }
  }

  // Both have groups of their own: a block of the result for each pair of them that has channels
  // in between, which follow one another; other blocks are zero. A row is a c_in of the block.
  void multiply_blocks() const {
    const int64_t in = in_ / first_groups_;
    const int64_t out = out_ / second_groups_;
    std::fill(merged_, merged_ + params_.out_channels * in_ * params_.positions(), 0.0);
    FuseConvLinearParams made = product(params_.second, params_.first);
    made.features = in;
    made.geometry.in_channels = out;
    made.geometry.groups = 1;
    made.linear_stride.row = params_.first.positions();
    made.linear_stride.channel = in * params_.first.positions();
    made.linear_stride.position = 1;
    made.weight_stride.row = params_.positions();
    made.weight_stride.channel = in_ * params_.positions();
    made.weight_stride.position = 1;
    const double* second = second_by_mid_channel();
    const int64_t mid_of_first = mid_ / first_groups_;
    const int64_t mid_of_second = mid_ / second_groups_;
    for (int64_t c_mid = 0; c_mid < params_.mid_channels;) {
      const int64_t first_group = c_mid / mid_of_first;
      const int64_t second_group = c_mid / mid_of_second;
      const int64_t end =
          std::min((first_group + 1) * mid_of_first, (second_group + 1) * mid_of_second);
      made.geometry.out_channels = end - c_mid;
      const int64_t c_in = first_group % first_groups_ * in;
      launch(
          made, second + c_mid * out * params_.second.positions(),
          first_ + c_mid * made.linear_stride.channel,
          merged_ + second_group * out * made.weight_stride.channel + c_in * params_.positions());
      c_mid = end;
    }
  }

  // The second weight as [C_mid, C_out / second_groups, *k2].
  const double* second_by_mid_channel() const {
    const int64_t groups = params_.second_groups;
    const int64_t out = params_.out_channels / groups;
    const int64_t mid = params_.mid_channels / groups;
    const int64_t positions = params_.second.positions();
    double* turned = take(params_.mid_channels * out * positions);
    for_each(parallel_for_, params_.mid_channels, out * positions, [&](int64_t c_mid) {
      const int64_t group = c_mid / mid;
      for (int64_t c_out = 0; c_out < out; ++c_out) {
        const double* from = second_ + ((group * out + c_out) * mid + c_mid % mid) * positions;
        std::copy(from, from + positions, turned + (c_mid * out + c_out) * positions);
      }
    });
    return turned;
  }

  void make_bias() const {
    const int64_t positions = params_.second.positions();
    const int64_t mid = params_.mid_channels / params_.second_groups;
    const int64_t out = params_.out_channels / params_.second_groups;
    const T* second_bias = static_cast<const T*>(params_.second_bias);
    const double* first_bias =
        params_.first_bias == nullptr ? nullptr : widen(params_.first_bias, params_.mid_channels);
    T* bias = static_cast<T*>(params_.bias);
    for_each(parallel_for_, params_.out_channels, first_bias == nullptr ? 1 : mid * positions,
             [&](int64_t c_out) {
               double total = 0;
               if (first_bias != nullptr) {
                 const double* factor = first_bias + c_out / out * mid;
                 const double* weight = second_ + c_out * mid * positions;
                 for (int64_t c = 0; c < mid; ++c, weight += positions) {
                   total += factor[c] * std::accumulate(weight, weight + positions, 0.0);
                 }
               }
               if (second_bias != nullptr) {
                 total += static_cast<double>(static_cast<Accumulate<T>>(second_bias[c_out]));
               }
               bias[c_out] = round(total);
             });
  }

  const FuseConvConvParams& params_;
  const ParallelFor& parallel_for_;
  const Allocate& allocate_;
  // Of one of the common groups:
  const int64_t common_;
  const int64_t in_;
  const int64_t mid_;
  const int64_t out_;
  const int64_t first_groups_;
  const int64_t second_groups_;
  const double* first_ = nullptr;
  const double* second_ = nullptr;
  double* merged_ = nullptr;
};

}  // namespace

void launch_fuse_conv_conv_cpu(const FuseConvConvParams& params, const ParallelFor& parallel_for,
                               const Allocate& allocate) {
  dispatch(params.dtype,
           [&](auto zero) { Merger<decltype(zero)>(params, parallel_for, allocate).run(); });
}

}  // namespace linfuse
