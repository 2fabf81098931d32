// Activations with samples in the lanes of vectors.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include "interface.h"
#include "vectors.h"

namespace {

template <class T>
int64_t groups(const Packing& p) {
  int64_t tiles = (p.samples + LANES<T> - 1) / LANES<T>;
  return (tiles + p.tiles_of_group - 1) / p.tiles_of_group;
}
template <class T>
int64_t group_size(const Packing& p) {
  return p.height * p.channels * p.width * p.tiles_of_group * LANES<T>;
}

template <class T>
void zero_border(const Packing& p, T* packed, int64_t group) {
  T* to = packed + group * group_size<T>(p);
  const int64_t unit = p.tiles_of_group * LANES<T>, line = p.width * unit;
  for (int64_t y = 0; y < p.height; y++) {
    bool inside = y >= p.top && y < p.top + p.inner_height;
    for (int64_t c = 0; c < p.channels; c++, to += line) {
      if (!inside) {
        memset(to, 0, line * sizeof(T));
      } else {
        int64_t right = p.left + p.inner_width;
        memset(to, 0, p.left * unit * sizeof(T));
        memset(to + right * unit, 0, (p.width - right) * unit * sizeof(T));
      }
    }
  }
}

// Pack features [from, to) of a vector of samples. Returns whether all are finite.
template <class T>
bool pack_tile(const Packing& p, T* packed, int64_t tile, int64_t from, int64_t to) {
  constexpr int L = LANES<T>;
  T* base = packed + tile / p.tiles_of_group * group_size<T>(p) + tile % p.tiles_of_group * L;
  const T* source = static_cast<const T*>(p.source) + tile * L * p.features;
  int present = std::min<int64_t>(L, p.samples - tile * L);
  V<T> poison = {};
  for (int64_t f = from; f < to; f += L) {
    int count = std::min<int64_t>(L, to - f);
    V<T> row[L];
    if (present == L && count == L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) row[i] = load(source + i * p.features + f);
    } else {
      for (int i = 0; i < L; i++) {
        T part[L] = {};
        if (i < present) memcpy(part, source + i * p.features + f, count * sizeof(T));
        row[i] = load(part);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) poison += row[i] * T(0);  // NaN of what is infinite or NaN
    transpose<T>(row);
    const int32_t* map = p.map + f;
    if (count == L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) store(base + int64_t(map[i]) * L, row[i]);
    } else {
      for (int i = 0; i < count; i++) store(base + int64_t(map[i]) * L, row[i]);
    }
  }
  bool finite = true;
  for (int i = 0; i < L; i++) finite &= poison[i] == 0;
  return finite;
}

// Within a parallel region: pack everything. Ends at a barrier.
template <class T>
void pack(const Packing& p, T* packed, std::atomic<int>& poisoned) {
  constexpr int L = LANES<T>;
  int64_t tiles = (p.samples + L - 1) / L, piece = 64 * L, pieces = (p.features + piece - 1) / piece;
  if (p.inner_height < p.height || p.inner_width < p.width) {
#pragma omp for schedule(static) nowait
    for (int64_t group = 0; group < groups<T>(p); group++) zero_border<T>(p, packed, group);
  }
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < tiles * pieces; i++) {
    int64_t from = i % pieces * piece;
    if (!pack_tile<T>(p, packed, i / pieces, from, std::min(p.features, from + piece))) poisoned = 1;
  }
}

}  // namespace
