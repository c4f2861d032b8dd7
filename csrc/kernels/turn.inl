// Included by tile_<level>_cpu.cpp like tile.inl, and local to that file for the same reason.

// One vector of f or of n, and the turn of a block of them.
template <typename A>
struct Block {
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
  typedef A Vector __attribute__((vector_size(kVectorBytes)));
  typedef A Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(A))));

  Vector line[kLanes];

  // Swaps the two off-diagonal quarters of every square of 2 kSize lines and lanes.
  template <int kSize, int... kLane>
  inline __attribute__((always_inline)) void swap_quarters(std::integer_sequence<int, kLane...>) {
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) {
      if ((n & kSize) != 0) continue;
      const Vector upper = line[n];
      const Vector lower = line[n + kSize];
      line[n] = __builtin_shufflevector(upper, lower,
                                        ((kLane & kSize) != 0 ? kLanes + kLane - kSize : kLane)...);
      line[n + kSize] = __builtin_shufflevector(
          upper, lower, ((kLane & kSize) != 0 ? kLanes + kLane : kLane + kSize)...);
    }
  }

  template <int kSize = kLanes / 2>
  inline __attribute__((always_inline)) void turn() {
    swap_quarters<kSize>(std::make_integer_sequence<int, kLanes>{});
    if constexpr (kSize > 1) turn<kSize / 2>();
  }
};

template <typename T, typename A = Accumulate<T>>
inline __attribute__((always_inline)) typename Block<A>::Vector load_line(const T* from) {
  if constexpr (std::is_same_v<T, A>) {
    return *reinterpret_cast<const typename Block<A>::Unaligned*>(from);
  } else {
    typename Block<A>::Vector line;
    for (int n = 0; n < Block<A>::kLanes; ++n) line[n] = static_cast<A>(from[n]);
    return line;
  }
}

template <typename T, typename A = Accumulate<T>>
inline __attribute__((always_inline)) void store_line(T* to,
                                                      const typename Block<A>::Vector& line) {
  if constexpr (std::is_same_v<T, A>) {
    *reinterpret_cast<typename Block<A>::Unaligned*>(to) = line;
  } else {
    alignas(kVectorBytes) A values[Block<A>::kLanes];
    *reinterpret_cast<typename Block<A>::Vector*>(values) = line;
    for (int n = 0; n < Block<A>::kLanes; ++n) to[n] = static_cast<T>(values[n]);
  }
}

// bfloat16 is the upper half of a float. The compiler sees a branch for NaN in each element.
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <>
inline __attribute__((always_inline)) Block<float>::Vector load_line<BFloat16, float>(
    const BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return (Block<float>::Vector)(__builtin_convertvector(halves, Words) << 16);
}

template <>
inline __attribute__((always_inline)) void store_line<BFloat16, float>(
    BFloat16* to, const Block<float>::Vector& line) {
  const Words wide = (Words)line;
  const Words is_nan = (Words)(line != line);
  const Words rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  const Halves halves = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), Halves);
  std::memcpy(static_cast<void*>(to), &halves, sizeof(halves));
}

#if defined(LINFUSE_AVX512) || defined(LINFUSE_F16C)
// One instruction, where the compiler sees shifts and cases.
template <>
inline __attribute__((always_inline)) Block<float>::Vector load_line<Float16, float>(
    const Float16* from) {
#if defined(LINFUSE_AVX512)
  return (Block<float>::Vector)_mm512_cvtph_ps(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return (Block<float>::Vector)_mm256_cvtph_ps(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}

template <>
inline __attribute__((always_inline)) void store_line<Float16, float>(
    Float16* to, const Block<float>::Vector& line) {
#if defined(LINFUSE_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph((__m512)line, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph((__m256)line, _MM_FROUND_TO_NEAREST_INT));
#endif
}
#endif

// Lines of `rows` rows, `kLanes` elements each; lines beyond are zero.
template <typename T, typename A = Accumulate<T>>
inline __attribute__((always_inline)) void load_block(const T* from, int64_t stride, int64_t rows,
                                                      Block<A>& block) {
  constexpr int kLanes = Block<A>::kLanes;
  if (rows >= kLanes) {
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) block.line[n] = load_line<T>(from + n * stride);
  } else {
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) {
      block.line[n] = n < rows ? load_line<T>(from + n * stride) : typename Block<A>::Vector{};
    }
  }
  block.turn();
}

