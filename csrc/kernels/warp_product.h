// A warp's share of a matrix product whose operands lie in shared memory:
//
//   sum[row, col] += sum over k < kDepth of a[row, k] * b[col, k]
//
// on the units that a card has for the type: FMA for float32, tensor cores for the others (exact
// products, sums in float32 or float64) and, in three products for one, for float32 as well.
// Whoever compiles for another target, the tests' host shim and cards before compute capability 8.0
// among them, gets the same sums by plain C++: each thread computes those that it holds.
//
// Terms
//   panel   one operand of a block, kRows rows by kDepth, in the order that suits the unit
//   lane    a thread of the warp; it holds kSums elements, of which element n is at
//           (row(lane, n), col(lane, n))
#pragma once

#include <cstdint>

#include "dtype.h"
#include "ptx.h"

namespace linfuse {

// k outermost, rows side by side. The padding lets lanes that read a square of 4 by 4 meet
// no bank twice, and keeps groups of 4 aligned.
template <typename T, int kRowCount>
struct PanelByDepth {
  static constexpr int kRows = kRowCount;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kStride = kRows + 4;
  static constexpr int kSize = kDepth * kStride;
  LINFUSE_HD static constexpr int at(int row, int k) { return k * kStride + row; }

  // Stores count elements of a row from k on.
  template <int count>
  LINFUSE_HD static void store(T* panel, int row, int k, const T (&values)[count]) {
#pragma unroll
    for (int n = 0; n < count; ++n) panel[at(row, k + n)] = values[n];
  }
};

// Stores values by one instruction; `to` is aligned to all of them.
template <int count, typename T>
LINFUSE_HD inline void store_together(T* to, const T* values) {
  struct alignas(count * sizeof(T)) Values {
    T at[count];
  };
  Values together;
#pragma unroll
  for (int n = 0; n < count; ++n) together.at[n] = values[n];
  *reinterpret_cast<Values*>(to) = together;
}

// Rows of kDepth, which is four pieces of 16 bytes, in an order that changes every second row: the
// same piece of 8 rows, or all of two rows, meets no bank twice.
template <typename T, int kRowCount>
struct PanelByRow {
  static constexpr int kRows = kRowCount;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kSize = kRows * kDepth;
  LINFUSE_HD static constexpr int at(int row, int k) {
    return row * kDepth + ((k / kPiece<T>)^(row / 2 % 4)) * kPiece<T> + k % kPiece<T>;
  }

  template <int count>
  LINFUSE_HD static void store(T* panel, int row, int k, const T (&values)[count]) {
    constexpr int kAtOnce = count < kPiece<T> ? count : kPiece<T>;
#pragma unroll
    for (int n = 0; n < count; n += kAtOnce) {
      store_together<kAtOnce>(panel + at(row, k + n), values + n);
    }
  }
};

namespace detail {

// The sums as they are meant.
template <typename T, typename Product, typename PanelA, typename PanelB>
LINFUSE_HD inline void add_plainly(const T* a, const T* b, int first_row, int first_col, int lane,
                                   Accumulate<T>* sums) {
  using A = Accumulate<T>;
#pragma unroll
  for (int n = 0; n < Product::kSums; ++n) {
    const int row = first_row + Product::row(lane, n);
    const int col = first_col + Product::col(lane, n);
    for (int k = 0; k < PanelA::kDepth; ++k) {
      sums[n] += static_cast<A>(a[PanelA::at(row, k)]) * static_cast<A>(b[PanelB::at(col, k)]);
    }
  }
}

}  // namespace detail

// kDown by kAcross tiles of the unit at hand.
template <typename T, int kDown, int kAcross>
struct WarpProduct;

// FMA. A lane holds squares of 4 by 4, 8 lanes below each other and 4 side by side. Such a tile is
// as large as four of the tensor cores' tiles, so that they are counted in halves.
//
// A load of 16 bytes takes half the passes where lanes n and n ^ 1 read the same, or n and n ^ 2:
// the former are side by side, the latter below each other.
template <int kHalvesDown, int kHalvesAcross>
struct WarpProduct<float, kHalvesDown, kHalvesAcross> {
  static constexpr int kDown = (kHalvesDown + 1) / 2;
  static constexpr int kAcross = (kHalvesAcross + 1) / 2;
  static constexpr int kRows = kDown * 32;
  static constexpr int kCols = kAcross * 16;
  static constexpr int kSums = kDown * kAcross * 16;
  template <int rows>
  using Panel = PanelByDepth<float, rows>;

  LINFUSE_HD static int row(int lane, int n) {
    const int square = lane / 8 * 2 + lane / 2 % 2;
    return n / (kAcross * 16) * 32 + square * 4 + n / (kAcross * 4) % 4;
  }
  LINFUSE_HD static int col(int lane, int n) {
    const int square = lane / 4 % 2 * 2 + lane % 2;
    return n / 4 % kAcross * 16 + square * 4 + n % 4;
  }

