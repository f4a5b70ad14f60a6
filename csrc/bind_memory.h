// Large results in memory that is kept for the next one of their size. Without it calls have new pages, 3 to 6 us each on
// a virtual machine, several times what a layer takes: glibc gives back to the system what was freed, or finds no place
// for its like.
//
// What was freed last, 64 MB of it, is given away first and as it is. The rest of what is free is marked MADV_FREE: the
// system takes it when it needs it; marking costs 50 us on two cores of a virtual machine. Free and used memory together
// stay below the most that was once in use and a quarter, or 64 MB, more: memory of other sizes goes before new is mapped.
#pragma once

#include <pthread.h>

#include <deque>
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
    char* base = taken_from(recent_, size);
    if (base) recent_bytes_ -= size;
    if (!base) base = taken_from(marked_, size);
    if (!base) {
      const int64_t most = std::max(peak_, used_ + size);
      make_room(size, most + std::max(most / 4, kRecent));
      base = new_pages(size);
      if (!base) return nullptr;
      use_huge_pages(base, (bytes + kPlaces * kStep) / kHugePage * kHugePage);
      all_ += size;
    }
    // not all at the same place of a page: they would share the sets of a cache
    void* const data = base + next_++ % kPlaces * kStep;
    given_[data] = {base, size};
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
    make_room(0, -1);
#endif
  }

  void give_back(void* data) {
#if defined(MADV_FREE) && defined(MADV_HUGEPAGE)
    const std::lock_guard lock(mutex_);
    const auto found = given_.find(data);
    const Pages pages = found->second;
    given_.erase(found);
    used_ -= pages.size;
    recent_.push_back(pages);
    recent_bytes_ += pages.size;
    for (; recent_bytes_ > kRecent; recent_.pop_front()) {
      const Pages oldest = recent_.front();
      recent_bytes_ -= oldest.size;
      madvise(oldest.base, oldest.size, MADV_FREE);
      marked_.push_back(oldest);
    }
#else
    (void)data;
#endif
  }

 private:
  static void lock() { of_process().mutex_.lock(); }
  static void unlock() { of_process().mutex_.unlock(); }

  struct Pages {
    char* base;
    int64_t size;
  };
  typedef std::deque<Pages> Freed;  // in the order in which they were

  static constexpr int64_t kSmallest = 1 << 20, kPlaces = 16, kStep = 4096 + 64, kRecent = 64 << 20;

#if defined(MADV_FREE) && defined(MADV_HUGEPAGE)
  static char* new_pages(int64_t size) {  // at a multiple of kHugePage
    void* const mapped = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char *const first = (char*)mapped, *const base = (char*)round_up((int64_t)first, kHugePage);
    if (base > first) munmap(first, base - first);
    munmap(base + size, first + kHugePage - base);
    return base;
  }

  // The last of this size; null if there is none
  static char* taken_from(Freed& freed, int64_t size) {
    const auto found = std::find_if(freed.rbegin(), freed.rend(), [&](const Pages& p) { return p.size == size; });
    if (found == freed.rend()) return nullptr;
    char* const base = found->base;
    freed.erase(std::next(found).base());
    return base;
  }

  // For `size` bytes more, so that all are no more than `most` if that can be: the oldest go first
  void make_room(int64_t size, int64_t most) {
    for (Freed* freed : {&marked_, &recent_})
      for (; !freed->empty() && all_ + size > most; freed->pop_front()) {
        const Pages oldest = freed->front();
        munmap(oldest.base, oldest.size);
        all_ -= oldest.size;
        if (freed == &recent_) recent_bytes_ -= oldest.size;
      }
  }
#endif

  std::mutex mutex_;
  Freed recent_, marked_;
  std::map<void*, Pages> given_;  // by data
  int64_t used_ = 0, all_ = 0, peak_ = 0, recent_bytes_ = 0;
  uint64_t next_ = 0;
};

inline Tensor kept_empty(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype,
                         int64_t bytes) {
  void* const data = KeptMemory::of_process().take(bytes);
  if (!data) return {};
  return torch::stable::from_blob(data, shape, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  dtype, [](void* p) { KeptMemory::of_process().give_back(p); });
}

// [N, c, h, w] in x's dtype and layout
inline Tensor output_like(const Tensor& x, int64_t c, int64_t h, int64_t w) {
  const int64_t n = x.size(0);
  const bool last = is_channels_last(x);
  const std::vector<int64_t> strides =
      last ? std::vector<int64_t>{c * h * w, 1, w * c, c} : std::vector<int64_t>{c * h * w, h * w, w, 1};
  const Tensor kept = kept_empty({n, c, h, w}, strides, x.scalar_type(), n * c * h * w * x.element_size());
  if (kept.defined()) return kept;
  const auto format =
      last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  return torch::stable::empty({n, c, h, w}, x.scalar_type(), std::nullopt, std::nullopt, std::nullopt, format);
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
