// The instructions of a card that C++ has no words for, and the only file with PTX in it.
//
// Copies have a plain meaning, for whoever compiles for another target: the tests' host shim, and
// cards before compute capability 8.0. Those of a whole warp have none here, as one thread alone
// cannot say what they do; warp_product.h, which calls them, says what their sums are.
#pragma once

#include <cstdint>

#include "dtype.h"

#if !defined(__CUDACC__)
#include <vector>
#endif

#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 800
#define LINFUSE_TENSOR_CORES
#endif
#endif

namespace linfuse {

// What ldmatrix and the copies move at once.
constexpr int kPieceBytes = 16;
template <typename T>
constexpr int kPiece = kPieceBytes / static_cast<int>(sizeof(T));  // in elements

struct alignas(kPieceBytes) [[gnu::may_alias]] Piece {
  uint32_t at[4];
};

// Copies from global to shared memory that go on while the thread does, in batches. What a batch
// copies may be looked at after wait(), and by others after a barrier behind it.
//
// The plain meaning is the worst that the instructions allow: what is to be written is spoilt when
// a copy begins, and there when it was waited for.
class AsyncCopies {
 public:
  // Copies one piece; without is_there, writes zeros and does not read. Both are aligned to it.
  __device__ void copy(void* to, const void* from, bool is_there) {
#if defined(LINFUSE_TENSOR_CORES)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from),
                   "r"(is_there ? kPieceBytes : 0)
                 : "memory");
#elif defined(__CUDACC__)
    *static_cast<Piece*>(to) = is_there ? *static_cast<const Piece*>(from) : Piece{};
#else
    constexpr uint32_t kSpoilt = 0xffffffff;
    auto* const piece = static_cast<Piece*>(to);
    *piece = {{kSpoilt, kSpoilt, kSpoilt, kSpoilt}};
    begun_.push_back({piece, is_there ? static_cast<const Piece*>(from) : nullptr});
#endif
  }

  // Makes the copies begun since the last commit() a batch, be it an empty one.
  __device__ void commit() {
#if defined(LINFUSE_TENSOR_CORES)
    asm volatile("cp.async.commit_group;" : : : "memory");
#elif !defined(__CUDACC__)
    batches_.push_back(begun_);
    begun_.clear();
#endif
  }

  // Waits for all batches but the last kLater.
  template <int kLater>
  __device__ void wait() {
#if defined(LINFUSE_TENSOR_CORES)
    asm volatile("cp.async.wait_group %0;" : : "n"(kLater) : "memory");
#elif !defined(__CUDACC__)
    while (batches_.size() > kLater) {
      for (const Copy& copy : batches_.front()) {
        *copy.to = copy.from != nullptr ? *copy.from : Piece{};
      }
      batches_.erase(batches_.begin());
    }
#endif
  }

#if !defined(__CUDACC__)
 private:
  struct Copy {
    Piece* to;
    const Piece* from;  // null for zeros
  };
  std::vector<Copy> begun_;
  std::vector<std::vector<Copy>> batches_;
#endif
};

#if defined(LINFUSE_TENSOR_CORES)
namespace ptx {

// Four matrices of 8 rows of a piece; lane n names row n % 8 of matrix n / 8, and gets 4 bytes of
// each: word n % 4 of row n / 4.
template <typename T>
__device__ inline void load_matrices(const T* row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// sums += a * b, 16 by 8, over two pieces of a row: 16 halves, or 8 floats of which the tensor
// cores see the upper 19 bits.
#define LINFUSE_MMA(shape, type)                                             \
  asm("mma.sync.aligned." shape ".row.col.f32." type "." type                \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

__device__ inline void multiply(Float16, const uint32_t* a, const uint32_t* b, float* sums) {
  LINFUSE_MMA("m16n8k16", "f16");
}
__device__ inline void multiply(BFloat16, const uint32_t* a, const uint32_t* b, float* sums) {
  LINFUSE_MMA("m16n8k16", "bf16");
}
__device__ inline void multiply(float, const uint32_t* a, const uint32_t* b, float* sums) {
  LINFUSE_MMA("m16n8k8", "tf32");
}
#undef LINFUSE_MMA

// The same in double, 8 by 8 by 4.
__device__ inline void multiply(double a, double b, double* sums) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(sums[0]), "+d"(sums[1])
      : "d"(a), "d"(b));
}

}  // namespace ptx
#endif

}  // namespace linfuse
