// The instructions of tile_avx512_cpu.cpp, amx_cpu.cpp and their .inl in plain C++, for a machine
// that has only AVX2: included ahead of those files, whose names of instructions become the ones
// below. What each does is in Intel's Intrinsics Guide and Software Developer's Manual.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

// Vectors as the compiler's, which does arithmetic by element.
typedef uint16_t Words __attribute__((vector_size(64)));
typedef uint32_t Lanes __attribute__((vector_size(64)));
typedef uint16_t HalfWords __attribute__((vector_size(32)));

template <typename Vector>
Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename Vector>
void store(void* to, const Vector& vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// An aligned access of the processor faults where the address is not.
inline void check_aligned(const void* address, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) std::abort();
}

// Only the elements of the mask are touched, so that the others may lie beyond what can be read.
template <typename Vector>
Vector load_masked(uint32_t mask, const void* from) {
  uint16_t words[sizeof(Vector) / 2] = {};
  for (size_t n = 0; n < sizeof(Vector) / 2; ++n) {
    if ((mask >> n & 1) != 0) words[n] = load<uint16_t>(static_cast<const uint16_t*>(from) + n);
  }
  return load<Vector>(words);
}

// The tiles and the products of bfloat16 take and leave numbers below 2^-126 as zeros of their
// sign.
inline __m512 flush(const __m512& values) {
  const Lanes bits = (Lanes)values;
  return (__m512)((bits & 0x7fffffff) < 0x00800000 ? bits & 0x80000000 : bits);
}

// Of each pair of bfloat16, as float32.
inline __m512 lower_of(const __m512i& pairs) { return flush((__m512)((Lanes)pairs << 16)); }
inline __m512 upper_of(const __m512i& pairs) { return flush((__m512)((Lanes)pairs & 0xffff0000)); }

// The tile registers of a thread, and the shapes that were loaded for them.
struct Tiles {
  uint8_t shapes[64];
  bool configured;
  uint32_t line[8][16][16];

  int rows(int tile) const { return shapes[48 + tile]; }
  int row_bytes(int tile) const { return load<uint16_t>(shapes + 16 + 2 * tile); }
};

inline Tiles& tiles() {
  thread_local Tiles registers = {};
  return registers;
}

inline Tiles& configured_tiles() {
  if (!tiles().configured) std::abort();  // as the processor: an undefined instruction
  return tiles();
}

inline void tile_loadconfig(const void* from) {
  tiles() = {};
  std::memcpy(tiles().shapes, from, sizeof(tiles().shapes));
  tiles().configured = true;
}

inline void tile_release() { tiles() = {}; }

inline void tile_zero(int tile) {
  std::memset(configured_tiles().line[tile], 0, sizeof(tiles().line[tile]));
}

inline void tile_loadd(int tile, const void* from, int64_t stride) {
  tile_zero(tile);
  for (int m = 0; m < tiles().rows(tile); ++m) {
    const char* row = static_cast<const char*>(from) + m * stride;
    std::memcpy(tiles().line[tile][m], row, static_cast<size_t>(tiles().row_bytes(tile)));
  }
}

inline void tile_stored(int tile, void* to, int64_t stride) {
  for (int m = 0; m < configured_tiles().rows(tile); ++m) {
    char* row = static_cast<char*>(to) + m * stride;
    std::memcpy(row, tiles().line[tile][m], static_cast<size_t>(tiles().row_bytes(tile)));
  }
}

__attribute__((noinline)) inline void tile_dpbf16ps(int sum, int a, int b) {
  Tiles& registers = configured_tiles();
  const int pairs = registers.row_bytes(a) / 4;
  if (registers.rows(sum) != registers.rows(a) || registers.rows(b) != pairs ||
      registers.row_bytes(sum) != registers.row_bytes(b)) {
    std::abort();
  }
  for (int m = 0; m < registers.rows(sum); ++m) {
    __m512 lower = {};
    __m512 upper = {};
    for (int k = 0; k < pairs; ++k) {
      const __m512i one = (__m512i)(Lanes{} + registers.line[a][m][k]);
      const __m512i line = load<__m512i>(registers.line[b][k]);
      lower = flush(lower + lower_of(one) * lower_of(line));
      upper = flush(upper + upper_of(one) * upper_of(line));
    }
    const __m512 before = load<__m512>(registers.line[sum][m]);
    store(registers.line[sum][m], flush(flush(before) + flush(lower + upper)));
  }
}

inline __m512 cvtph_ps(__m256i halves) {
  __m512 wide;
  for (int n = 0; n < 16; ++n) wide[n] = _cvtsh_ss(((HalfWords)halves)[n]);
  return wide;
}

inline __m256i cvtps_ph(const __m512& wide) {
  HalfWords halves;
  for (int n = 0; n < 16; ++n) halves[n] = _cvtss_sh(wide[n], _MM_FROUND_TO_NEAREST_INT);
  return (__m256i)halves;
}

