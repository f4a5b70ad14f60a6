// The machine's peak: multiply-adds on registers alone, for the benchmarks to divide by.
#pragma once

#include "vec.h"

namespace cmx::CMX_ISA {

static double peak_flop(Dtype dtype, int64_t rounds) {
#if defined(__AVX512F__)
  constexpr int kSums = 24;  // hides the latency of vdpbf16ps, 12 would not
#elif defined(__AVX2__)
  constexpr int kSums = 12;
#else
  constexpr int kSums = 8;
#endif
  const bool pairs = kBf16Products && dtype == Dtype::bfloat16;
  vf sums[kSums] = {}, a = {}, b = {};
  asm volatile("" : "+v"(a), "+v"(b));
  auto loop = [&](auto step) {
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 32
      for (int s = 0; s < kSums; s++) step(sums[s]);
#pragma GCC unroll 32
      for (int s = 0; s < kSums; s++) asm volatile("" : "+v"(sums[s]));
    }
  };
  if (pairs) loop([&](vf& sum) __attribute__((always_inline)) { sum = dot(sum, bits(a), bits(b)); });
  else loop([&](vf& sum) __attribute__((always_inline)) { sum += a * b; });
  return double(rounds) * kSums * VL * (pairs ? 4 : 2);
}

}  // namespace cmx::CMX_ISA
