// Included by tile_<level>_cpu.cpp like tile.inl, and local to that file for the same reason.

template <typename Index>
void move(const Index* from, Index shift, int64_t count, Index* to) {
  constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Index));
  typedef Index Vector __attribute__((vector_size(kVectorBytes), aligned(alignof(Index))));
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) {
    *reinterpret_cast<Vector*>(to + n) = *reinterpret_cast<const Vector*>(from + n) + shift;
  }
  for (; n < count; ++n) to[n] = from[n] + shift;
}

template <typename Index>
MoveSet<Index> make_move_set() {
  return {&move<Index>};
}
