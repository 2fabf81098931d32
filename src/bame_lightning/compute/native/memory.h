// Memory that lasts between calls.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace {

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
