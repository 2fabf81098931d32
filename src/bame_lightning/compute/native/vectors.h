// Vectors of numbers by the extensions of GCC and Clang: load, store, shuffle, transpose, add lanes.
#pragma once

#include <cstdint>
#include <cstddef>
#include <utility>

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

}  // namespace
