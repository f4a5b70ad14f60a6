// Memory of exactly the right size, on the CPU or a GPU, for the programs that run under sanitizers.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>

#include "cuda/platform.cuh"

namespace {

#ifdef CMX_EMULATED
template <class T>
using Buffer = std::unique_ptr<T[]>;
template <class T>
Buffer<T> allocate(int64_t count) {
  return Buffer<T>(new T[count]);
}
constexpr int kOrders = 6;  // of threads and of copies: forward, reverse, random; then with cp.async arriving at once
inline void prepare(int order) {
  cmx::emulator::machine.order = static_cast<cmx::emulator::Machine::Order>(order % 3);
  cmx::emulator::machine.copies_arrive_at_once = order >= 3;
}
inline cudaError_t finish() { return cudaSuccess; }
#else
struct Free {
  void operator()(void* p) const { cudaFree(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;
template <class T>
Buffer<T> allocate(int64_t count) {
  void* p = nullptr;
  if (cudaError_t error = cudaMallocManaged(&p, count * sizeof(T))) throw std::runtime_error(cudaGetErrorString(error));
  return Buffer<T>(static_cast<T*>(p));
}
constexpr int kOrders = 1;
inline void prepare(int) {}
inline cudaError_t finish() { return cudaDeviceSynchronize(); }
#endif

// Run `wrong` on each case, and in two orders: a sanitizer sees nearly the same in all, and the next case runs in the next two.
template <class Cases, class F>
int in_orders(const Cases& cases, const F& wrong) {
  static int order = 0;
  int bad = 0;
  for (const auto& k : cases)
    for (int run = 0; run < (kOrders > 1 ? 2 : 1) && !bad; ++run) {
      prepare(order++ % kOrders);
      bad += wrong(k);
    }
  return bad;
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("CUDA error " + std::to_string(static_cast<int>(error)));
}

}  // namespace
