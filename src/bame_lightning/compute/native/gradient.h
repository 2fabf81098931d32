// Gradients of weights, at the kept positions and at some more.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>
#include "memory.h"
#include "packing.h"
#include "product.h"

namespace {

// gradient[entry] += sum over positions of g[row] * x[entry], for entries [begin, end) of a row.
template <class T, int E>
INLINE void correlate(const T* x, const T* g, const int32_t* unit, int64_t scale, const int32_t* x_unit,
                      const int32_t* g_unit, int count, T* out, int real) {
  constexpr int L = LANES<T>;
  int64_t at[E];
  for (int e = 0; e < E; e++) at[e] = int64_t(unit[e < real ? e : real - 1]) * scale;
  V<T> sum[E] = {};
  for (int q = 0; q < count; q++) {
    V<T> v = load(g + int64_t(g_unit[q]) * L);
    const T* b = x + int64_t(x_unit[q]) * L;
#pragma GCC unroll 8
    for (int e = 0; e < E; e++) sum[e] += v * load(b + at[e]);
  }
  add_lanes<T>(sum, out, real);
}
template <class T>
void correlate_row(const T* x, const T* g, const int32_t* unit, int64_t scale, const int32_t* x_unit,
                   const int32_t* g_unit, int count, T* out, int64_t entries) {
  int64_t e = 0;
  for (; e + ENTRIES <= entries; e += ENTRIES)
    correlate<T, ENTRIES>(x, g, unit + e, scale, x_unit, g_unit, count, out + e, ENTRIES);
  if (e < entries) correlate<T, ENTRIES>(x, g, unit + e, scale, x_unit, g_unit, count, out + e, entries - e);
}

// The positions that are asked for beside the mask, as rows of entries cut into sections.
struct More {
  std::vector<int32_t> column, unit;
  std::vector<int64_t> first;  // row * sections + section -> first entry
  // Orders the positions within their rows, of which nearly all are in order. False unless they are grouped row by row.
  bool find(const WeightGradient& w) {
    const Positions& m = w.more;
    column.resize(m.count);
    unit.resize(m.count);
    first.assign(w.rows * w.sections + 1, m.count);
    const int64_t* end = m.number + m.count;
    std::atomic<int64_t> found{0};
#pragma omp parallel for num_threads(w.threads) schedule(static)
    for (int64_t row = 0; row < w.rows; row++) {
      int64_t start = row * m.row_length, extra = row / m.rows_of_group * m.group_units;
      const int64_t* from = std::lower_bound(m.number, end, start);
      const int64_t* to = std::lower_bound(from, end, start + m.row_length);
      int32_t *here = column.data() + (from - m.number), count = to - from;
      for (int32_t i = 0; i < count; i++) {
        int64_t c = from[i] - start;
        if (c < 0 || c >= m.row_length) break;
        int32_t j = i;
        for (; j > 0 && here[j - 1] > c; j--) here[j] = here[j - 1];
        here[j] = c;
        found += i == count - 1 ? count : 0;
      }
      for (int64_t s = 0; s < w.sections; s++)
        first[row * w.sections + s] =
            std::lower_bound(here, here + count, m.row_length * s / w.sections) - column.data();
      for (int32_t i = 0; i < count; i++)
        unit[here - column.data() + i] = (m.column_unit ? m.column_unit[here[i]] : here[i]) + extra;
    }
    return found == m.count;
  }
};

template <class T>
void write_row(const WeightGradient& w, int64_t row, const T* kept, const T* other, const More& more) {
  T* out = static_cast<T*>(w.output) + row * w.row_stride;
  int64_t length = w.more.row_length;
  if (w.rows_lie_together) memset(out, 0, length * sizeof(T));
  const int32_t* column = w.columns + row * w.matrix.row_entries;
  for (int64_t k = 0; k < w.matrix.row_entries; k++)
    out[w.column_offset ? w.column_offset[column[k]] : column[k]] = kept[k];
  if (!w.more.count) return;
  for (int64_t k = more.first[row * w.sections]; k < more.first[(row + 1) * w.sections]; k++) {
    int32_t c = more.column[k];
    out[w.column_offset ? w.column_offset[c] : c] = other[k];
  }
}

template <class T>
int weight_gradient(const WeightGradient& w) {
  constexpr int L = LANES<T>;
  const int64_t entries = w.rows * w.matrix.row_entries, many = groups<T>(w.input);
  const int64_t x_size = group_size<T>(w.input), g_size = group_size<T>(w.gradient);
  Buffer x_memory(many * x_size * sizeof(T)), g_memory(many * g_size * sizeof(T));
  Buffer sums_memory((entries + w.more.count) * sizeof(T));
  T *x = x_memory.as<T>(), *g = g_memory.as<T>(), *kept = sums_memory.as<T>(), *other = kept + entries;
  const bool linear = w.input.tiles_of_group > 1 || w.positions == 1;
  More more;
  if (w.more.count && !more.find(w)) return -1;
  std::atomic<int> poisoned{0};
  const int64_t scale = w.matrix.scale * L;
  // Pieces of rows: a few for each thread, for they may be interrupted.
  const int64_t piece = std::max<int64_t>(1, w.rows / (w.threads * (w.threads > 1 ? 4 : 1))), pieces = (w.rows + piece - 1) / piece;
#pragma omp parallel num_threads(w.threads)
  {
    pack<T>(w.input, x, poisoned);
    pack<T>(w.gradient, g, poisoned);
    if (!w.rows_lie_together) {
      int64_t chunk = 1 << 16, chunks = (w.output_size + chunk - 1) / chunk;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < chunks; i++)
        memset(static_cast<T*>(w.output) + i * chunk, 0, std::min(chunk, w.output_size - i * chunk) * sizeof(T));
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < pieces; i++) {
      if (poisoned) continue;
      int64_t from = i * piece, to = std::min(w.rows, from + piece);
      memset(kept + from * w.matrix.row_entries, 0, (to - from) * w.matrix.row_entries * sizeof(T));
      if (w.more.count) {
        int64_t begin = more.first[from * w.sections], end = more.first[to * w.sections];
        memset(other + begin, 0, (end - begin) * sizeof(T));
      }
      for (int64_t group = 0; group < many; group++) {
        int64_t count = w.positions;
        if (linear)
          count = std::min<int64_t>(count, (w.input.samples + L - 1) / L - group * w.input.tiles_of_group);
        for (int64_t q = 0; q < count; q += SPAN) {
          int here = std::min<int64_t>(SPAN, count - q);
          for (int64_t section = 0; section < w.sections; section++) {
            const T *xb = x + group * x_size, *gb = g + group * g_size;
            for (int64_t row = from; row < to; row++) {
              Range r = range(w.matrix, w.sections, section, w.rows, row);
              const T* gr = gb + row * w.gradient_row * L;
              correlate_row<T>(xb, gr, w.matrix.unit + r.begin, scale, w.input_unit + q, w.gradient_unit + q, here,
                               kept + r.begin, r.end - r.begin);
              if (w.more.count) {
                int64_t a = more.first[row * w.sections + section], b = more.first[row * w.sections + section + 1];
                correlate_row<T>(xb, gr, more.unit.data() + a, scale, w.input_unit + q, w.gradient_unit + q, here,
                                 other + a, b - a);
              }
            }
          }
        }
      }
      for (int64_t row = from; row < to; row++)
        write_row<T>(w, row, kept + row * w.matrix.row_entries, other, more);
    }
  }
  return poisoned;
}

}  // namespace