template <typename A>
inline __attribute__((always_inline)) void add_to_sums(const typename Block<A>::Vector& part,
                                                       double* sums) {
  constexpr int kBytes = Block<A>::kLanes * int{sizeof(double)};
  typedef double Wide __attribute__((vector_size(kBytes), aligned(alignof(double))));
  *reinterpret_cast<Wide*>(sums) += __builtin_convertvector(part, Wide);
}

// Adds lines [begin, end) of a block, each times its scale. Of its own, as an index that is no
// constant would have the caller keep the block in memory.
template <typename A>
__attribute__((noinline)) void add_lines_to_sums(Block<A> block, int64_t begin, int64_t end,
                                                 const A* scale, double* sums) {
  typename Block<A>::Vector part = {};
  for (int64_t n = begin; n < end; ++n) part += block.line[n] * scale[n];
  add_to_sums<A>(part, sums);
}

// Past the caches where a vector is a whole line of memory; `to` is aligned to it.
template <typename A, typename Vector>
inline __attribute__((always_inline)) void stream_line(A* to, const Vector& line) {
#if defined(__SSE2__)
  if constexpr (sizeof(Vector) == 64) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to) + n,
                       reinterpret_cast<const __m128i*>(&line)[n]);
    }
    return;
  }
#endif
  store_line<A>(to, line);
}

// Brings lines that no hardware would guess, as they lie in as many places as there are rows.
template <typename T>
inline __attribute__((always_inline)) void fetch_block(const T* from, int64_t stride,
                                                       int64_t rows) {
  const int64_t some = rows < Block<Accumulate<T>>::kLanes ? rows : Block<Accumulate<T>>::kLanes;
  for (int64_t n = 0; n < some; ++n) __builtin_prefetch(from + n * stride);
}

template <typename T>
void pack(const PackTask<T>& task) {
  using A = Accumulate<T>;
  using Vector = typename Block<A>::Vector;
  constexpr int kLanes = Block<A>::kLanes;
  for (int v = 0; v < task.vectors; ++v) {
    const int64_t rows = task.rows - int64_t{v} * kLanes;
    const T* from = task.from + int64_t{v} * kLanes * task.stride;
    A* to = task.to + v * kLanes;
    if (rows <= 0) {
      for (int64_t n = 0; n < task.count && task.place != nullptr; ++n) {
        store_line<A>(to + task.place[n], Vector{});
      }
      continue;
    }
    double* sums = task.sums == nullptr ? nullptr : task.sums + v * kLanes;
    if (task.count < kLanes) {
      Vector part = {};
      for (int64_t n = 0; n < task.count; ++n) {
        Vector line = {};
        for (int f = 0; f < kLanes && f < rows; ++f) {
          line[f] = static_cast<A>(from[f * task.stride + n]);
        }
        if (task.place != nullptr) store_line<A>(to + task.place[n], line);
        if (sums != nullptr) part += line * task.scale[n];
      }
      if (sums != nullptr) add_to_sums<A>(part, sums);
      continue;
    }
    for (int64_t done = 0; done < task.count; done += kLanes) {
      // The last block overlaps the one before where a whole one does not fit.
      const int64_t first = std::min(done, task.count - kLanes);
      if (task.next != 0) fetch_block(from + first + task.next, task.stride, rows);
      Block<A> block;
      load_block(from + first, task.stride, rows, block);
      if (task.place != nullptr) {
#pragma GCC unroll 16
        for (int n = 0; n < kLanes; ++n) {
          A* line = to + task.place[first + n];
          task.stream ? stream_line(line, block.line[n]) : store_line<A>(line, block.line[n]);
        }
      }
      if (sums == nullptr) continue;
      const A* scale = task.scale + first;
      if (first < done) {
        add_lines_to_sums(block, done - first, kLanes, scale, sums);
        continue;
      }
      Vector part = {};
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) part += block.line[n] * scale[n];
      add_to_sums<A>(part, sums);
    }
  }
}

