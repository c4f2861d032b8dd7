// Included by tile_<level>_cpu.cpp inside an anonymous namespace, after the level's target pragma:
// everything here is local to that file, so that no function compiled for a newer machine can be
// picked by the linker for an older one. The includer defines kVectorBytes and kRegisters.

template <typename A, int kVectors, int kChannels>
void multiply_tile(const TileTask<A>& task, A* tile) {
  typedef A Vector __attribute__((vector_size(kVectorBytes)));
  typedef A Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(A))));
  constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
  constexpr int kWidth = kVectors * kLanes;
  // Sums of their own for so many neighbours c, where else one addition would wait for the last.
  constexpr int kApart = kVectors * kChannels <= 2 ? 4 : kVectors * kChannels <= 4 ? 2 : 1;

  Vector sums[kApart][kChannels][kVectors] = {};
  const int64_t tile_line = task.tile_line != 0 ? task.tile_line : kWidth;
  bool first = true;
  const auto flush = [&]() {
    A* line = tile;
#pragma GCC unroll 12
    for (int n = 0; n < kChannels; ++n) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Unaligned* to = reinterpret_cast<Unaligned*>(line + v * kLanes);
        Vector total = sums[0][n][v];
        for (int apart = 1; apart < kApart; ++apart) total += sums[apart][n][v];
        *to = first ? total : *to + total;
        for (int apart = 0; apart < kApart; ++apart) sums[apart][n][v] = Vector{};
      }
      line += tile_line;
      // Or all lines are found beforehand, and kept where the products need their registers.
      __asm__ volatile("" : "+r"(line));
    }
    first = false;
  };
  const int64_t linear_line = task.linear_line;
  const int64_t weight_line = task.weight_line;
  int64_t room = kFlushAfter;
  for (int64_t t = 0; t < task.taps; ++t) {
    const A* linear = task.linear + task.linear_start[t];
    const A* weight = task.weight + task.kernel[t] * task.weight_step;
    const auto add = [&](Vector(&to)[kChannels][kVectors]) {
      Vector rows[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        rows[v] = *reinterpret_cast<const Unaligned*>(linear + v * kLanes);
      }
#pragma GCC unroll 12
      for (int n = 0; n < kChannels; ++n) {
        const A scale = weight[n];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) to[n][v] += rows[v] * scale;
      }
      linear += linear_line;
      weight += weight_line;
    };
    int64_t left = task.channels;
    while (left > 0) {
      const int64_t some = left < room ? left : room;
      int64_t c = 0;
      for (; c + kApart <= some; c += kApart) {
#pragma GCC unroll 4
        for (int apart = 0; apart < kApart; ++apart) add(sums[apart]);
      }
      for (; c < some; ++c) add(sums[0]);
      left -= some;
      room -= some;
      if (room == 0) {
        flush();
        room = kFlushAfter;
      }
    }
  }
  flush();
}

template <typename A>
void add_lines(const A* tile, int64_t width, int64_t lines, A* const* to) {
  typedef A Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(A))));
  constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
  for (int64_t n = 0; n < lines; ++n, tile += width) {
    if (to[n] == nullptr) continue;
    for (int64_t f = 0; f < width; f += kLanes) {
      *reinterpret_cast<Unaligned*>(to[n] + f) += *reinterpret_cast<const Unaligned*>(tile + f);
    }
  }
}

template <typename A, int kVectors, int kChannels>
void fill_tile(TileSet<A>& set) {
  if constexpr (kVectors * kChannels <= kRegisters) {
    set.tile[kVectors][kChannels] = &multiply_tile<A, kVectors, kChannels>;
  }
  if constexpr (kChannels > 1) {
    fill_tile<A, kVectors, kChannels - 1>(set);
  } else if constexpr (kVectors > 1) {
    fill_tile<A, kVectors - 1, TileSet<A>::kMostChannels>(set);
  }
}

template <typename A>
TileSet<A> make_tile_set() {
  TileSet<A> set = {};
  set.lanes = kVectorBytes / static_cast<int>(sizeof(A));
  set.registers = kRegisters;
  set.most_channels = kRegisters / 2;
  set.add_lines = &add_lines<A>;
  fill_tile<A, TileSet<A>::kMostVectors, TileSet<A>::kMostChannels>(set);
  return set;
}
