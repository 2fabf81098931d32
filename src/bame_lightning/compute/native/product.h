// The product of a sparse matrix with packed activations: outputs, and gradients of inputs by the transposed matrix.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include "memory.h"
#include "packing.h"

namespace {

struct Range {
  int64_t begin, end;
};
INLINE Range range(const Entries& m, int64_t sections, int64_t section, int64_t rows, int64_t row) {
  if (m.begin) {
    int64_t key = section * rows + row;
    return {m.begin[key], m.end[key]};
  }
  int64_t first = row * m.row_entries;
  return {first + m.row_entries * section / sections, first + m.row_entries * (section + 1) / sections};
}

// Rows of the product at P positions: out[row][position] (a vector each) for rows [from, to).
template <class T, int P>
void multiply(const Product& w, const T* value, int64_t section, bool first, int64_t from, int64_t to,
              const T* const* base, T* out, int64_t out_row) {
  constexpr int L = LANES<T>;
  const T* b[P];
  for (int j = 0; j < P; j++) b[j] = base[j];
  const T* bias = static_cast<const T*>(w.bias);
  const int32_t* unit = w.matrix.unit;
  const int64_t scale = w.matrix.scale * L;
  for (int64_t row = from; row < to; row++, out += out_row) {
    Range r = range(w.matrix, w.sections, section, w.rows, row);
    V<T> sum[P];
    if (first) {
      V<T> start = V<T>{} + (bias ? bias[row] : T(0));
#pragma GCC unroll 8
      for (int j = 0; j < P; j++) sum[j] = start;
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < P; j++) sum[j] = load(out + j * L);
    }
    for (int64_t k = r.begin; k < r.end; k++) {
      V<T> v = V<T>{} + value[k];
      int64_t at = unit[k] * scale;
#pragma GCC unroll 8
      for (int j = 0; j < P; j++) sum[j] += v * load(b[j] + at);
    }
#pragma GCC unroll 8
    for (int j = 0; j < P; j++) store(out + j * L, sum[j]);
  }
}
template <class T, int P = TILE>
INLINE void multiply_some(int count, const Product& w, const T* value, int64_t section, bool first, int64_t from,
                          int64_t to, const T* const* base, T* out, int64_t out_row) {
  if constexpr (P > 0) {
    if (count == P)
      multiply<T, P>(w, value, section, first, from, to, base, out, out_row);
    else
      multiply_some<T, P - 1>(count, w, value, section, first, from, to, base, out, out_row);
  }
}

// Write rows [from, to) at positions [q, q + count) from `sums` (row, UNIT positions) to where the user's layout has them.
template <class T>
void unpack(const Product& w, const T* sums, int64_t sums_row, int64_t group, int64_t q, int count, int64_t from,
            int64_t to) {
  constexpr int L = LANES<T>;
  int64_t sample = group * L * w.input.tiles_of_group;
  T* out = static_cast<T*>(w.output) + sample * w.output_features;
  const int64_t* offset = w.output_offset + q;
  if (w.row_stride == 1) {  // rows lie side by side: squares of rows and samples
    for (int64_t row = from; row < to; row += L) {
      int height = std::min<int64_t>(L, to - row);
      for (int j = 0; j < count; j++) {
        const T* s = sums + (row - from) * sums_row + j * L;
        V<T> square[L];
        for (int i = 0; i < L; i++) square[i] = i < height ? load(s + i * sums_row) : V<T>{};
        transpose<T>(square);
        int present = std::min<int64_t>(L, w.input.samples - sample - j * w.samples_of_position);
        T* o = out + offset[j] + row;
        if (height == L)
          for (int i = 0; i < present; i++) store(o + i * w.output_features, square[i]);
        else
          for (int i = 0; i < present; i++) memcpy(o + i * w.output_features, &square[i], height * sizeof(T));
      }
    }
    return;
  }
  int present = std::min<int64_t>(L, w.input.samples - sample);
  for (int64_t row = from; row < to; row++) {  // positions lie side by side: squares of positions and samples
    for (int j = 0; j < count; j += L) {
      int width = std::min(L, count - j);
      const T* s = sums + (row - from) * sums_row + j * L;
      V<T> square[L];
      for (int i = 0; i < L; i++) square[i] = i < width ? load(s + i * L) : V<T>{};
      transpose<T>(square);
      T* o = out + row * w.row_stride;
      bool together = offset[j + width - 1] - offset[j] == width - 1;
      for (int i = 0; i < present; i++, o += w.output_features) {
        if (together && width == L) {
          store(o + offset[j], square[i]);
        } else if (together) {
          memcpy(o + offset[j], &square[i], width * sizeof(T));
        } else {
          T part[L];
          store(part, square[i]);
          for (int k = 0; k < width; k++) o[offset[j + k]] = part[k];
        }
      }
    }
  }
}

