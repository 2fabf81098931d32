// Which weights are kept: read off a mask, followed as it changes, their values gathered.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>
#include "interface.h"
#include "vectors.h"

namespace {

template <class T>
bool finite(const T* values, int64_t count) {
  T poison = 0;
#pragma omp simd reduction(+ : poison)
  for (int64_t i = 0; i < count; i++) poison += values[i] * T(0);
  return poison == 0;
}

template <class T>
int64_t count(const T* values, int64_t length) {
  int32_t found = 0;
  for (int64_t i = 0; i < length; i++) found += values[i] != 0;
  return found;
}

// Kept weights as they lie in the index. Returns 1 if some are not finite, 2 if weights that are pruned are not zero: then
// the mask does not tell the whole truth about the weight (somebody has put other values into it), and a dense product must.
template <class T>
int gather(const Gather& w) {
  std::atomic<int> poisoned{0};
  std::atomic<int64_t> hidden{0};
  const T* weight = static_cast<const T*>(w.weight);
#pragma omp parallel for num_threads(w.threads) schedule(static)
  for (int64_t row = 0; row < w.rows; row++) {
    const T* from = weight + row * w.row_stride;
    const int32_t* column = w.columns + row * w.row_entries;
    T* v = static_cast<T*>(w.values) + row * w.row_entries;
    if (w.column_offset)
      for (int64_t k = 0; k < w.row_entries; k++) v[k] = from[w.column_offset[column[k]]];
    else
      for (int64_t k = 0; k < w.row_entries; k++) v[k] = from[column[k]];
    if (!finite(v, w.row_entries)) poisoned = 1;
    // Elements in the order of memory, whichever row they belong to: the sum over all rows is what counts.
    int64_t found = count(weight + row * w.row_length, w.row_length) - count(v, w.row_entries);
    if (found) hidden += found;
  }
  return poisoned + 2 * (hidden != 0);
}

INLINE bool kept(const Blocks& b, const uint8_t* bits, int64_t column) {
  return bits[b.mask_offset ? b.mask_offset[column] : column] != 0;
}
// The kept columns of a block. False unless there are n of them.
bool read_block(const Blocks& b, const uint8_t* bits, int64_t block, int32_t* column) {
  int64_t found = 0;
  for (int64_t c = block * b.m; c < (block + 1) * b.m; c++)
    if (kept(b, bits, c) && found++ < b.n) column[found - 1] = c;
  return found == b.n;
}
INLINE int64_t key_of(const Blocks& b, int64_t row, int64_t tap, int64_t column) {
  return b.tap_key[tap] + b.row_key[row] + row / b.rows_of_group * b.inner + column - tap * b.inner;
}
// A list is ascending by slot, so that sums do not depend on how it came about; free places lie behind it.
void take_out(const Blocks& b, int64_t key, int32_t which) {
  int32_t *last = b.slot + b.end[key], *at = std::lower_bound(b.slot + b.begin[key], last, which);
  int64_t place = at - b.slot, rest = last - at - 1;
  memmove(at, at + 1, rest * sizeof(int32_t));
  memmove(b.where + place, b.where + place + 1, rest * sizeof(int32_t));
  b.end[key]--;
}
bool put_in(const Blocks& b, int64_t key, int32_t which, int32_t where) {
  if (b.end[key] == b.begin[key + 1]) return false;
  int32_t *last = b.slot + b.end[key], *at = std::lower_bound(b.slot + b.begin[key], last, which);
  int64_t place = at - b.slot, rest = last - at;
  memmove(at + 1, at, rest * sizeof(int32_t));
  memmove(b.where + place + 1, b.where + place, rest * sizeof(int32_t));
  b.slot[place] = which, b.where[place] = where;
  b.end[key]++;
  return true;
}

}  // namespace

