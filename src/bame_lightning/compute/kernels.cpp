// Products of N:M sparse layers on a CPU: forward, input gradient, weight gradient at chosen positions.
//
// One idea carries all of them. Samples lie in the lanes of vectors: activations are *packed* so that a feature of LANES
// samples is one vector. Then a kept weight is a scalar that multiplies whole vectors at an offset that the mask gives,
// and nothing has to be gathered. A convolution is the same product at many output positions, whose inputs lie at one offset
// from each other. Packing transposes small squares in registers; results are transposed back as they are written.
//
// All offsets into packed activations count vectors ("units"). An element of an output is summed by one thread, in an order
// that follows from shapes and mask alone: results are the same for any number of threads.
//
// Plain C interface, no headers of torch: built in seconds, loaded by ctypes. Needs the vector extensions of GCC or Clang.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int TILE = 8;     // output positions whose sums are kept in registers at once
constexpr int UNIT = 16;    // output positions of a piece of work, of a convolution
constexpr int SPAN = 32;    // output positions over which a weight's gradient is summed in a register
constexpr int ENTRIES = 8;  // weights whose gradients are summed in registers at once

template <class T>
struct Vector {
  static constexpr int LANES = BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(BYTES)));
  typedef T Loose __attribute__((vector_size(BYTES), aligned(4), may_alias));
};
template <class T>
using V = typename Vector<T>::V;
template <class T>
constexpr int LANES = Vector<T>::LANES;

template <class T>
INLINE V<T> load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::Loose*>(p);
}
template <class T>
INLINE void store(T* p, V<T> v) {
  *reinterpret_cast<typename Vector<T>::Loose*>(p) = v;
}

// Shuffles whose lanes a constexpr functor chooses among those of two vectors.
template <class T>
struct Integer;
template <>
struct Integer<float> {
  typedef int32_t type;
};
template <>
struct Integer<double> {
  typedef int64_t type;
};

template <class T, class Choose, size_t... I>
INLINE V<T> shuffle_lanes(V<T> a, V<T> b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Choose::lane(I)...);
#else
  typedef typename Integer<T>::type Mask __attribute__((vector_size(BYTES)));
  return __builtin_shuffle(a, b, Mask{Choose::lane(I)...});
#endif
}
template <class T, class Choose>
INLINE V<T> shuffle(V<T> a, V<T> b) {
  return shuffle_lanes<T, Choose>(a, b, std::make_index_sequence<LANES<T>>{});
}

// Two rows of a square exchange what lies `H` lanes apart.
template <int L, int H>
struct Low {
  static constexpr int lane(int i) { return i & H ? L + i - H : i; }
};
template <int L, int H>
struct High {
  static constexpr int lane(int i) { return i & H ? L + i : i + H; }
};

template <class T, int H>
INLINE void exchange(V<T>* row) {
  constexpr int L = LANES<T>;
  if constexpr (H < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; i++)
      if (!(i & H)) {
        V<T> a = row[i], b = row[i + H];
        row[i] = shuffle<T, Low<L, H>>(a, b);
        row[i + H] = shuffle<T, High<L, H>>(a, b);
      }
    exchange<T, 2 * H>(row);
  }
}
template <class T>
INLINE void transpose(V<T>* row) {
  exchange<T, 1>(row);
}

// Items of `S` lanes in two vectors are folded in half: the first or the second half of every item.
template <int L, int S, int SECOND>
struct Half {
  static constexpr int lane(int i) { return (i / (S / 2)) * S + i % (S / 2) + SECOND * (S / 2); }
};
template <class T, int S, int COUNT>
INLINE void fold(V<T>* sums) {
  constexpr int L = LANES<T>;
  if constexpr (S > 1) {
    constexpr int NEXT = (COUNT + 1) / 2;
#pragma GCC unroll 8
    for (int i = 0; i < NEXT; i++) {
      V<T> a = sums[2 * i], b = 2 * i + 1 < COUNT ? sums[2 * i + 1] : a;
      sums[i] = shuffle<T, Half<L, S, 0>>(a, b) + shuffle<T, Half<L, S, 1>>(a, b);
    }
    fold<T, S / 2, NEXT>(sums);
  }
}
// Sum the lanes of each of `ENTRIES` vectors. The vector type has at least 4 lanes, so they end in 1 or 2 vectors.
template <class T>
INLINE void add_lanes(V<T>* sums, T* out, int count) {
  fold<T, LANES<T>, ENTRIES>(sums);
  T found[LANES<T> > ENTRIES ? LANES<T> : ENTRIES];
  constexpr int VECTORS = ENTRIES > LANES<T> ? ENTRIES / LANES<T> : 1;
  for (int i = 0; i < VECTORS; i++) store(found + i * LANES<T>, sums[i]);
  for (int i = 0; i < count; i++) out[i] += found[i];
}