// Copies bytes; with `stream`, whole lines of memory past the caches.
inline void copy_run(char* to, const char* from, int64_t bytes, bool stream) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64;
  if (stream && bytes >= 2 * kLine) {
    const int64_t head = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(to)) & (kLine - 1);
    std::memcpy(to, from, static_cast<size_t>(head));
    for (to += head, from += head, bytes -= head; bytes >= kLine; bytes -= kLine) {
      for (int n = 0; n < 4; ++n, to += 16, from += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      }
    }
  }
#endif
  (void)stream;
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

// Rows are put together a stretch at a time, so that each is written in long runs. `turn` does up
// to kAtATime positions: (from, count, row 0 of what it writes to).
constexpr int kStretch = 256;

template <int kAtATime, typename T, typename Turn>
inline void unpack_by(const UnpackTask<T>& task, const Turn& turn) {
  constexpr int kLanes = Block<Accumulate<T>>::kLanes;
  alignas(64) T lines[kLanes][kStretch];
  for (int64_t f = 0; f < task.rows; f += kLanes) {
    const int64_t rows = task.rows - f < kLanes ? task.rows - f : kLanes;
    for (int64_t start = 0; start < task.count; start += kStretch) {
      const int64_t some = task.count - start < kStretch ? task.count - start : kStretch;
      for (int64_t first = 0; first < some; first += kAtATime) {
        turn(task.from + (start + first) * task.step + f, some - first, &lines[0][first]);
      }
      for (int64_t n = 0; n < rows; ++n) {
        copy_run(reinterpret_cast<char*>(task.to + (f + n) * task.stride + start),
                 reinterpret_cast<const char*>(lines[n]), some * static_cast<int64_t>(sizeof(T)),
                 task.stream);
      }
    }
  }
}

template <typename T>
void unpack(const UnpackTask<T>& task) {
  using A = Accumulate<T>;
  constexpr int kLanes = Block<A>::kLanes;
  unpack_by<kLanes>(task, [&](const A* from, int64_t count, T* to) {
    Block<A> block;
    load_block(from, task.step, count, block);
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) store_line<T>(to + n * kStretch, block.line[n]);
  });
}

// The first `count` of a line.
template <typename T, typename A = Accumulate<T>>
inline typename Block<A>::Vector load_part(const T* from, int64_t count) {
  typename Block<A>::Vector line = {};
  for (int n = 0; n < count; ++n) line[n] = static_cast<A>(from[n]);
  return line;
}

template <typename T>
void pack_lines(const PackTask<T>& task) {
  using A = Accumulate<T>;
  using Vector = typename Block<A>::Vector;
  constexpr int kLanes = Block<A>::kLanes;
  // Lines that lie far apart are no stream that hardware follows.
  constexpr int64_t kAhead = 8;
  for (int64_t start = 0; start < task.count; start += kLanes) {
    const int64_t stop = start + kLanes < task.count ? start + kLanes : task.count;
    for (int v = 0; v < task.vectors; ++v) {
      const int64_t rows = task.rows - int64_t{v} * kLanes;
      const T* from = task.from + v * kLanes;
      Vector part = {};
      for (int64_t n = start; n < stop; ++n) {
        __builtin_prefetch(from + (n + kAhead) * task.stride);
        const Vector line = rows >= kLanes ? load_line<T>(from + n * task.stride)
                                           : load_part(from + n * task.stride, rows);
        if (task.place != nullptr) {
          A* to = task.to + task.place[n] + v * kLanes;
          task.stream ? stream_line(to, line) : store_line<A>(to, line);
        }
        if (task.sums != nullptr) part += line * task.scale[n];
      }
      if (task.sums != nullptr) add_to_sums<A>(part, task.sums + v * kLanes);
    }
  }
}

