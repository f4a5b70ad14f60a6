// The machine's peak: multiply-adds on registers alone, for the benchmarks to divide by.
#pragma once

#include "tiles.h"

namespace cmx::CMX_ISA {

#if defined(__AVX512F__)
// 24 sums hide the latency of vdpbf16ps, 12 would not
#define CMX_ONE(op, i) op " %%zmm30, %%zmm31, %%zmm" #i "\n"
#define CMX_SUMS(op)                                                                                                   \
  asm volatile(CMX_ONE(op, 0) CMX_ONE(op, 1) CMX_ONE(op, 2) CMX_ONE(op, 3) CMX_ONE(op, 4) CMX_ONE(op, 5) CMX_ONE(      \
                   op, 6) CMX_ONE(op, 7) CMX_ONE(op, 8) CMX_ONE(op, 9) CMX_ONE(op, 10) CMX_ONE(op, 11) CMX_ONE(op, 12) \
                   CMX_ONE(op, 13) CMX_ONE(op, 14) CMX_ONE(op, 15) CMX_ONE(op, 16) CMX_ONE(op, 17) CMX_ONE(op, 18)     \
                       CMX_ONE(op, 19) CMX_ONE(op, 20) CMX_ONE(op, 21) CMX_ONE(op, 22) CMX_ONE(op, 23)::               \
                           : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",  \
                             "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", \
                             "xmm21", "xmm22", "xmm23", "xmm30", "xmm31")
constexpr int kSums = 24;
#elif defined(__AVX2__)
#define CMX_ONE(op, i) op " %%ymm14, %%ymm15, %%ymm" #i "\n"
#define CMX_SUMS(op)                                                                                              \
  asm volatile(CMX_ONE(op, 0) CMX_ONE(op, 1) CMX_ONE(op, 2) CMX_ONE(op, 3) CMX_ONE(op, 4) CMX_ONE(op, 5)          \
                   CMX_ONE(op, 6) CMX_ONE(op, 7) CMX_ONE(op, 8) CMX_ONE(op, 9) CMX_ONE(op, 10) CMX_ONE(op, 11)::  \
                       : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
                         "xmm11", "xmm14", "xmm15")
constexpr int kSums = 12;
#else
constexpr int kSums = 8;
#endif

// On numbers between 1 and 2 of either sign, in every half of a word: with zeros, which draw less power, tiles are a fifth
// faster than any product is (Emerald Rapids).
static double peak_flop(Dtype dtype, int64_t rounds) {
  const bool pairs = kBf16Products && dtype == Dtype::bfloat16;
  alignas(64) uint16_t numbers[2 * kTile * kTileDepth];
  uint32_t random = 1;
  for (uint16_t& number : numbers) {
    random = random * 1664525 + 1013904223;
    number = 0x3f80 | (random >> 16 & 0x807f);
  }
#if defined(CMX_TILES)
  if (pairs) {
    const Tiles tiles;
    const uint16_t* const other = numbers + kTile * kTileDepth;
    tile_load<4>(numbers, 2 * kTileDepth), tile_load<5>(other, 2 * kTileDepth);
    tile_load<6>(other, 2 * kTileDepth), tile_load<7>(numbers, 2 * kTileDepth);
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t i = 0; i < rounds; i++)
      tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
    return double(rounds) * 4 * 2 * kTile * kTile * kTileDepth;
  }
#endif
#if defined(__AVX2__)
  asm volatile("vzeroall" ::
                   : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                     "xmm12", "xmm13", "xmm14", "xmm15");
  const vf &one = *(const vf*)numbers, &other = *(const vf*)(numbers + 32);
#if defined(__AVX512F__)
  asm volatile("vmovups %0, %%zmm30\nvmovups %1, %%zmm31" ::"m"(one), "m"(other) : "xmm30", "xmm31");
#else
  asm volatile("vmovups %0, %%ymm14\nvmovups %1, %%ymm15" ::"m"(one), "m"(other) : "xmm14", "xmm15");
#endif
#endif
#if defined(__AVX2__)
#if defined(__AVX512BF16__)
  if (pairs)
    for (int64_t i = 0; i < rounds; i++) CMX_SUMS("vdpbf16ps");
  else
#endif
    for (int64_t i = 0; i < rounds; i++) CMX_SUMS("vfmadd231ps");
#else
  vf sums[kSums] = {}, a = load((const float*)numbers), b = load((const float*)numbers + VL);
  for (int64_t i = 0; i < rounds; i++)
    for (int s = 0; s < kSums; s++) {
      sums[s] += a * b;
      asm volatile("" : "+x"(sums[s]), "+x"(a));
    }
#endif
  return double(rounds) * kSums * VL * (pairs ? 4 : 2);
}

}  // namespace cmx::CMX_ISA