// Memory that lasts between calls: fresh pages of the system cost more than the products of a small layer.
struct Buffers {
  std::mutex lock;
  std::vector<std::pair<size_t, void*>> free;
} buffers;

class Buffer {
 public:
  explicit Buffer(size_t bytes) : size(bytes + 4096) {
    std::lock_guard<std::mutex> guard(buffers.lock);
    auto best = buffers.free.end();
    for (auto it = buffers.free.begin(); it != buffers.free.end(); ++it)
      if (it->first >= size && (best == buffers.free.end() || it->first < best->first)) best = it;
    if (best == buffers.free.end() && !buffers.free.empty()) {  // let the largest one grow
      best = std::max_element(buffers.free.begin(), buffers.free.end());
      ::free(best->second);
      buffers.free.erase(best);
      best = buffers.free.end();
    }
    if (best != buffers.free.end()) {
      size = best->first, memory = best->second;
      buffers.free.erase(best);
    } else {
      size = (size + 4095) / 4096 * 4096;
      if (posix_memalign(&memory, 4096, size)) throw std::bad_alloc();
    }
  }
  ~Buffer() {
    std::lock_guard<std::mutex> guard(buffers.lock);
    buffers.free.emplace_back(size, memory);
  }
  Buffer(const Buffer&) = delete;
  template <class T>
  T* as() {
    return static_cast<T*>(memory);
  }

 private:
  size_t size;
  void* memory = nullptr;
};

}  // namespace