// Rounded to the nearest, ties to even; a NaN stays one.
inline Lanes to_bfloat16(const __m512& values) {
  const Lanes bits = (Lanes)flush(values);
  return (values != values ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline __m512bh cvtne2ps_pbh(const __m512& upper, const __m512& lower) {
  const HalfWords halves[] = {__builtin_convertvector(to_bfloat16(lower), HalfWords),
                              __builtin_convertvector(to_bfloat16(upper), HalfWords)};
  return load<__m512bh>(halves);
}

inline __m512 dpbf16_ps(const __m512& sums, const __m512bh& a, const __m512bh& b) {
  const __m512i first = (__m512i)a;
  const __m512i second = (__m512i)b;
  const __m512 upper = flush(sums + upper_of(first) * upper_of(second));
  return flush(upper + lower_of(first) * lower_of(second));
}

inline __m512i insert_upper(const __m512i& lower, const __m256i& upper) {
  __m512i both = lower;
  store(reinterpret_cast<char*>(&both) + sizeof(upper), upper);
  return both;
}

inline __m512i set_lower(const __m256i& lower) {
  __m512i both = {};
  store(&both, lower);
  return both;
}

inline __m512i widen_words(const __m256i& words) {
  return (__m512i) __builtin_convertvector((HalfWords)words, Lanes);
}

// The words of two vectors in turn, four from each 128 bits.
inline __m512i interleave(const __m512i& even, const __m512i& odd, int first) {
  Words both;
  for (int n = 0; n < 32; ++n) {
    const int from = n / 8 * 8 + first + n % 8 / 2;
    both[n] = n % 2 == 0 ? ((Words)even)[from] : ((Words)odd)[from];
  }
  return (__m512i)both;
}

inline __m512i permute_words(const __m512i& order, const __m512i& words) {
  Words to;
  for (int n = 0; n < 32; ++n) to[n] = ((Words)words)[((Words)order)[n] % 32];
  return (__m512i)to;
}

inline __m512i set_lanes(int value) { return (__m512i)(Lanes{} + static_cast<uint32_t>(value)); }

inline __m512i greater(const __m512i& a, const __m512i& b) {
  return (__m512i)((Lanes)a > (Lanes)b ? (Lanes)a : (Lanes)b);
}

inline void stream(void* to, const __m512i& vector) {
  check_aligned(to, 64);
  store(to, vector);
}

inline __m512i load_aligned(const void* from) {
  check_aligned(from, 64);
  return load<__m512i>(from);
}

// What simd_cpu.cpp asks of the processor and of the system.
inline int cpuid(unsigned* c, unsigned* d) {
  *c = 0;
  *d = 1u << 22 | 1u << 24;
  return 1;
}

inline long permit_tiles(long what, unsigned long* permitted) {
  constexpr long kGetPermission = 0x1022;
  if (what == kGetPermission) *permitted = 1ul << 18;
  return 0;
}

inline long permit_tiles(long, long) { return 0; }

}  // namespace emulated

#define __builtin_cpu_supports(name) true
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) emulated::cpuid(c, d)
#define syscall(number, what, value) emulated::permit_tiles(what, value)

#define _tile_loadconfig(from) emulated::tile_loadconfig(from)
#define _tile_release() emulated::tile_release()
#undef _tile_loadd
#define _tile_loadd(tile, from, stride) emulated::tile_loadd(tile, from, stride)
#undef _tile_stored
#define _tile_stored(tile, to, stride) emulated::tile_stored(tile, to, stride)
#undef _tile_zero
#define _tile_zero(tile) emulated::tile_zero(tile)
#undef _tile_dpbf16ps
#define _tile_dpbf16ps(sum, a, b) emulated::tile_dpbf16ps(sum, a, b)

#define _mm256_maskz_loadu_epi16(mask, from) emulated::load_masked<__m256i>(mask, from)
#define _mm512_maskz_loadu_epi16(mask, from) emulated::load_masked<__m512i>(mask, from)
#define _mm512_loadu_ps(from) emulated::load<__m512>(from)
#define _mm512_loadu_si512(from) emulated::load<__m512i>(from)
#define _mm512_load_si512(from) emulated::load_aligned(from)
#define _mm512_storeu_ps(to, vector) emulated::store(to, vector)
#define _mm512_storeu_si512(to, vector) emulated::store(to, vector)
#define _mm512_stream_si512(to, vector) emulated::stream(to, vector)
#define _mm512_setzero_ps() (__m512{})
#define _mm512_set1_epi32(value) emulated::set_lanes(value)
#define _mm512_add_ps(a, b) ((__m512)(a) + (__m512)(b))
#define _mm512_sub_ps(a, b) ((__m512)(a) - (__m512)(b))
#define _mm512_sub_epi32(a, b) ((__m512i)((emulated::Lanes)(a) - (emulated::Lanes)(b)))
#define _mm512_max_epu32(a, b) emulated::greater(a, b)
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_or_si512(a, b) ((a) | (b))
#define _mm512_xor_si512(a, b) ((a) ^ (b))
#define _mm512_slli_epi32(a, bits) ((__m512i)((emulated::Lanes)(a) << (bits)))
#define _mm512_srli_epi32(a, bits) ((__m512i)((emulated::Lanes)(a) >> (bits)))
#define _mm512_castps_si512(a) ((__m512i)(a))
#define _mm512_castsi512_ps(a) ((__m512)(a))
#define _mm512_castsi256_si512(a) emulated::set_lower(a)
#define _mm512_castsi512_si256(a) emulated::load<__m256i>(&(a))
#define _mm512_inserti64x4(a, b, half) emulated::insert_upper(a, b)
#define _mm512_cvtepu16_epi32(words) emulated::widen_words(words)
#define _mm512_cvtph_ps(halves) emulated::cvtph_ps(halves)
#define _mm512_cvtps_ph(wide, rounding) emulated::cvtps_ph(wide)
#define _mm512_cvtne2ps_pbh(upper, lower) emulated::cvtne2ps_pbh(upper, lower)
#define _mm512_dpbf16_ps(sums, a, b) emulated::dpbf16_ps(sums, a, b)
#define _mm512_permutexvar_epi16(order, words) emulated::permute_words(order, words)
#define _mm512_unpacklo_epi16(even, odd) emulated::interleave(even, odd, 0)
#define _mm512_unpackhi_epi16(even, odd) emulated::interleave(even, odd, 4)
