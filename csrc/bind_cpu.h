// What the CPU bindings share: views, checks, allocation, tasks.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "bind.h"
#include "cpu_levels.h"
#include "huge_pages.h"

namespace cmx {

inline View view_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": wanted a CPU tensor");
  STD_TORCH_CHECK(t.dim() == 4, name, ": got shape ", shape_of(t), ", wanted 4 dimensions");
  return {const_cast<void*>(t.const_data_ptr()),
          dtype_of(t, name),
          t.size(0),
          t.size(1),
          t.size(2),
          t.size(3),
          t.stride(0),
          t.stride(1),
          t.stride(2),
          t.stride(3),
          false};
}

// A weight as the packing functions want it: its output channels are the View's channels.
inline View weight_view(const Tensor& w, int64_t rows, int64_t columns, const char* name) {
  const int64_t c = w.size(0);
  return {const_cast<void*>(w.const_data_ptr()),
          dtype_of(w, name),
          1,
          c,
          rows,
          columns,
          0,
          rows * columns,
          columns,
          1,
          false};
}

inline void check_activations(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(1) >= 1, "x: got shape ", shape_of(x),
                  ", wanted [N, C, H, W] with at least one channel, on the CPU");
}

inline void check_weight(const Tensor& x, const Tensor& w, bool fits, const char* wanted) {
  STD_TORCH_CHECK(w.is_cpu() && w.scalar_type() == x.scalar_type(), "weight: wanted a CPU tensor in x's dtype");
  STD_TORCH_CHECK(fits, "weight: got shape ", shape_of(w), " with x of ", shape_of(x), ", wanted ", wanted);
}

template <class T>
void copy_values(const Tensor& t, std::vector<double>& out) {
  const T* p = (const T*)t.const_data_ptr();
  const int64_t step = t.stride(0);
  for (size_t i = 0; i < out.size(); i++) out[i] = (double)p[i * step];
}

inline std::vector<double> values(const Optional& v, const char* name, int64_t count, double missing) {
  std::vector<double> out(count, missing);
  if (!v) return out;
  STD_TORCH_CHECK(v->is_cpu() && v->dim() == 1 && v->size(0) == count, name, ": got shape ", shape_of(*v), ", wanted [",
                  count, "] on the CPU");
  switch (v->scalar_type()) {
    case ScalarType::Double: copy_values<double>(*v, out); break;
    case ScalarType::Float: copy_values<float>(*v, out); break;
    case ScalarType::Half: copy_values<torch::headeronly::Half>(*v, out); break;
    case ScalarType::BFloat16: copy_values<torch::headeronly::BFloat16>(*v, out); break;
    default: STD_TORCH_CHECK(false, name, ": wanted a floating point dtype");
  }
  return out;
}

inline Tensor bytes(int64_t count) {
  return torch::stable::empty({std::max<int64_t>(count, 1) + 64}, ScalarType::Byte);
}
inline char* aligned(const Tensor& t) { return (char*)round_up((int64_t)t.mutable_data_ptr(), 64); }

// Memory of the calling thread, kept until its next call: pages that are new in every call take longer than a small layer.
class Scratch {
 public:
  enum Use { workers, activations, panel, uses };  // of one call, at the same time

  Scratch(Use use, int64_t count) {
    const int64_t most_kept = (8 << 20) * std::max<int64_t>(2, torch::stable::get_num_threads());
    thread_local struct {
      Memory data;
      int64_t size = 0;
    } kept[uses];
    auto& mine = kept[use];
    if (count > most_kept)
      own_ = allocated(count);
    else if (count > mine.size)
      mine.size = 0, mine.data.reset(), mine.data = allocated(count), mine.size = count;
    data_ = (own_ ? own_ : mine.data).get();
  }
  char* data() const { return data_; }

 private:
  struct Free {
    void operator()(char* data) const { free(data); }
  };
  using Memory = std::unique_ptr<char, Free>;

  static Memory allocated(int64_t count) {
    const int64_t unit = count < kHugePage ? 64 : kHugePage, size = round_up(std::max<int64_t>(count, 1), unit);
    Memory memory((char*)aligned_alloc(unit, size));
    if (!memory) throw std::bad_alloc();
    if (unit == kHugePage) use_huge_pages(memory.get(), size);
    return memory;
  }

  Memory own_;
  char* data_;
};

// Equal shares: neighbouring tasks, which may write into the same line of the cache, go to one worker. Then others': for
// tasks that share no line. A worker begins with its share, whose input it wrote itself where stages are alike, and then
// takes what slower workers have left of theirs.
enum class Tasks { in_shares, then_others };

// Calls f(task, scratch) for every task, each worker with scratch memory of its own
template <class F>
inline void run(int64_t tasks, int64_t scratch_bytes, const F& f, Tasks how = Tasks::in_shares) {
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  if (!workers) return;
  const int64_t piece = round_up(scratch_bytes, 4096);
  const Scratch memory(Scratch::workers, workers * piece);
  char* const scratch = memory.data();
  const auto first_of = [&](int64_t worker) { return tasks * worker / workers; };
  struct alignas(64) Share {  // a cache line each
    std::atomic<int64_t> next;
  };
  std::vector<Share> shares(how == Tasks::then_others ? workers : 0);
  for (size_t i = 0; i < shares.size(); i++) shares[i].next = first_of(i);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++) {
      char* const mine = scratch + worker * piece;
      if (shares.empty())
        for (int64_t task = first_of(worker); task < first_of(worker + 1); task++) f(task, mine);
      for (size_t i = 0; i < shares.size(); i++) {
        const int64_t share = (worker + i) % workers, last = first_of(share + 1);
        std::atomic<int64_t>& next = shares[share].next;
        while (next < last)
          if (const int64_t task = next++; task < last) f(task, mine);
      }
    }
  });
}

inline int64_t l2_bytes() {
  static const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return found > 0 ? found : 1 << 20;
}

// Rows of a band: at most max_rows, or a quarter more, and such that the workers end together. Counted is when the last one
// ends, in half rows, and one for each of its bands, which read the weights again.
inline int64_t band_rows(int64_t planes, int64_t h, int64_t max_rows) {
  const int64_t workers = torch::stable::get_num_threads();
  max_rows = std::clamp<int64_t>(max_rows, 1, h);
  int64_t best = ceil_div(h, ceil_div(h, max_rows));
  const auto time = [&](int64_t rows) {
    const int64_t bands = ceil_div(h, rows), whole = planes * (bands - 1), last = h - (bands - 1) * rows;
    const int64_t rounds = whole / workers, more = whole % workers;  // who has one more has no last band
    const int64_t others = rounds * rows + ceil_div(planes, workers - more) * last;
    return 2 * std::max(more ? (rounds + 1) * rows : 0, others) + ceil_div(planes * bands, workers);
  };
  for (int64_t rows = std::min(h, ceil_div(5 * max_rows, 4)); rows > 0 && workers > 1; rows--)
    if (time(rows) < time(best)) best = rows;
  return best;
}

// Packed for the kernels of this machine. The weight's output channels are the channels of the View; see pack_pointwise.
Tensor packed_pointwise(const View& weight);
Tensor packed_depthwise(const View& weight);

}  // namespace cmx
