// Included by tile_<level>_cpu.cpp inside an anonymous namespace; see tile.inl.
#include "move.inl"
#include "tile.inl"
#include "turn.inl"

SimdKernels make_simd_kernels() {
  return {make_tile_set<float>(),   make_tile_set<double>(),  make_turn_set<float>(),
          make_turn_set<double>(),  make_turn_set<Float16>(), make_turn_set<BFloat16>(),
          make_move_set<int32_t>(), make_move_set<int64_t>()};
}
