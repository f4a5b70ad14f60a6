// Large tensors of training in memory that is kept for the next one of their size. Without it every step has new pages,
// 3 us each on a virtual machine: glibc gives back to the system what backward frees.
//
// Free memory is marked MADV_FREE: the system takes it when it needs it. Free and used memory together stay below 5/4 of
// the most that was once in use: memory of other sizes goes before new is mapped.
#pragma once

#include <pthread.h>

#include <map>
#include <mutex>

#include "bind_cpu.h"

namespace cmx {

class KeptMemory {
 public:
  static KeptMemory& of_process() {
    static KeptMemory* const memory = [] {
      pthread_atfork(lock, unlock, unlock);  // a child of fork() must not find it locked by a thread that it lacks
      return new KeptMemory;                 // never destroyed: tensors may live longer than anything here
    }();
    return *memory;
  }

  // Aligned to 64 bytes; null for what malloc does as well, and where the system has none
  void* take(int64_t bytes) {
#if defined(MADV_FREE) && defined(MADV_HUGEPAGE)
    if (bytes < kSmallest) return nullptr;
    const int64_t size = round_up(bytes + kPlaces * kStep, kHugePage);
    const std::lock_guard lock(mutex_);
    auto found = free_.find(size);
    if (found == free_.end()) {
      for (; !free_.empty() && all_ + size > std::max(peak_, used_ + size) / 4 * 5;
           free_.erase(std::prev(free_.end()))) {
        const auto& [largest, base] = *std::prev(free_.end());
        munmap(base, largest);
        all_ -= largest;
      }
      char* const base = new_pages(size);
      if (!base) return nullptr;
      use_huge_pages(base, (bytes + kPlaces * kStep) / kHugePage * kHugePage);
      found = free_.emplace(size, base);
      all_ += size;
    }
    // not all at the same place of a page: they would share the sets of a cache
    void* const data = found->second + next_++ % kPlaces * kStep;
    given_[data] = {found->second, size};
    free_.erase(found);
    peak_ = std::max(peak_, used_ += size);
    return data;
#else
    (void)bytes;
    return nullptr;
#endif
  }

  // What is free goes back to the system
  void release() {
#if defined(MADV_FREE) && defined(MADV_HUGEPAGE)
    const std::lock_guard lock(mutex_);
    for (const auto& [size, base] : free_) {
      munmap(base, size);
      all_ -= size;
    }
    free_.clear();
#endif
  }

  void give_back(void* data) {
#if defined(MADV_FREE) && defined(MADV_HUGEPAGE)
    const std::lock_guard lock(mutex_);
    const auto found = given_.find(data);
    const auto [base, size] = found->second;
    given_.erase(found);
    used_ -= size;
    madvise(base, size, MADV_FREE);
    free_.emplace(size, base);
#else
    (void)data;
#endif
  }

 private:
  static void lock() { of_process().mutex_.lock(); }
  static void unlock() { of_process().mutex_.unlock(); }

  static constexpr int64_t kSmallest = 1 << 20, kPlaces = 16, kStep = 4096 + 64;

#if defined(MADV_FREE) && defined(MADV_HUGEPAGE)
  static char* new_pages(int64_t size) {  // at a multiple of kHugePage
    void* const mapped = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char *const first = (char*)mapped, *const base = (char*)round_up((int64_t)first, kHugePage);
    if (base > first) munmap(first, base - first);
    munmap(base + size, first + kHugePage - base);
    return base;
  }
#endif

  std::mutex mutex_;
  std::multimap<int64_t, char*> free_;                // by size
  std::map<void*, std::pair<char*, int64_t>> given_;  // by data: base, size
  int64_t used_ = 0, all_ = 0, peak_ = 0;             // bytes
  uint64_t next_ = 0;
};

inline Tensor kept_empty(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype,
                         int64_t bytes) {
  void* const data = KeptMemory::of_process().take(bytes);
  if (!data) return {};
  return torch::stable::from_blob(data, shape, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  dtype, [](void* p) { KeptMemory::of_process().give_back(p); });
}

// As output_like
inline Tensor kept_like(const Tensor& x, int64_t c, int64_t h, int64_t w) {
  const int64_t n = x.size(0);
  const bool last = is_channels_last(x);
  const std::vector<int64_t> strides =
      last ? std::vector<int64_t>{c * h * w, 1, w * c, c} : std::vector<int64_t>{c * h * w, h * w, w, 1};
  const Tensor kept = kept_empty({n, c, h, w}, strides, x.scalar_type(), n * c * h * w * x.element_size());
  return kept.defined() ? kept : output_like(x, c, h, w);
}

inline Tensor kept_floats(int64_t count) {
  const Tensor kept = kept_empty({count}, {1}, ScalarType::Float, count * 4);
  return kept.defined() ? kept : torch::stable::empty({count}, ScalarType::Float);
}

inline Tensor kept_bytes(int64_t count) {
  const int64_t size = std::max<int64_t>(count, 1) + 64;
  const Tensor kept = kept_empty({size}, {1}, ScalarType::Byte, size);
  return kept.defined() ? kept : torch::stable::empty({size}, ScalarType::Byte);
}

}  // namespace cmx