extern "C" {

// Activations of samples that lie one after the other in memory, and where each of their features goes.
// Packed, a group of samples holds for y < height, channel, x < width one vector; `map` leaves a border, which is zero.
struct Packing {
  const void* source;
  int64_t samples, features;
  const int32_t* map;           // feature -> unit within its group
  int64_t tiles_of_group;       // vectors of samples that lie side by side: 1 for convolutions
  int64_t height, channels, width;          // of a packed group, with its border
  int64_t top, left, inner_height, inner_width;
};

// The rows of a sparse matrix: entries begin[row] .. end[row]; if `begin` is null, `row_entries` for each row.
struct Entries {
  const int32_t *begin, *end;
  int64_t row_entries;
  const int32_t* unit;  // offset of an entry in packed activations
  int64_t scale;        // ... in multiples of so many vectors
  const void* value;
  const int32_t* slot;  // entry -> place in `value`; null: the same
  int64_t entries;      // places for entries, used or not
};

struct Product {
  int64_t type;  // bytes of a number
  int64_t threads;
  Packing input;
  Entries matrix;
  int64_t sections;     // pieces of the features, one after the other, so that they fit the cache
  int64_t classes;      // kinds of output positions with entries of their own
  const int32_t* positions;        // class -> first position, classes + 1 of them
  const int32_t* input_unit;       // position -> unit in a group
  const int64_t* output_offset;    // position -> element of an output sample
  int64_t rows;
  const void* bias;
  void* output;
  int64_t output_features, row_stride;
  int64_t samples_of_position;  // LANES if positions are vectors of samples (linear layers), else 0
};

struct Positions {  // where the gradient is asked for, beside the mask
  const int64_t* number;  // row * row_length + column, ascending
  int64_t count, row_length;
  const int32_t* column_unit;  // column -> unit; null: the column itself
  int64_t rows_of_group, group_units;  // added for each group of rows
};

struct WeightGradient {
  int64_t type, threads;
  Packing input, gradient;
  Entries matrix;  // uniform
  int64_t sections;
  int64_t positions;
  const int32_t *input_unit, *gradient_unit;
  int64_t gradient_row;  // units between rows
  int64_t rows;
  Positions more;
  void* output;
  const int32_t* columns;          // entry -> column of its row
  const int64_t* column_offset;    // column -> element of the output's row; null: the same
  int64_t row_stride, output_size;
  int64_t rows_lie_together;  // a row's elements are consecutive
};

struct Gather {
  int64_t type, threads;
  const void* weight;
  void* values;
  const int32_t* columns;
  const int64_t* column_offset;
  int64_t rows, row_entries, row_stride, row_length;
};

// What tells the place of a weight: rows of taps (kernel positions), each with `inner` inputs, in blocks that keep n of m.
// The transposed lists have a key for each input of each kind of position and section: tap_key[tap] + row_key[row] + input.
struct Blocks {
  int64_t threads, rows, taps, inner, n, m;
  const uint8_t* mask;
  int64_t mask_row;
  const int64_t* mask_offset;  // column -> element of the mask's row; null: the same
  int32_t* columns;
  const int64_t *tap_key, *row_key;
  int64_t rows_of_group, keys;
  int32_t *begin, *end;
  int32_t *where, *slot;  // row * taps + tap, and the entry
  int64_t places;
};

}  // extern "C"

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
  const int64_t* number;
  std::vector<int32_t> unit;
  std::vector<int64_t> first;  // row * sections + section -> first entry
  void find(const WeightGradient& w) {
    const Positions& m = w.more;
    number = m.number;
    unit.resize(m.count);
    first.assign(w.rows * w.sections + 1, m.count);
    const int64_t* end = m.number + m.count;
    for (int64_t row = 0; row < w.rows; row++) {
      int64_t start = row * m.row_length, extra = row / m.rows_of_group * m.group_units;
      const int64_t* from = std::lower_bound(m.number, end, start);
      const int64_t* to = std::lower_bound(from, end, start + m.row_length);
      for (int64_t s = 0; s < w.sections; s++)
        first[row * w.sections + s] = std::lower_bound(from, to, start + m.row_length * s / w.sections) - m.number;
      for (const int64_t* n = from; n < to; n++)
        unit[n - m.number] = (m.column_unit ? m.column_unit[*n - start] : int32_t(*n - start)) + extra;
    }
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
    int64_t c = w.more.number[k] - row * length;
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
  if (w.more.count) more.find(w);
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
  int64_t groups_before = b.rows_of_group ? row / b.rows_of_group : 0;
  return b.tap_key[tap] + b.row_key[row] + groups_before * b.inner + column - tap * b.inner;
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

int64_t nm_lanes(int64_t type) { return type == 4 ? LANES<float> : LANES<double>; }

// 0: done. 1: something is not finite, and the output is undefined.
int64_t nm_product(const Product* w) { return w->type == 4 ? product<float>(*w) : product<double>(*w); }
int64_t nm_weight_gradient(const WeightGradient* w) {
  return w->type == 4 ? weight_gradient<float>(*w) : weight_gradient<double>(*w);
}
int64_t nm_gather(const Gather* w) { return w->type == 4 ? gather<float>(*w) : gather<double>(*w); }

// unit[i] = table[column[i]] + group of its row * group_units
void nm_translate(const int32_t* column, const int32_t* table, int32_t* unit, int64_t rows, int64_t entries,
                  int64_t rows_of_group, int64_t group_units, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    int32_t extra = row / rows_of_group * group_units;
    for (int64_t k = row * entries; k < (row + 1) * entries; k++) unit[k] = table[column[k]] + extra;
  }
}

void nm_release(void) {
  std::lock_guard<std::mutex> guard(buffers.lock);
  for (auto& buffer : buffers.free) free(buffer.second);
  buffers.free.clear();
}

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
      if (!full)
        for (int64_t k = 0; k < b.n; k++) take_out(b, key_of(b, row, tap, column[k]), which + k);
      if (!read_block(b, bits, block, column)) return -2 - row;
      for (int64_t k = 0; k < b.n && !full; k++)
        full = !put_in(b, key_of(b, row, tap, column[k]), which + k, row * b.taps + tap);
      blocks_changed++;
    }
  }
  return full ? -1 : blocks_changed;
}

}  // extern "C"