  template <typename PanelA, typename PanelB>
  __device__ static void add(const float* a, const float* b, int first_row, int first_col, int lane,
                             float (&sums)[kSums]) {
    struct alignas(16) Four {
      float at[4];
    };
#pragma unroll
    for (int k = 0; k < PanelA::kDepth; ++k) {
      Four left[kDown];
      Four right[kAcross];
#pragma unroll
      for (int m = 0; m < kDown; ++m) {
        left[m] = *reinterpret_cast<const Four*>(
            a + PanelA::at(first_row + row(lane, m * kAcross * 16), k));
      }
#pragma unroll
      for (int m = 0; m < kAcross; ++m) {
        right[m] = *reinterpret_cast<const Four*>(b + PanelB::at(first_col + col(lane, m * 4), k));
      }
#pragma unroll
      for (int n = 0; n < kSums; ++n) {
        sums[n] +=
            left[n / (kAcross * 16)].at[n / (kAcross * 4) % 4] * right[n / 4 % kAcross].at[n % 4];
      }
    }
  }
};

// Tensor cores, 8 by 8 by 4.
template <int kDown, int kAcross>
struct WarpProduct<double, kDown, kAcross> {
  static constexpr int kRows = kDown * 8;
  static constexpr int kCols = kAcross * 8;
  static constexpr int kSums = kDown * kAcross * 2;
  template <int rows>
  using Panel = PanelByDepth<double, rows>;

  LINFUSE_HD static int row(int lane, int n) { return n / 2 / kAcross * 8 + lane / 4; }
  LINFUSE_HD static int col(int lane, int n) { return n / 2 % kAcross * 8 + lane % 4 * 2 + n % 2; }

  template <typename PanelA, typename PanelB>
  __device__ static void add(const double* a, const double* b, int first_row, int first_col,
                             int lane, double (&sums)[kSums]) {
#if defined(LINFUSE_TENSOR_CORES)
#pragma unroll
    for (int k = 0; k < PanelA::kDepth; k += 4) {
      double left[kDown];
      double right[kAcross];
#pragma unroll
      for (int m = 0; m < kDown; ++m) {
        left[m] = a[PanelA::at(first_row + m * 8 + lane / 4, k + lane % 4)];
      }
#pragma unroll
      for (int m = 0; m < kAcross; ++m) {
        right[m] = b[PanelB::at(first_col + m * 8 + lane / 4, k + lane % 4)];
      }
#pragma unroll
      for (int n = 0; n < kDown * kAcross; ++n) {
        ptx::multiply(left[n / kAcross], right[n % kAcross], sums + 2 * n);
      }
    }
#else
    detail::add_plainly<double, WarpProduct, PanelA, PanelB>(a, b, first_row, first_col, lane,
                                                             sums);
#endif
  }
};

namespace detail {

// Tensor cores, 16 by 8 by two pieces.
template <int kDown, int kAcross>
struct PieceProduct {
  static constexpr int kRows = kDown * 16;
  static constexpr int kCols = kAcross * 8;
  static constexpr int kSums = kDown * kAcross * 4;

  LINFUSE_HD static int row(int lane, int n) {
    return n / 4 / kAcross * 16 + n / 2 % 2 * 8 + lane / 4;
  }
  LINFUSE_HD static int col(int lane, int n) { return n / 4 % kAcross * 8 + lane % 4 * 2 + n % 2; }

#if defined(LINFUSE_TENSOR_CORES)
 protected:
  // Of 16 rows, the two pieces of a step.
  template <typename Panel, typename T>
  __device__ static void load_left(const T* a, int first_row, int step, int lane,
                                   uint32_t (&left)[4]) {
    ptx::load_matrices(
        a + Panel::at(first_row + lane % 16, step * 2 * kPiece<T> + lane / 16 * kPiece<T>), left);
  }

  // Of all columns, 8 by 8, the two pieces of a step. One load is of 16 columns.
  static constexpr int kPairs = (kAcross + 1) / 2;
  template <typename Panel, typename T>
  __device__ static void load_right(const T* b, int first_col, int step, int lane,
                                    uint32_t (&right)[kPairs * 2][2]) {
#pragma unroll
    for (int m = 0; m < kPairs * 2; m += 2) {
      const int eight = m + 1 < kAcross ? m + lane / 16 : m;  // an odd one out is loaded twice
      uint32_t words[4];
      ptx::load_matrices(
          b + Panel::at(first_col + eight * 8 + lane % 8, (step * 2 + lane / 8 % 2) * kPiece<T>),
          words);
#pragma unroll
      for (int n = 0; n < 4; ++n) right[m + n / 2][n % 2] = words[n];
    }
  }
#endif
};

template <typename T, int kDown, int kAcross>
struct HalfProduct : PieceProduct<kDown, kAcross> {
  using Tile = PieceProduct<kDown, kAcross>;
  template <int rows>
  using Panel = PanelByRow<T, rows>;

