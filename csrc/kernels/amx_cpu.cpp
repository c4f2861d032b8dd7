// See amx.h. Of the eight tile registers four are sums (2 of c_in x 2 of f), two hold weights and
// two the Linear: four products share four loads, which mostly come from the second-level cache.
#include <cstring>
#include <type_traits>
#include <utility>

#include "amx.h"
#include "simd_kernels.h"

#if defined(__x86_64__) && __has_include(<amxbf16intrin.h>)

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
  const int64_t width_bytes = task.width * int64_t{sizeof(Pair)};
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
      _tile_loadd(6, linear, width_bytes);
      if constexpr (kF > 1) _tile_loadd(7, linear + kLanes, width_bytes);
      _tile_loadd(4, weight, depth_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kF > 1) _tile_dpbf16ps(1, 4, 7);
      if constexpr (kC > 1) {
        _tile_loadd(5, weight + weight_tile, depth_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kF > 1) _tile_dpbf16ps(3, 5, 7);
      }
      linear += task.depth * task.width;
      weight += kC * weight_tile;
      // One product adds the sum of its pairs to each sum: one rounding of a chain.
      if (--room == 0) {
        flush();
        clear();
        room = kFlushAfter;
      }
    }
  }
  flush();
}

// Elements of one row as the halves of a vector's 32-bit lanes.
template <bool kWhole>
inline __m512i load_elements(const BFloat16* from, __mmask32 mask) {
  if constexpr (kWhole) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi16(mask, from);
}

constexpr int kPositions = 32;

inline __mmask32 first_of(int64_t count) {
  return count >= kPositions ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// Some positions of two channels and kLanes rows.
struct Source {
  const BFloat16* from;
  int64_t row_stride;
  int64_t channel_stride;
  int64_t last_row;  // repeated in the lanes behind it, which nobody reads
  int64_t channels;  // 2, or fewer where the lines go beyond them
  int64_t count;
};

// The pairs of up to 32 positions, in two blocks. Interleaving two vectors leaves the positions 0
// to 3, 8 to 11, ... to the first block and 4 to 7, 12 to 15, ... to the second.
template <bool kWhole>
void pack_positions(const AmxPackTask& task, const Source& source, Pair* to, __m512bh scale,
                    __m512& sums) {
  const __mmask32 lower = source.channels > 0 ? first_of(source.count) : 0;
  const __mmask32 upper = source.channels > 1 ? first_of(source.count) : 0;
  for (int half = 0; half < 2 && half * 4 < source.count; ++half) {
    PairBlock block;
#pragma GCC unroll 16
    for (int f = 0; f < kLanes; ++f) {
      const BFloat16* row =
          source.from + (f < source.last_row ? f : source.last_row) * source.row_stride;
      const __m512i even = load_elements<kWhole>(row, lower);
      const __m512i odd = load_elements<kWhole>(row + source.channel_stride, upper);
      block.line[f] = (PairBlock::Vector)(half == 0 ? _mm512_unpacklo_epi16(even, odd)
                                                    : _mm512_unpackhi_epi16(even, odd));
    }
    block.turn();
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) {
      const int64_t position = n / 4 * 8 + half * 4 + n % 4;
      if (!kWhole && position >= source.count) continue;
      if (to != nullptr) _mm512_storeu_si512(to + position * task.step, (__m512i)block.line[n]);
      if (task.sums != nullptr) sums = _mm512_dpbf16_ps(sums, (__m512bh)block.line[n], scale);
    }
  }
}

// conv_bias of the channels of a line, in every lane; zero where there is no channel.
inline __m512bh scales_of(const AmxPackTask& task, int64_t line, int64_t channels) {
  Pair scale = {};
  for (int n = 0; n < 2 && n < channels; ++n) scale.channel[n] = task.scale[2 * line + n];
  int32_t bits;
  std::memcpy(&bits, &scale, sizeof(bits));
  return (__m512bh)_mm512_set1_epi32(bits);
}

void pack_pairs(const AmxPackTask& task) {
  BFloat16 copy[kLanes][2][kPositions];
  for (int v = 0; v < task.vectors; ++v) {
    const BFloat16* rows = task.from + v * kLanes * task.row_stride;
    for (int64_t line = 0; line < task.lines; ++line) {
      Source source = {};
      source.row_stride = task.row_stride;
      source.channel_stride = task.channel_stride;
      source.last_row =
          task.rows - 1 - v * kLanes < kLanes ? task.rows - 1 - v * kLanes : kLanes - 1;
      source.channels = task.channels - 2 * line < 2 ? task.channels - 2 * line : 2;
      const __m512bh scales =
          task.sums == nullptr ? __m512bh{} : scales_of(task, line, source.channels);
      for (int64_t first = 0; first < task.count; first += kPositions) {
        source.from = rows + 2 * line * task.channel_stride + first * task.position_stride;
        source.count = task.count - first < kPositions ? task.count - first : kPositions;
        if (task.position_stride != 1) {
          for (int64_t f = 0; f <= source.last_row; ++f) {
            for (int64_t c = 0; c < source.channels; ++c) {
              const BFloat16* from = source.from + f * task.row_stride + c * task.channel_stride;
              for (int64_t n = 0; n < source.count; ++n) {
                copy[f][c][n] = from[n * task.position_stride];
              }
            }
          }
          source.from = copy[0][0];
          source.row_stride = 2 * kPositions;
          source.channel_stride = kPositions;
        }
        Pair* to = task.to == nullptr
                       ? nullptr
                       : task.to + first * task.step + line * task.width + v * kLanes;
        __m512 sums = _mm512_setzero_ps();
        if (source.count == kPositions && source.channels == 2) {
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

// Two neighbouring positions make one 32-bit lane, so that a block turns 32 positions.
void unpack_pairs(const UnpackTask<BFloat16>& task) {
  alignas(64) uint16_t interleave[kPositions];
  for (uint16_t n = 0; n < kPositions; ++n)
    interleave[n] = static_cast<uint16_t>(n / 2 + n % 2 * 16);
  const __m512i order = _mm512_load_si512(interleave);
  for (int64_t f = 0; f < task.rows; f += kLanes) {
    const int64_t rows = task.rows - f < kLanes ? task.rows - f : kLanes;
    for (int64_t first = 0; first < task.count; first += kPositions) {
      const int64_t count = task.count - first < kPositions ? task.count - first : kPositions;
      const __mmask32 mask = first_of(count);
      const float* from = task.from + first * task.step + f;
      PairBlock block;
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) {
        // Beyond the last position anything will do.
        const int64_t lower = 2 * n < count ? 2 * n : 0;
        const int64_t upper = 2 * n + 1 < count ? 2 * n + 1 : 0;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(
            _mm512_loadu_ps(from + upper * task.step), _mm512_loadu_ps(from + lower * task.step));
        block.line[n] = (PairBlock::Vector)_mm512_permutexvar_epi16(order, both);
      }
      block.turn();
      BFloat16* to = task.to + f * task.stride + first;
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) {
        if (n < rows) _mm512_mask_storeu_epi16(to + n * task.stride, mask, (__m512i)block.line[n]);
      }
    }
  }
}

constexpr AmxKernels kKernels = {
    &start,
    &stop,
    {{}, {nullptr, &multiply<1, 1>, &multiply<1, 2>}, {nullptr, &multiply<2, 1>, &multiply<2, 2>}},
    &pack_pairs,
    &unpack_pairs};

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
    made.TurnSet<BFloat16>::unpack = kKernels.unpack;
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
