// See amx.h. Of the eight tile registers four are sums (2 of c_in x 2 of f), two hold weights and
// two the Linear: four products share four loads, which mostly come from the second-level cache.
#include <cstring>
#include <type_traits>
#include <utility>

#include "amx.h"
#include "simd_kernels.h"

#if defined(__x86_64__) && __has_include(<amxbf16intrin.h>)

#if !defined(__clang__)
// GCC 12 says so of its own intrinsics, which leave a masked operand open on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

// After the headers, as in tile_avx512_cpu.cpp: what is compiled for newer machines stays here.
#if defined(__clang__)
#pragma clang attribute push(                                                                   \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#endif

namespace linfuse {
namespace {

constexpr int kVectorBytes = 64;
#include "turn.inl"

constexpr int kLanes = Amx::kLanes;
using PairBlock = Block<int32_t>;  // one pair a lane

void start(const AmxShapes& shapes) { _tile_loadconfig(&shapes); }
void stop() { _tile_release(); }

// Sums are registers 2 m + n, weights 4 + m, the Linear 6 + n. The numbers must be literals.
template <int kC, int kF>
void multiply(const AmxTask& task, float* tile) {
  const int64_t line_bytes = task.linear_line * int64_t{sizeof(Pair)};
  const int64_t depth_bytes = task.depth * int64_t{sizeof(Pair)};
  const int64_t weight_tile = task.rows * task.depth;
  const auto clear = []() {
    _tile_zero(0);
    if constexpr (kF > 1) _tile_zero(1);
    if constexpr (kC > 1) _tile_zero(2);
    if constexpr (kC > 1 && kF > 1) _tile_zero(3);
  };
  const auto store = [&](float* to, int64_t width) {
    const int64_t bytes = width * int64_t{sizeof(float)};
    _tile_stored(0, to, bytes);
    if constexpr (kF > 1) _tile_stored(1, to + kLanes, bytes);
    if constexpr (kC > 1) _tile_stored(2, to + task.rows * width, bytes);
    if constexpr (kC > 1 && kF > 1) _tile_stored(3, to + task.rows * width + kLanes, bytes);
  };
  bool first = true;
  const auto flush = [&]() {
    if (first) {
      store(tile, task.width);
      first = false;
      return;
    }
    alignas(64) float more[Amx::kMostRows * kC * kLanes * kF];
    store(more, kLanes * kF);
    for (int64_t n = 0; n < task.rows * kC; ++n) {
      for (int f = 0; f < kF * kLanes; f += kLanes) {
        float* to = tile + n * task.width + f;
        _mm512_storeu_ps(
            to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_loadu_ps(more + n * kLanes * kF + f)));
      }
    }
  };

