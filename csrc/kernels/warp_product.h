// A warp's share of a matrix product whose operands lie in shared memory:
//
//   sum[row, col] += sum over k < kDepth of a[row, k] * b[col, k]
//
// on the units that a card has for the type: FMA for float32, tensor cores for the others (exact
// products, sums in float32 or float64). The only file with PTX in it. Whoever compiles for another
// target, the tests' host shim and cards before compute capability 8.0 among them, gets the same
// sums by plain C++: each thread computes those that it holds.
//
// Terms
//   panel   one operand of a block, kRows rows by kDepth, in the order that suits the unit
//   lane    a thread of the warp; it holds kSums elements, of which element n is at
//           (row(lane, n), col(lane, n))
#pragma once

#include <cstdint>

#include "dtype.h"

#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 800
#define LINFUSE_TENSOR_CORES
#endif
#endif

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

// Rows of kDepth, padded by 16 bytes: 8 rows of 16 bytes meet no bank twice.
template <typename T, int kRowCount>
struct PanelByRow {
  static constexpr int kRows = kRowCount;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
  static constexpr int kStride = kDepth + 16 / static_cast<int>(sizeof(T));
  static constexpr int kSize = kRows * kStride;
  LINFUSE_HD static constexpr int at(int row, int k) { return row * kStride + k; }

  template <int count>
  LINFUSE_HD static void store(T* panel, int row, int k, const T (&values)[count]) {
    constexpr int kPiece = count * sizeof(T) < 16 ? count : 16 / static_cast<int>(sizeof(T));
    struct alignas(kPiece * sizeof(T)) Piece {
      T at[kPiece];
    };
#pragma unroll
    for (int n = 0; n < count; n += kPiece) {
      Piece piece;
#pragma unroll
      for (int m = 0; m < kPiece; ++m) piece.at[m] = values[n + m];
      *reinterpret_cast<Piece*>(panel + at(row, k + n)) = piece;
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
    return n / (kAcross * 16) * 32 + lane / 4 * 4 + n / (kAcross * 4) % 4;
  }
  LINFUSE_HD static int col(int lane, int n) { return n / 4 % kAcross * 16 + lane % 4 * 4 + n % 4; }

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
        asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+d"(sums[2 * n]), "+d"(sums[2 * n + 1])
            : "d"(left[n / kAcross]), "d"(right[n % kAcross]));
      }
    }
#else
    detail::add_plainly<double, WarpProduct, PanelA, PanelB>(a, b, first_row, first_col, lane,
                                                             sums);
#endif
  }
};

namespace detail {

#if defined(LINFUSE_TENSOR_CORES)
// Four matrices of 8 rows of 16 bytes; lane n names row n % 8 of matrix n / 8.
template <typename T>
__device__ inline void load_matrices(const T* row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

#define LINFUSE_MMA(type)                                                    \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

__device__ inline void multiply(Float16, const uint32_t* a, const uint32_t* b, float* sums) {
  LINFUSE_MMA("f16");
}
__device__ inline void multiply(BFloat16, const uint32_t* a, const uint32_t* b, float* sums) {
  LINFUSE_MMA("bf16");
}
#undef LINFUSE_MMA
#endif

// Tensor cores, 16 by 8 by 16.
template <typename T, int kDown, int kAcross>
struct HalfProduct {
  static constexpr int kRows = kDown * 16;
  static constexpr int kCols = kAcross * 8;
  static constexpr int kSums = kDown * kAcross * 4;
  template <int rows>
  using Panel = PanelByRow<T, rows>;

  LINFUSE_HD static int row(int lane, int n) {
    return n / 4 / kAcross * 16 + n / 2 % 2 * 8 + lane / 4;
  }
  LINFUSE_HD static int col(int lane, int n) { return n / 4 % kAcross * 8 + lane % 4 * 2 + n % 2; }

  template <typename PanelA, typename PanelB>
  __device__ static void add(const T* a, const T* b, int first_row, int first_col, int lane,
                             float (&sums)[kSums]) {
#if defined(LINFUSE_TENSOR_CORES)
    static_assert(PanelA::kDepth == 32, "one load of b is two steps of 16");
    uint32_t right[kAcross][4];
#pragma unroll
    for (int m = 0; m < kAcross; ++m) {
      load_matrices(b + PanelB::at(first_col + m * 8 + lane % 8, lane / 8 * 8), right[m]);
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int m = 0; m < kDown; ++m) {
        uint32_t left[4];
        load_matrices(a + PanelA::at(first_row + m * 16 + lane % 16, step * 16 + lane / 16 * 8),
                      left);
#pragma unroll
        for (int n = 0; n < kAcross; ++n) {
          multiply(T{}, left, right[n] + step * 2, sums + (m * kAcross + n) * 4);
        }
      }
    }
#else
    add_plainly<T, HalfProduct, PanelA, PanelB>(a, b, first_row, first_col, lane, sums);
#endif
  }
};

}  // namespace detail

template <int kDown, int kAcross>
struct WarpProduct<Float16, kDown, kAcross> : detail::HalfProduct<Float16, kDown, kAcross> {};
template <int kDown, int kAcross>
struct WarpProduct<BFloat16, kDown, kAcross> : detail::HalfProduct<BFloat16, kDown, kAcross> {};

}  // namespace linfuse