template <class T>
int product(const Product& w) {
  constexpr int L = LANES<T>;
  const Packing& p = w.input;
  const int64_t size = group_size<T>(p), many = groups<T>(p);
  Buffer packed_memory(many * size * sizeof(T));
  Buffer values_memory((w.matrix.slot ? w.matrix.entries : 0) * sizeof(T));
  T* packed = packed_memory.as<T>();
  const bool linear = w.samples_of_position > 0;
  // Rows of a piece of work: sums of 256 KB at most, and enough pieces for all threads.
  int64_t piece = w.rows;
  if (linear) piece = std::max<int64_t>(L, std::min<int64_t>(512, (w.rows / w.threads + L - 1) / L * L));
  const int64_t row_pieces = (w.rows + piece - 1) / piece;
  std::atomic<int> poisoned{0};
  const T* value = static_cast<const T*>(w.matrix.value);
#pragma omp parallel num_threads(w.threads)
  {
    if (w.matrix.slot) {
      T* gathered = values_memory.as<T>();
      int64_t keys = w.classes * w.sections * w.rows;
#pragma omp for schedule(static)
      for (int64_t key = 0; key < keys; key++)
        for (int32_t k = w.matrix.begin[key]; k < w.matrix.end[key]; k++) gathered[k] = value[w.matrix.slot[k]];
    }
    pack<T>(p, packed, poisoned);
    const T* v = w.matrix.slot ? values_memory.as<T>() : value;
    Buffer sums_memory(piece * UNIT * L * sizeof(T));
    T* sums = sums_memory.as<T>();
    for (int64_t kind = 0; kind < w.classes; kind++) {
      int64_t first = w.positions[kind], count = w.positions[kind + 1] - first;
      int64_t units = (count + UNIT - 1) / UNIT, work = many * units * row_pieces;
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < work; i++) {
        if (poisoned) continue;
        int64_t from = i % row_pieces * piece, to = std::min(w.rows, from + piece);
        int64_t group = i / row_pieces / units, q = first + i / row_pieces % units * UNIT;
        int here = std::min<int64_t>(UNIT, first + count - q);
        if (linear) {  // the last group may hold less
          int64_t tiles = (p.samples + L - 1) / L;
          here = std::min<int64_t>(p.tiles_of_group, tiles - group * p.tiles_of_group);
        }
        const T* bases[UNIT];
        for (int j = 0; j < here; j++) bases[j] = packed + group * size + int64_t(w.input_unit[q + j]) * L;
        int64_t sums_row = here * L;
        for (int64_t section = 0; section < w.sections; section++)
          for (int j = 0; j < here; j += TILE)
            multiply_some<T>(std::min(TILE, here - j), w, v, kind * w.sections + section, section == 0, from, to,
                             bases + j, sums + j * L, sums_row);
        unpack<T>(w, sums, sums_row, group, q, here, from, to);
      }
    }
  }
  return poisoned;
}

}  // namespace