  clear();
  int64_t room = kFlushAfter;
  for (int64_t t = 0; t < task.taps; ++t) {
    const Pair* linear = task.linear + task.linear_start[t];
    const Pair* weight = task.weight + task.kernel[t] * task.weight_step;
    for (int64_t part = 0; part < task.parts; ++part) {
      _tile_loadd(6, linear, line_bytes);
      if constexpr (kF > 1) _tile_loadd(7, linear + kLanes, line_bytes);
      for (int64_t factor = 0; factor < task.factors; ++factor) {
        _tile_loadd(4, weight, depth_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kF > 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (kC > 1) {
          _tile_loadd(5, weight + weight_tile, depth_bytes);
          _tile_dpbf16ps(2, 5, 6);
          if constexpr (kF > 1) _tile_dpbf16ps(3, 5, 7);
        }
        weight += kC * weight_tile;
        // An instruction adds the sum of its pairs to each sum: one rounding of a chain.
        if (--room == 0) {
          flush();
          clear();
          room = kFlushAfter;
        }
      }
      linear += task.depth * task.linear_line;
    }
  }
  flush();
}

// Some positions of a line's channels and kLanes rows.
template <typename T>
struct Source {
  const T* from;
  int64_t row_stride;
  int64_t channel_stride;
  int64_t last_row;  // repeated in the lanes behind it, which nobody reads
  int64_t channels;  // that exist: none or fewer where lines go beyond them
  int64_t count;
};

// Positions that are turned at a time.
template <typename T>
constexpr int kPositions = kLanes * AmxPairs<T>::kChannels;

// The first `count` of up to 32 elements.
inline __mmask32 first_of(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// The factors of conv_bias, in every lane.
template <typename T>
struct Scales {
  __m512bh factor[AmxPairs<T>::kFactors];
};

inline __m512bh every_lane(Pair pair) {
  int32_t bits;
  std::memcpy(&bits, &pair, sizeof(bits));
  return (__m512bh)_mm512_set1_epi32(bits);
}

inline Scales<BFloat16> scales_of(const BFloat16* scale, int64_t channels) {
  Pair pair = {};
  for (int n = 0; n < 2 && n < channels; ++n) pair.half[n] = scale[n];
  return {{every_lane(pair)}};
}

inline Scales<Float16> scales_of(const Float16* scale, int64_t channels) {
  const Pair parts = channels > 0 ? split(*scale) : Pair{};
  return {{every_lane({parts.half[0], parts.half[0]}), every_lane({parts.half[1], parts.half[1]})}};
}

template <typename T>
inline __attribute__((always_inline)) void store_pairs(const AmxPackTask<T>& task, __m512i pairs,
                                                       Pair* to, const Scales<T>& scales,
                                                       __m512& sums) {
  if (to != nullptr) {
    task.stream ? _mm512_stream_si512(reinterpret_cast<__m512i*>(to), pairs)
                : _mm512_storeu_si512(to, pairs);
  }
  if (task.sums != nullptr) {
    for (const __m512bh& scale : scales.factor) {
      sums = _mm512_dpbf16_ps(sums, (__m512bh)pairs, scale);
    }
  }
}

// Writes a turned block, whose line n is position first + n / 4 * step4 + n % 4.
template <bool kWhole, typename T>
inline __attribute__((always_inline)) void store_block(const AmxPackTask<T>& task,
                                                       const PairBlock& block, int64_t first,
                                                       int64_t step4, int64_t count, Pair* to,
                                                       const Scales<T>& scales, __m512& sums) {
#pragma GCC unroll 16
  for (int n = 0; n < kLanes; ++n) {
    const int64_t position = first + n / 4 * step4 + n % 4;
    if (!kWhole && position >= count) continue;
    store_pairs(task, (__m512i)block.line[n], to == nullptr ? to : to + position * task.step,
                scales, sums);
  }
}

template <typename T>
inline const T* row_of(const Source<T>& source, int64_t f) {
  return source.from + (f < source.last_row ? f : source.last_row) * source.row_stride;
}

template <bool kWhole>
inline __m512i load_elements(const BFloat16* from, __mmask32 mask) {
  if constexpr (kWhole) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi16(mask, from);
}

// Two channels make two blocks. Interleaving vectors leaves the positions 0 to 3, 8 to 11, ... to
// the first and 4 to 7, 12 to 15, ... to the second.
template <bool kWhole>
void pack_positions(const AmxPackTask<BFloat16>& task, const Source<BFloat16>& source, Pair* to,
                    const Scales<BFloat16>& scales, __m512& sums) {
  const __mmask32 lower = source.channels > 0 ? first_of(source.count) : 0;
  const __mmask32 upper = source.channels > 1 ? first_of(source.count) : 0;
  for (int half = 0; half < 2 && half * 4 < source.count; ++half) {
    PairBlock block;
#pragma GCC unroll 16
    for (int f = 0; f < kLanes; ++f) {
      const BFloat16* row = row_of(source, f);
      const __m512i even = load_elements<kWhole>(row, lower);
      const __m512i odd = load_elements<kWhole>(row + source.channel_stride, upper);
      block.line[f] = (PairBlock::Vector)(half == 0 ? _mm512_unpacklo_epi16(even, odd)
                                                    : _mm512_unpackhi_epi16(even, odd));
    }
    block.turn();
    store_block<kWhole>(task, block, half * 4, 8, source.count, to, scales, sums);
  }
}

// split() of 16 elements.
inline __m512i split_elements(__m256i halves) {
  const __m512 wide = _mm512_cvtph_ps(halves);
  const __m512i bits = _mm512_castps_si512(wide);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i one = _mm512_set1_epi32(1);
  const __m512i smaller = _mm512_sub_epi32(_mm512_max_epu32(magnitude, one), one);
  const __m512i upper_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512i sign = _mm512_xor_si512(bits, magnitude);
  const __m512i high = _mm512_or_si512(sign, _mm512_and_si512(smaller, upper_half));
  const __m512i low = _mm512_castps_si512(_mm512_sub_ps(wide, _mm512_castsi512_ps(high)));
  return _mm512_or_si512(_mm512_srli_epi32(high, 16), _mm512_and_si512(low, upper_half));
}

template <bool kWhole>
void pack_positions(const AmxPackTask<Float16>& task, const Source<Float16>& source, Pair* to,
                    const Scales<Float16>& scales, __m512& sums) {
  const auto mask = static_cast<__mmask16>(source.channels > 0 ? first_of(source.count) : 0);
  PairBlock block;
#pragma GCC unroll 16
  for (int f = 0; f < kLanes; ++f) {
    const Float16* row = row_of(source, f);
    block.line[f] = (PairBlock::Vector)split_elements(
        kWhole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row))
               : _mm256_maskz_loadu_epi16(mask, row));
  }
  block.turn();
  store_block<kWhole>(task, block, 0, 4, source.count, to, scales, sums);
}

// The pairs of one position, of rows that lie side by side.
inline __m512i pairs_of(const Source<BFloat16>& source, const BFloat16* from, __mmask16 rows) {
  const __m256i even = _mm256_maskz_loadu_epi16(source.channels > 0 ? rows : __mmask16{0}, from);
  const __m256i odd = _mm256_maskz_loadu_epi16(source.channels > 1 ? rows : __mmask16{0},
                                               from + source.channel_stride);
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

inline __m512i pairs_of(const Source<Float16>& source, const Float16* from, __mmask16 rows) {
  return split_elements(_mm256_maskz_loadu_epi16(source.channels > 0 ? rows : __mmask16{0}, from));
}

template <typename T>
void pack_lines(const AmxPackTask<T>& task, const Source<T>& source, Pair* to,
                const Scales<T>& scales, __m512& sums) {
  const auto rows = static_cast<__mmask16>(first_of(source.last_row + 1));
  for (int64_t n = 0; n < source.count; ++n) {
    store_pairs(task, pairs_of(source, source.from + n * task.position_stride, rows),
                to == nullptr ? to : to + n * task.step, scales, sums);
  }
}

template <typename T>
void pair_positions(const T* from, int64_t channel_stride, int64_t channels, int64_t count,
                    Pair* to) {
  Source<T> source = {};
  source.channel_stride = channel_stride;
  source.channels = channels;
  for (int64_t n = 0; n < count; n += kLanes) {
    const auto some = static_cast<__mmask16>(first_of(count - n < kLanes ? count - n : kLanes));
    const __m512i pairs = pairs_of(source, from + n, some);
    if (count - n >= kLanes) {
      _mm512_storeu_si512(to + n, pairs);
      continue;
    }
    alignas(64) Pair last[kLanes];
    _mm512_storeu_si512(last, pairs);
    std::memcpy(to + n, last, static_cast<size_t>(count - n) * sizeof(Pair));
  }
}

template <typename T>
void pack_pairs(const AmxPackTask<T>& task) {
  constexpr int kChannels = AmxPairs<T>::kChannels;
  T copy[kLanes][kChannels][kPositions<T>];
  for (int v = 0; v < task.vectors; ++v) {
    const int64_t rows = task.rows - v * kLanes < kLanes ? task.rows - v * kLanes : kLanes;
    for (int64_t line = 0; line < task.lines; ++line) {
      const int64_t left = task.channels - line * kChannels;
      Source<T> source = {};
      source.row_stride = task.row_stride;
      source.channel_stride = task.channel_stride;
      source.last_row = rows - 1;
      source.channels = left < kChannels ? left : kChannels;
      const T* channel =
          task.from + v * kLanes * task.row_stride + line * kChannels * task.channel_stride;
      Scales<T> scales = {};
      if (task.sums != nullptr) scales = scales_of(task.scale + line * kChannels, source.channels);
      for (int64_t first = 0; first < task.count; first += kPositions<T>) {
        source.from = channel + first * task.position_stride;
        source.count =
            task.count - first < kPositions<T> ? task.count - first : int64_t{kPositions<T>};
        const bool by_line = task.position_stride != 1 && task.row_stride == 1;
        if (task.position_stride != 1 && !by_line) {
          for (int64_t f = 0; f < rows; ++f) {
            for (int64_t c = 0; c < source.channels; ++c) {
              const T* from = source.from + f * task.row_stride + c * task.channel_stride;
              for (int64_t n = 0; n < source.count; ++n) {
                copy[f][c][n] = from[n * task.position_stride];
              }
            }
          }
          source.from = copy[0][0];
          source.row_stride = kChannels * kPositions<T>;
          source.channel_stride = kPositions<T>;
        }
        Pair* to = task.to == nullptr
                       ? nullptr
                       : task.to + first * task.step + line * task.width + v * kLanes;
        __m512 sums = _mm512_setzero_ps();
        if (by_line) {
          pack_lines(task, source, to, scales, sums);
        } else if (source.count == kPositions<T> && source.channels == kChannels) {
          pack_positions<true>(task, source, to, scales, sums);
        } else {
          pack_positions<false>(task, source, to, scales, sums);
        }
        if (task.sums != nullptr) {
          add_to_sums<float>((Block<float>::Vector)sums, task.sums + v * kLanes);
        }
      }
    }
  }
}

// Rounded: the first in the lower half.
template <typename T>
inline __m512i round_both(__m512 first, __m512 second);
template <>
inline __m512i round_both<BFloat16>(__m512 first, __m512 second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}
template <>
inline __m512i round_both<Float16>(__m512 first, __m512 second) {
  return _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm512_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT)),
      _mm512_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT), 1);
}