template <typename T>
void pack_lanes(const PackLanesTask<T>& task) {
  using A = Accumulate<T>;
  using Vector = typename Block<A>::Vector;
  constexpr int kLanes = Block<A>::kLanes;
  const bool in_blocks = task.position == 1 && task.count >= kLanes;
  for (int64_t done = 0; done < task.count;) {
    const int64_t some = task.count - done < kLanes ? task.count - done : kLanes;
    // The last block overlaps the one before where a whole one does not fit.
    const int64_t first = in_blocks && some < kLanes ? task.count - kLanes : done;
    const T* from = task.from + first * task.position;
    Block<A> block;
    if (in_blocks) {
#pragma GCC unroll 16
      for (int m = 0; m < kLanes; ++m) {
        block.line[m] = task.offset[m] < 0 ? Vector{} : load_line<T>(from + task.offset[m]);
      }
      block.turn();
    } else {
      for (int64_t n = 0; n < some; ++n) {
        for (int m = 0; m < kLanes; ++m) {
          const int64_t offset = task.offset[m];
          block.line[n][m] = offset < 0 ? A{} : static_cast<A>(from[offset + n * task.position]);
        }
      }
    }
    const int64_t before = done - first;
    Vector part = {};
    for (int64_t n = before; n < before + some; ++n) {
      if (task.to != nullptr) {
        A* to = task.to + (first + n) * task.step;
        if (task.lanes == kLanes) {
          store_line<A>(to, block.line[n]);
        } else {
          for (int64_t m = 0; m < task.lanes; ++m) to[m] = block.line[n][m];
        }
      }
      part += block.line[n];
    }
    if (task.sums != nullptr) add_to_sums<A>(part, task.sums);
    done += some;
  }
}

template <typename T>
void unpack_lines(const UnpackTask<T>& task) {
  using A = Accumulate<T>;
  using Vector = typename Block<A>::Vector;
  constexpr int kLanes = Block<A>::kLanes;
  constexpr int kMostRows = TileSet<A>::kMostVectors * kLanes;
  alignas(64) T line[std::is_same_v<T, A> ? 1 : kMostRows];
  for (int64_t n = 0; n < task.count; ++n) {
    const A* from = task.from + n * task.step;
    const auto* bytes = reinterpret_cast<const char*>(from);
    if constexpr (!std::is_same_v<T, A>) {
      for (int64_t f = 0; f < task.rows; f += kLanes) {
        Vector values;
        std::memcpy(&values, from + f, sizeof(values));
        store_line<T>(line + f, values);
      }
      bytes = reinterpret_cast<const char*>(line);
    }
    copy_run(reinterpret_cast<char*>(task.to + n * task.stride), bytes,
             task.rows * static_cast<int64_t>(sizeof(T)), task.stream);
  }
}

// The last vector overlaps the one before where a whole one does not fit.
template <typename Convert, typename One>
inline void by_vectors(int64_t count, int lanes, const Convert& convert, const One& one) {
  if (count < lanes) {
    for (int64_t n = 0; n < count; ++n) one(n);
    return;
  }
  for (int64_t n = 0; n + lanes <= count; n += lanes) convert(n);
  if (count % lanes != 0) convert(count - lanes);
}

template <typename T>
void widen(const T* from, int64_t count, Accumulate<T>* to) {
  using A = Accumulate<T>;
  by_vectors(
      count, Block<A>::kLanes, [&](int64_t n) { store_line<A>(to + n, load_line<T>(from + n)); },
      [&](int64_t n) { to[n] = static_cast<A>(from[n]); });
}

template <typename T>
void narrow(const Accumulate<T>* from, int64_t count, T* to) {
  using A = Accumulate<T>;
  by_vectors(
      count, Block<A>::kLanes, [&](int64_t n) { store_line<T>(to + n, load_line<A>(from + n)); },
      [&](int64_t n) { to[n] = static_cast<T>(from[n]); });
}

inline void finish() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <typename T>
TurnSet<T> make_turn_set() {
  return {&pack<T>,       &unpack<T>, &pack_lines<T>, &unpack_lines<T>,
          &pack_lanes<T>, &widen<T>,  &narrow<T>,     &finish};
}
