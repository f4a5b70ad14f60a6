// Activations on vectors, and the one epilogue: act(acc + bias) * scale + shift (+ residual).
#pragma once

#include <type_traits>

#include "gelu_table.h"
#include "vec.h"

namespace cmx::CMX_ISA {

// 2^x for x <= 128; below -126 the result is not exact but at most 2^-126, and 0 for -inf
CMX_INLINE vf exp2(vf x) {
  vf clamped = max(all(-127.f), x);
  vf n = clamped + 12582912.f;  // 1.5 * 2^23: the integer part in the low bits
  vf f = clamped - (n - 12582912.f);
  vf p = 1.54035304e-4f * f + 1.33335581e-3f;  // Taylor series of 2^f, |f| <= 1/2
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.f;
  return p * (vf)((bits(n) + 127) << 23);
}

// Phi(-a) for 0 <= a <= kTailEnd, Phi the normal distribution; exactly 0 at the end
#if defined(__AVX512F__)
constexpr float kTailEnd = kGeluEnd;
CMX_INLINE vf normal_tail(vf a) {
  // in segments of degree 3
  const vf magic = all(12582912.f), t = a * kGeluScale + magic, d = a * kGeluScale - (t - magic);
  auto coefficient = [&](int i) {
    return (vf)_mm512_permutex2var_ps(_mm512_load_ps(kGeluTable[i]), (__m512i)t, _mm512_load_ps(kGeluTable[i] + 16));
  };
  return ((coefficient(3) * d + coefficient(2)) * d + coefficient(1)) * d + coefficient(0);
}
#else
constexpr float kTailEnd = 13.f;
CMX_INLINE vf normal_tail(vf a) {
  // erfc(z) / 2, z = a / sqrt(2); Abramowitz and Stegun 7.1.26
  const vf z = a * 0.70710678f, t = 1.f / (1.f + 0.3275911f * z), e = exp2(z * z * -1.44269504f);
  const vf q = (((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f;
  return (z > all(9.f)) ? vf{} : .5f * q * t * e;
}
#endif

// gelu(x) = max(x, 0) - |x| Phi(-|x|). -inf gives NaN, as x * Phi(x) does.
CMX_INLINE vf gelu(vf x) {
  const vf m = min(all(kTailEnd), (vf)(bits(x) & 0x7fffffffu));
  return max(all(0), x) - max(m, vf{} - x) * normal_tail(m);
}

// x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)
CMX_INLINE vf one_plus_exp(vf x) {
  const vf minus_2u = x * (-1.59576912f - 0.0713548163f * x * x);
  return 1.f + exp2(min(all(128.f), minus_2u * 1.44269504f));
}
CMX_INLINE vf gelu_tanh(vf x) { return x / one_plus_exp(x); }

// The same to 6.4e-5, and from -3 on to a third of what rounding to bfloat16 leaves: -|x| Phi(-|x|) in segments of degree 2.
// x / 2 + |x| / 2 is max(x, 0), and NaN for -inf.
CMX_INLINE vf gelu_near(vf x) {
#if defined(__AVX512F__)
  const vf a = (vf)(bits(x) & 0x7fffffffu), m = min(all(kGeluEnd), a);
  const vf t = m + all(12582912.f / kGeluNearScale);
  auto coefficient = [&](int i) {
    return (vf)_mm512_permutex2var_ps(_mm512_load_ps(kGeluNear[i]), (__m512i)t, _mm512_load_ps(kGeluNear[i] + 16));
  };
  return x * .5f + (a * .5f + ((coefficient(2) * m + coefficient(1)) * m + coefficient(0)));
#else
  return gelu(x);
#endif
}

template <Act act, bool near = false>
CMX_INLINE vf activate(vf x) {
  if constexpr (act == Act::relu) return max(all(0), x);
  if constexpr (act == Act::gelu && near) return gelu_near(x);
  if constexpr (act == Act::gelu) return gelu(x);
  if constexpr (act == Act::gelu_tanh) return gelu_tanh(x);
  return x;
}

// act(x), and its derivative in `slope`
template <Act act>
CMX_INLINE vf activate_with_slope(vf x, vf& slope) {
  if constexpr (act == Act::relu) {
    slope = (x > vf{}) ? all(1) : vf{};
  } else if constexpr (act == Act::gelu) {  // Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)
    const vf a = (vf)(bits(x) & 0x7fffffffu), m = min(all(kTailEnd), a), tail = normal_tail(m);
    const vf near = max(all(-13.f), min(all(13.f), x));
    slope = ((x > vf{}) ? 1.f - tail : tail) + near * 0.39894228f * exp2(near * near * -0.72134752f);
    return max(all(0), x) - max(m, vf{} - x) * tail;
  } else if constexpr (act == Act::gelu_tanh) {  // s + x s (1 - s) 2u'
    const vf s = 1.f / one_plus_exp(x), near = max(all(-20.f), min(all(20.f), x));
    slope = s + near * s * (1.f - s) * (1.59576912f + 0.214064449f * near * near);
    return x * s;
  } else {
    slope = all(1);
  }
  return activate<act>(x);
}

// Calls f(std::integral_constant<Act, act>)
template <class F>
CMX_INLINE auto with_activation(Act act, F f) {
  switch (act) {
    case Act::relu: return f(std::integral_constant<Act, Act::relu>());
    case Act::gelu: return f(std::integral_constant<Act, Act::gelu>());
    case Act::gelu_tanh: return f(std::integral_constant<Act, Act::gelu_tanh>());
    default: return f(std::integral_constant<Act, Act::none>());
  }
}

// What is added at the end: nothing, float32 pixels, or bfloat16 pixel pairs
struct NoResidual {
  CMX_INLINE vf at(const float*, int64_t) { return vf{}; }
};
struct FloatResidual {
  CMX_INLINE vf at(const float* p, int64_t i) { return load(p + i * VL); }
};
struct PairResidual {
  CMX_INLINE vf at(const float* p, int64_t i) {
    const vu pair = *(const vu*)(p + i / 2 * VL);
    return i % 2 ? high(pair) : low(pair);
  }
};

struct BlockConstants {
  vf bias, scale, shift;
  BlockConstants(const Constants& c, int64_t channel)
      : bias(load(c.bias + channel)), scale(load(c.scale + channel)), shift(load(c.shift + channel)) {}
};

template <Act act, bool near>
CMX_INLINE vf finished(const float* acc, const BlockConstants& c) {
  return activate<act, near>(load(acc) + c.bias) * c.scale + c.shift;
}

// acc [count][VL] -> out, `step` elements from pixel to pixel. near: as exact as bfloat16 needs it
template <class Residual, bool near, class Out>
static __attribute__((noinline)) void epilogue(const float* acc, int64_t count, const Constants& constants,
                                               int64_t channel, Act act, const float* residual, Out* out,
                                               int64_t step) {
  const BlockConstants c(constants, channel);
  with_activation(act, [&](auto a) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; i++)
      store(out + i * step, finished<decltype(a)::value, near>(acc + i * VL, c) + Residual::at(residual, i));
  });
}

// acc [count][VL] -> pairs of bfloat16 pixels, an even number of them
static __attribute__((noinline)) void paired_epilogue(const float* acc, int64_t count, const Constants& constants,
                                                      int64_t channel, Act act, vu* out) {
  const BlockConstants c(constants, channel);
  with_activation(act, [&](auto a) __attribute__((always_inline)) {
    constexpr Act kAct = decltype(a)::value;
#pragma GCC unroll 2
    for (int64_t i = 0; i < count; i += 2)
      out[i / 2] = pack_pair(finished<kAct, true>(acc + i * VL, c), finished<kAct, true>(acc + (i + 1) * VL, c));
  });
}

}  // namespace cmx::CMX_ISA