// Two neighbouring positions make one 32-bit lane, so that a block turns 32 positions.
template <typename T>
void unpack_pairs(const UnpackTask<T>& task) {
  constexpr int kAtATime = 32;
  alignas(64) uint16_t interleave[kAtATime];
  for (uint16_t n = 0; n < kAtATime; ++n) {
    interleave[n] = static_cast<uint16_t>(n / 2 + n % 2 * 16);
  }
  const __m512i order = _mm512_load_si512(interleave);
  unpack_by<kAtATime>(task, [&](const float* from, int64_t count, T* to) {
    PairBlock block;
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) {
      // Beyond the last position anything will do.
      const int64_t first = 2 * n < count ? 2 * n : 0;
      const int64_t second = 2 * n + 1 < count ? 2 * n + 1 : 0;
      const __m512i both = round_both<T>(_mm512_loadu_ps(from + first * task.step),
                                         _mm512_loadu_ps(from + second * task.step));
      block.line[n] = (PairBlock::Vector)_mm512_permutexvar_epi16(order, both);
    }
    block.turn();
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) {
      _mm512_storeu_si512(to + n * kStretch, (__m512i)block.line[n]);
    }
  });
}

template <typename T>
void round_lines(const UnpackTask<T>& task) {
  constexpr int kMostRows = TileSet<float>::kMostVectors * kLanes;
  alignas(64) T line[kMostRows];
  for (int64_t n = 0; n < task.count; ++n) {
    const float* from = task.from + n * task.step;
    for (int64_t f = 0; f < task.rows; f += kLanes) {
      const __m512i both = round_both<T>(_mm512_loadu_ps(from + f), _mm512_setzero_ps());
      _mm256_store_si256(reinterpret_cast<__m256i*>(line + f), _mm512_castsi512_si256(both));
    }
    copy_run(reinterpret_cast<char*>(task.to + n * task.stride),
             reinterpret_cast<const char*>(line), task.rows * static_cast<int64_t>(sizeof(T)),
             task.stream);
  }
}