  template <typename PanelA, typename PanelB>
  __device__ static void add(const T* a, const T* b, int first_row, int first_col, int lane,
                             float (&sums)[Tile::kSums]) {
#if defined(LINFUSE_TENSOR_CORES)
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t right[Tile::kPairs * 2][2];
      Tile::template load_right<PanelB>(b, first_col, step, lane, right);
#pragma unroll
      for (int m = 0; m < kDown; ++m) {
        uint32_t left[4];
        Tile::template load_left<PanelA>(a, first_row + m * 16, step, lane, left);
#pragma unroll
        for (int n = 0; n < kAcross; ++n) {
          ptx::multiply(T{}, left, right[n], sums + (m * kAcross + n) * 4);
        }
      }
    }
#else
    add_plainly<T, HalfProduct, PanelA, PanelB>(a, b, first_row, first_col, lane, sums);
#endif
  }
};

// A float as two numbers of 11 significant bits, which tensor cores take: the nearest, and what is
// then left, rounded as well; together they are off by 2^-24 of it at most. Where the float is not
// finite, or would round to what is not, one of them is not finite, and no product with it is a
// number: a card's NaN has all its bits set and would round to zero.
struct Split {
  uint32_t big;
  uint32_t small;

  LINFUSE_HD explicit Split(float value) {
    constexpr uint32_t kSeen = 0xffffe000;
    constexpr uint32_t kNaN = 0x7fc00000;
    big = (bits_of(value) + 0x1000) & kSeen;
    const float rest = value - float_of(big);
    small = rest == rest ? (bits_of(rest) + 0x1000) & kSeen : kNaN;
  }
};

}  // namespace detail

template <int kDown, int kAcross>
struct WarpProduct<Float16, kDown, kAcross> : detail::HalfProduct<Float16, kDown, kAcross> {};
template <int kDown, int kAcross>
struct WarpProduct<BFloat16, kDown, kAcross> : detail::HalfProduct<BFloat16, kDown, kAcross> {};

// float32 on tensor cores: big * big and both mixed products of each pair. Without the fourth, a
// product is off by about 2^-22 of itself at most, and as often up as down. Tensor cores cut their
// sums off in place of rounding them, so theirs are of one step and added up by FADD. Unlike with
// FMA, infinities and what lies within 2^-12 of the largest float make NaN, and below 2^-113 fewer
// bits are kept.
template <int kDown, int kAcross>
struct SplitProduct : detail::PieceProduct<kDown, kAcross> {
  using Tile = detail::PieceProduct<kDown, kAcross>;
  template <int rows>
  using Panel = PanelByRow<float, rows>;

  template <typename PanelA, typename PanelB>
  __device__ static void add(const float* a, const float* b, int first_row, int first_col, int lane,
                             float (&sums)[Tile::kSums]) {
    using detail::Split;
    float parts[Tile::kSums] = {};
#if defined(LINFUSE_TENSOR_CORES)
    // Makes words their upper parts, and puts the lower ones beside them.
    const auto split = [](uint32_t* words, uint32_t* small, int count) {
#pragma unroll
      for (int n = 0; n < count; ++n) {
        const Split pair(detail::float_of(words[n]));
        words[n] = pair.big;
        small[n] = pair.small;
      }
    };
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t right[Tile::kPairs * 2][2];
      uint32_t right_small[Tile::kPairs * 2][2];
      Tile::template load_right<PanelB>(b, first_col, step, lane, right);
#pragma unroll
      for (int n = 0; n < kAcross; ++n) split(right[n], right_small[n], 2);
#pragma unroll
      for (int m = 0; m < kDown; ++m) {
        uint32_t left[4];
        uint32_t left_small[4];
        Tile::template load_left<PanelA>(a, first_row + m * 16, step, lane, left);
        split(left, left_small, 4);
#pragma unroll
        for (int n = 0; n < kAcross; ++n) {
          float* const part = parts + (m * kAcross + n) * 4;
          ptx::multiply(float{}, left_small, right[n], part);
          ptx::multiply(float{}, left, right_small[n], part);
          ptx::multiply(float{}, left, right[n], part);
        }
      }
    }
#else
#pragma unroll
    for (int n = 0; n < Tile::kSums; ++n) {
      const int row = first_row + Tile::row(lane, n);
      const int col = first_col + Tile::col(lane, n);
      for (int k = 0; k < PanelA::kDepth; ++k) {
        const Split left(a[PanelA::at(row, k)]);
        const Split right(b[PanelB::at(col, k)]);
        parts[n] += detail::float_of(left.small) * detail::float_of(right.big);
        parts[n] += detail::float_of(left.big) * detail::float_of(right.small);
        parts[n] += detail::float_of(left.big) * detail::float_of(right.big);
      }
    }
#endif
#pragma unroll
    for (int n = 0; n < Tile::kSums; ++n) sums[n] += parts[n];
  }
};

// Writes the sums that a lane holds: of row r and column c to fused[to[r] + c * step], where to[r]
// is not -1 and c < cols.
template <typename Product, typename T>
__device__ inline void write_sums(const Accumulate<T>* sums, int first_row, int first_col, int lane,
                                  const int64_t* to, int64_t cols, int64_t step, T* fused) {
#pragma unroll
  for (int n = 0; n < Product::kSums; ++n) {
    const int64_t at = to[first_row + Product::row(lane, n)];
    const int col = first_col + Product::col(lane, n);
    if (at >= 0 && col < cols) fused[at + col * step] = static_cast<T>(sums[n]);
  }
}

}  // namespace linfuse
