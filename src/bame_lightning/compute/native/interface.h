// What Python hands over; `structures.py` says the same.
#pragma once

#include <cstdint>

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
  const int64_t* number;  // row * row_length + column, grouped row by row
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