constexpr AmxKernels kKernels = {
    {&pair_positions<BFloat16>, &pack_pairs<BFloat16>, &unpack_pairs<BFloat16>,
     &round_lines<BFloat16>},
    {&pair_positions<Float16>, &pack_pairs<Float16>, &unpack_pairs<Float16>, &round_lines<Float16>},
    &start,
    &stop,
    {{}, {nullptr, &multiply<1, 1>, &multiply<1, 2>}, {nullptr, &multiply<2, 1>, &multiply<2, 2>}}};

}  // namespace
}  // namespace linfuse

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// For any machine: whoever asks does not know yet what this one has.
const linfuse::AmxKernels* linfuse::amx_kernels() { return &kKernels; }

const linfuse::SimdKernels& linfuse::simd_kernels_amx() {
  static const SimdKernels kernels = [] {
    SimdKernels made = simd_kernels_avx512();
    made.TurnSet<BFloat16>::unpack = kKernels.AmxTurns<BFloat16>::unpack;
    made.TurnSet<Float16>::unpack = kKernels.AmxTurns<Float16>::unpack;
    made.TurnSet<BFloat16>::unpack_lines = kKernels.AmxTurns<BFloat16>::unpack_lines;
    made.TurnSet<Float16>::unpack_lines = kKernels.AmxTurns<Float16>::unpack_lines;
    return made;
  }();
  return kernels;
}

#else

const linfuse::AmxKernels* linfuse::amx_kernels() { return nullptr; }

#if defined(__x86_64__)
const linfuse::SimdKernels& linfuse::simd_kernels_amx() { return simd_kernels_avx512(); }
#endif

#endif