extern "C" {

// Read the columns of all rows off a mask. Returns the first row that has a block which keeps other than n, or -1.
int64_t nm_columns(const Blocks* w) {
  const Blocks& b = *w;
  const int64_t blocks = b.taps * b.inner / b.m;
  std::atomic<int64_t> wrong{b.rows};
#pragma omp parallel for num_threads(b.threads) schedule(static)
  for (int64_t row = 0; row < b.rows; row++)
    for (int64_t block = 0; block < blocks; block++)
      if (!read_block(b, b.mask + row * b.mask_row, block, b.columns + (row * blocks + block) * b.n)) {
        int64_t before = wrong;
        while (row < before && !wrong.compare_exchange_weak(before, row)) {
        }
      }
  return wrong == b.rows ? -1 : int64_t(wrong);
}

// Make the transposed lists from the columns, with free places behind each. `places` says how many there are in all.
void nm_lists(const Blocks* w) {
  const Blocks& b = *w;
  const int64_t entries = b.taps * b.inner / b.m * b.n, of_tap = entries / b.taps;
  std::vector<int32_t> count(b.keys);
  for (int64_t i = 0; i < b.rows * entries; i++)
    count[key_of(b, i / entries, i % entries / of_tap, b.columns[i])]++;
  int64_t free = (b.places - b.rows * entries) / std::max<int64_t>(1, b.keys), at = 0;
  for (int64_t key = 0; key < b.keys; key++) {
    b.begin[key] = b.end[key] = at;
    at += count[key] + free;
  }
  b.begin[b.keys] = at;
  for (int64_t row = 0; row < b.rows; row++)
    for (int64_t k = 0; k < entries; k++) {
      int32_t place = b.end[key_of(b, row, k / of_tap, b.columns[row * entries + k])]++;
      b.slot[place] = row * entries + k, b.where[place] = row * b.taps + k / of_tap;
    }
}

// Bring columns and transposed lists up to a mask that has changed in some rows (null: maybe in all of them).
// Returns how many blocks changed; -1 if a list is full (make them anew); -2 - row if a block keeps other than n.
int64_t nm_update(const Blocks* w, const int64_t* chosen, int64_t chosen_count) {
  const Blocks& b = *w;
  const int64_t blocks = b.taps * b.inner / b.m, entries = blocks * b.n;
  std::vector<uint8_t> changed(chosen_count);
#pragma omp parallel for num_threads(b.threads) schedule(static)
  for (int64_t i = 0; i < chosen_count; i++) {
    int64_t row = chosen ? chosen[i] : i;
    const int32_t* column = b.columns + row * entries;
    bool same = true;
    for (int64_t k = 0; k < entries; k++) same &= kept(b, b.mask + row * b.mask_row, column[k]);
    changed[i] = !same;
  }
  int64_t blocks_changed = 0;
  const bool listed = b.keys > 0;  // nobody may have asked for the lists yet
  bool full = false;
  for (int64_t i = 0; i < chosen_count; i++) {
    if (!changed[i]) continue;
    int64_t row = chosen ? chosen[i] : i;
    const uint8_t* bits = b.mask + row * b.mask_row;
    for (int64_t block = 0; block < blocks; block++) {
      int32_t* column = b.columns + row * entries + block * b.n;
      bool same = true;
      for (int64_t k = 0; k < b.n; k++) same &= kept(b, bits, column[k]);
      if (same) continue;
      int64_t tap = block * b.m / b.inner;
      int32_t which = row * entries + block * b.n;
      if (listed && !full)
        for (int64_t k = 0; k < b.n; k++) take_out(b, key_of(b, row, tap, column[k]), which + k);
      if (!read_block(b, bits, block, column)) return -2 - row;
      for (int64_t k = 0; k < b.n && listed && !full; k++)
        full = !put_in(b, key_of(b, row, tap, column[k]), which + k, row * b.taps + tap);
      blocks_changed++;
    }
  }
  return full ? -1 : blocks_changed;
}

}  // extern "C"
