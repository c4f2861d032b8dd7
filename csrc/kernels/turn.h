// Between a matrix of rows f, as torch has it, and one with f innermost, as the tiles want it:
//
//   pack     to[place[n] + f] = from[f * stride + n]
//   unpack   to[f * stride + n] = from[n * step + f]
//
// Both turn square blocks of one vector by one vector inside registers, and convert between T and
// Accumulate<T> on the way. turn.inl is the one source, compiled once per SIMD level and type.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "simd.h"

namespace linfuse {

template <typename T>
struct PackTask {
  const T* from;         // row 0
  int64_t stride;        // from one row to the next
  int64_t rows;          // that exist; the rest of the vectors is filled with zeros
  int64_t count;         // n
  int vectors;           // of f
  const int64_t* place;  // null where only the sums are wanted
  Accumulate<T>* to;
  // Where wanted, sums[f] += sum over n of scale[n] * from[f * stride + n]: in
  // Accumulate<T> over a few neighbours, then in double.
  double* sums;
  const Accumulate<T>* scale;
};

template <typename T>
struct UnpackTask {
  const Accumulate<T>* from;
  int64_t step;
  int64_t rows;
  int64_t count;
  T* to;
  int64_t stride;
  // Whether to write past the caches: for results far larger than they are, where a store that
  // misses waits for a line that nobody needs.
  bool stream;
};

template <typename T>
struct TurnSet {
  void (*pack)(const PackTask<T>& task);
  void (*unpack)(const UnpackTask<T>& task);
  // Makes what was streamed visible to other threads.
  void (*finish)();
};

}  // namespace linfuse
