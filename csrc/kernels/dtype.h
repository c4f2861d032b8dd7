// Element types of the kernels, on the host and on a card, without torch.
//
// Half types are storage only: a kernel widens to Accumulate<T>, computes there, and rounds once,
// to nearest with ties to even. A card has instructions for that; only a NaN's bits differ.
#pragma once

#include <cstdint>
#include <cstring>

#include "../geometry/geometry.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace linfuse {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

namespace detail {

LINFUSE_HD inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

LINFUSE_HD inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace detail

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  LINFUSE_HD explicit BFloat16(float value) {
#if defined(__CUDA_ARCH__)
    bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    const uint32_t wide = detail::bits_of(value);
    // A NaN whose payload lies in the dropped bits must not round to infinity.
    bits = value != value ? uint16_t{0x7fc0}
                          : static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
#endif
  }
  LINFUSE_HD explicit operator float() const {
    return detail::float_of(static_cast<uint32_t>(bits) << 16);
  }
};

struct Float16 {
  uint16_t bits;

  Float16() = default;
  LINFUSE_HD explicit Float16(float value) {
#if defined(__CUDA_ARCH__)
    bits = __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t wide = detail::bits_of(value);
    const uint32_t sign = (wide >> 16) & 0x8000;
    const uint32_t magnitude = wide & 0x7fffffff;
    uint32_t narrow;
    if (magnitude > 0x7f800000) {
      narrow = 0x7e00;  // NaN
    } else if (magnitude >= 0x477ff000) {
      narrow = 0x7c00;  // 65520 and above round to infinity
    } else if (magnitude < 0x38800000) {
      // Below 2^-14 halves are multiples of 2^-24: adding 0.5 aligns the bits and lets the FPU
      // round.
      narrow = detail::bits_of(detail::float_of(magnitude) + 0.5f) - detail::bits_of(0.5f);
    } else {
      narrow = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (uint32_t{112} << 23)) >> 13;
    }
    bits = static_cast<uint16_t>(sign | narrow);
#endif
  }
  LINFUSE_HD explicit operator float() const {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t magnitude = bits & 0x7fff;
    uint32_t wide;
    if (magnitude >= 0x7c00) {
      wide = 0x7f800000 | ((magnitude & 0x3ff) << 13);
    } else if (magnitude >= 0x400) {
      wide = (magnitude << 13) + (uint32_t{112} << 23);
    } else {
      // Subnormal: magnitude * 2^-24, exact in float.
      wide = detail::bits_of(static_cast<float>(magnitude) * 5.9604644775390625e-8f);
    }
    return detail::float_of(sign | wide);
#endif
  }
};

template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateType<T>::type;

inline int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Calls visit(T{}) with T the C++ type of `dtype`.
template <typename Visitor>
auto dispatch(DType dtype, Visitor&& visit) {
  switch (dtype) {
    case DType::kFloat64:
      return visit(double{});
    case DType::kFloat16:
      return visit(Float16{});
    case DType::kBFloat16:
      return visit(BFloat16{});
    case DType::kFloat32:
      break;
  }
  return visit(float{});
}

}  // namespace linfuse
