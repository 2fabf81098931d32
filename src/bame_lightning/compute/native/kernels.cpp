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

#include "gradient.h"
#include "index.h"
#include "product.h"

extern "C" {

int64_t nm_abi(void) { return 1; }
int64_t nm_lanes(int64_t type) { return type == 4 ? LANES<float> : LANES<double>; }

// 0: done. 1: something is not finite, and the output is undefined. -1: positions are not grouped row by row.
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

}  // extern "C"
