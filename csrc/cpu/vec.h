// Vectors of float32 for one instruction set, and the storage types that load into and store from them.
// Everything lives in a namespace of its own per level: two levels must never share an inline function.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "params.h"

#define CMX_ALWAYS_INLINE inline __attribute__((always_inline))
#define CMX_INLINE static CMX_ALWAYS_INLINE

namespace cmx::CMX_ISA {

#if defined(__AVX512F__)
constexpr int64_t VL = 16;
#elif defined(__AVX2__)
constexpr int64_t VL = 8;
#else
constexpr int64_t VL = 4;
#endif
#if defined(__AVX512BF16__)
constexpr bool kBf16Products = true;
#else
constexpr bool kBf16Products = false;
#endif

typedef float vf __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * VL), aligned(2), may_alias));
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

CMX_INLINE vf all(float x) { return x - vf{}; }
CMX_INLINE vu bits(vf x) { return (vu)x; }

// A NaN in the second operand stays: max(0, NaN) = NaN.
#if defined(__AVX512F__)
CMX_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
CMX_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
CMX_INLINE vf broadcast(const float* p) { return (vf)_mm512_set1_ps(*p); }
#elif defined(__AVX2__)
CMX_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
CMX_INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
CMX_INLINE vf broadcast(const float* p) { return (vf)_mm256_set1_ps(*p); }
#else
CMX_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
CMX_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
CMX_INLINE vf broadcast(const float* p) { return all(*p); }
#endif

// float32 -> bfloat16, round to nearest even, NaN stays NaN
CMX_INLINE vh narrow_bf16(vf v) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  vu u = bits(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector((v == v) ? rounded : (u >> 16) | 0x40, vh);
#endif
}

CMX_INLINE vf widen_bf16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

CMX_INLINE vf widen_fp16(vh h) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  vu u = __builtin_convertvector(h, vu), magnitude = (u & 0x7fff) << 13;
  vf scaled = (vf)magnitude * 0x1p112f;                                             // also right for denormals
  vu wide = (magnitude >= 0x0f800000u) ? (magnitude | 0x7f800000u) : bits(scaled);  // inf and NaN
  return (vf)(wide | (u & 0x8000) << 16);
#endif
}

CMX_INLINE vh narrow_fp16(vf v) {
#if defined(__AVX512F__)
  // all lanes: the form without a mask has an undefined operand, of which GCC 12 warns
  return (vh)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  vu u = bits(v), sign = (u >> 16) & 0x8000, m = u & 0x7fffffff;
  vu denormal = bits((vf)m + 0.5f) - 0x3f000000u;                 // below 2^-14: the adder rounds
  vu normal = (m - 0x38000000u + 0xfff + ((m >> 13) & 1)) >> 13;  // rebias 127 -> 15, round to nearest even
  vu nan_or_inf = (m > 0x7f800000u) ? (vu{} + 0x7e00u) : (vu{} + 0x7c00u);
  vu r = (m < 0x38800000u) ? denormal : normal;
  return __builtin_convertvector(((m >= 0x47800000u) ? nan_or_inf : r) | sign, vh);
#endif
}

CMX_INLINE vf load(const float* p) { return *(const vf*)p; }
CMX_INLINE vf load(const bfloat16* p) { return widen_bf16(*(const vh*)p); }
CMX_INLINE vf load(const float16* p) { return widen_fp16(*(const vh*)p); }

CMX_INLINE void store(float* p, vf v) { *(vf*)p = v; }
CMX_INLINE void store(bfloat16* p, vf v) { *(vh*)p = narrow_bf16(v); }
CMX_INLINE void store(float16* p, vf v) { *(vh*)p = narrow_fp16(v); }

// `count` < VL elements, `step` apart; the other lanes are zero
template <class T>
CMX_INLINE vf load_some(const T* p, int64_t step, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if (step == 1) {  // below, a load waits until all stores are done
    const __mmask16 mask = (1u << count) - 1;
    if constexpr (sizeof(T) == 4) return (vf)_mm512_maskz_loadu_ps(mask, p);
    alignas(32) T some[VL];
    *(vh*)some = (vh)_mm256_maskz_loadu_epi16(mask, p);
    return load(some);
  }
#endif
  T some[VL] = {};
  for (int64_t i = 0; i < count; i++) some[i] = p[i * step];
  return load(some);
}
template <class T>
CMX_INLINE void store_some(T* p, int64_t step, int64_t count, vf v) {
  T some[VL];
  store(some, v);
  for (int64_t i = 0; i < count; i++) p[i * step] = some[i];
}

// Two bfloat16 pixels of one channel in a word: the even one low, the odd one high
CMX_INLINE vu pack_pair(vf even, vf odd) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);  // even ones in the lower half
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vu)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
#endif
  return __builtin_convertvector(narrow_bf16(even), vu) | __builtin_convertvector(narrow_bf16(odd), vu) << 16;
}
CMX_INLINE vf low(vu pair) { return (vf)(pair << 16); }
CMX_INLINE vf high(vu pair) { return (vf)(pair & 0xffff0000u); }
// acc + low(a) low(b) + high(a) high(b)
CMX_INLINE vf dot(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  return acc + low(a) * low(b) + high(a) * high(b);
#endif
}

// Lanes of a and b interleaved: a0 b0 a1 b1 ..., the first or the second half
#if defined(__AVX512F__)
CMX_INLINE vf interleave_low(vf a, vf b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
CMX_INLINE vf interleave_high(vf a, vf b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
CMX_INLINE vf interleave_low(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
CMX_INLINE vf interleave_high(vf a, vf b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
CMX_INLINE vf interleave_low(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
CMX_INLINE vf interleave_high(vf a, vf b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// Lane r * VL / R is the sum of the lanes of v[r]: halves are added until one lane is left, in the same order for any R.
template <int R>
CMX_INLINE vf totals(vf (&v)[R]) {
  auto halves = [](vf a, vf b) { return interleave_low(a, b) + interleave_high(a, b); };
  for (int n = R / 2; n; n /= 2)
    for (int i = 0; i < n; i++) v[i] = halves(v[i], v[i + n]);
  for (int64_t lanes = R; lanes < VL; lanes *= 2) v[0] = halves(v[0], v[0]);
  return v[0];
}

// VL x VL, in place, in log2(VL) rounds of perfect shuffles
CMX_INLINE void transpose(vf (&v)[VL]) {
#pragma GCC unroll 4
  for (int64_t round = 1; round < VL; round *= 2) {
    vf t[VL];
#pragma GCC unroll 8
    for (int64_t i = 0; i < VL / 2; i++) {
      t[2 * i] = interleave_low(v[i], v[i + VL / 2]);
      t[2 * i + 1] = interleave_high(v[i], v[i + VL / 2]);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < VL; i++) v[i] = t[i];
  }
}

CMX_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
CMX_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls f with a value of the storage type of a Dtype
template <class F>
CMX_INLINE auto with_dtype(Dtype d, F f) {
  switch (d) {
    case Dtype::bfloat16: return f(bfloat16{});
    case Dtype::float16: return f(float16{});
    default: return f(float{});
  }
}

}  // namespace cmx::CMX_ISA
