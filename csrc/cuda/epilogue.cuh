// Numbers in and out of float32, and the activations.
#pragma once

#include "../params.h"
#include "ptx.cuh"

namespace cmx {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(fp16 v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (sizeof(T) == 4)
    return v;
  else if constexpr (is_bf16<T>)
    return __float2bfloat16_rn(v);
  else
    return __float2half_rn(v);
}

// Two 16-bit numbers in a word, `low` at the lower address
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (is_bf16<T>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (is_bf16<T>) {
    __nv_bfloat162 pair;
    memcpy(&pair, &word, 4);
    return __bfloat1622float2(pair);
  } else {
    __half2 pair;
    memcpy(&pair, &word, 4);
    return __half22float2(pair);
  }
}

template <class T>
__device__ __forceinline__ void unpack4(float* v, const uint2& words) {
  const float2 a = unpack<T>(words.x), b = unpack<T>(words.y);
  v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
}

template <class T>
__device__ __forceinline__ void unpack8(float* v, const uint4& words) {
  const float2 a = unpack<T>(words.x), b = unpack<T>(words.y), c = unpack<T>(words.z), d = unpack<T>(words.w);
  v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y, v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
}

// gelu(v) = v Phi(v), Phi the normal distribution: Phi(v) = |step - Phi(-|v|)|, step = 0 below zero and 1 above, and
// Phi(-|v|) = 2^P(t), P a polynomial in t = min(|v| / 16, 1) that falls on where it is not fitted. All of it runs on the FMA
// pipe, but 2^x: comparisons would run at half its rate. NaN stays NaN, and -inf gives NaN as v Phi(v) does. For results of
// type T:
//   float32  degree 10, in 15 instructions: nearer to the truth than 0.5 v (1 + erff(v / sqrt 2)), which takes 27
//   16 bits  degree 8, in 13, for |v| to 13.3, beyond which the result leaves float32: off by 2.4e-7 at most, and by half of
//            half an ulp: 9.3e-5 of the result for v >= -4.2, the normal numbers of fp16, 9.4e-4 below
template <class T>
__device__ __forceinline__ float gelu(float v) {
  const float t = multiply_saturated(fabsf(v), 0.0625f), step = multiply_saturated(v, 3e38f);
  float p;
  if constexpr (sizeof(T) == 4) {
    p = fmaf(-59949.984f, t, 93156.68f);
    p = fmaf(p, t, -64128.508f);
    p = fmaf(p, t, 25045.54f);
    p = fmaf(p, t, -5381.1626f);
    p = fmaf(p, t, 60.574444f);
    p = fmaf(p, t, 452.3421f);
    p = fmaf(p, t, -214.73038f);
    p = fmaf(p, t, -117.561104f);
    p = fmaf(p, t, -18.417667f);
    p = fmaf(p, t, -1.0f);
  } else {
    p = fmaf(199.83446f, t, -723.292f);
    p = fmaf(p, t, 1119.3383f);
    p = fmaf(p, t, -983.7687f);
    p = fmaf(p, t, 556.0481f);
    p = fmaf(p, t, -220.71175f);
    p = fmaf(p, t, -117.381454f);
    p = fmaf(p, t, -18.419916f);
    p = fmaf(p, t, -0.9999942f);
  }
  return v * fabsf(step - exp2_approx(p));
}

// v (1 + tanh u) / 2 = v / (1 + exp(-2u)), u = sqrt(2/pi) (v + 0.044715 v^3)
__device__ __forceinline__ float gelu_tanh(float v) {
  const float minus_2u_log2e = v * fmaf(-0.10294324f, v * v, -2.3022082f);
  return v * reciprocal_approx(1.f + exp2_approx(minus_2u_log2e));
}

// N numbers in place, for a result of type T
template <class T, int N>
__device__ __forceinline__ void activate(float* v, Act act) {
  switch (act) {
    case Act::none: break;
    case Act::relu:
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = max0_or_nan(v[i]);
      break;
    case Act::gelu:
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = gelu<T>(v[i]);
      break;
    case Act::gelu_tanh:
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = gelu_tanh(v[i]);
      break;
  }
}

// Phi(v), given e = exp(-v^2 / 2): off by at most 3e-7, in 12 instructions, for gradients
//   Phi(-|v|) = e r P(r),  r = 1 / (1 + 0.28 |v|),  P of degree 5, fitted to 1e-8
__device__ __forceinline__ float normal_below(float v, float e) {
  const float r = reciprocal_approx(fmaf(fabsf(v), 0.28f, 1.f));
  float p = fmaf(-0.10580779f, r, 0.38987223f);
  p = fmaf(p, r, -0.23699069f);
  p = fmaf(p, r, 0.268908f);
  p = fmaf(p, r, 0.06749759f);
  p = fmaf(p, r, 0.11652065f);
  const float tail = e * (p * r);
  return v < 0 ? tail : 1.f - tail;
}

// act(v) in place of v, and act'(v), for sums in float32 whatever the storage. phi(v) = exp(-v^2 / 2) / sqrt(2 pi)
//   gelu       Phi(v) + v phi(v)
//   gelu_tanh  s + v s (1 - s) (2u)', s = 1 / (1 + exp(-2u)), (2u)' = 2 sqrt(2/pi) (1 + 3 * 0.044715 v^2)
template <int N>
__device__ __forceinline__ void activate_with_slope(float* v, float* slope, Act act) {
  switch (act) {
    case Act::none:
#pragma unroll
      for (int i = 0; i < N; ++i) slope[i] = 1.f;
      break;
    case Act::relu:
#pragma unroll
      for (int i = 0; i < N; ++i) slope[i] = v[i] > 0 ? 1.f : 0.f, v[i] = max0_or_nan(v[i]);
      break;
    case Act::gelu:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float e = exp2_approx(-0.72134752f * v[i] * v[i]), below = normal_below(v[i], e);
        slope[i] = fmaf(v[i] * e, 0.39894228f, below);
        v[i] *= below;
      }
      break;
    case Act::gelu_tanh:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float square = v[i] * v[i];
        const float s = reciprocal_approx(1.f + exp2_approx(v[i] * fmaf(-0.10294324f, square, -2.3022082f)));
        slope[i] = fmaf(v[i] * s * (1.f - s), fmaf(0.21406582f, square, 1.5957691f), s);
        v[i] *= s;
      }
      break;
  }
}

// The part of the gradient that BatchNorm leaves: da = (p grad + q (act(a) - mean) + r) act'(a)
struct GradientAffine {
  float p, q, r, mean;
};

__device__ __forceinline__ GradientAffine gradient_affine(const float* rows, int c, int channels) {
  return {rows[c], rows[channels + c], rows[2 * channels + c], rows[3 * channels + c]};
}

__device__ __forceinline__ float pre_gradient(float grad, float activated, float slope, const GradientAffine& k) {
  return fmaf(k.p, grad, fmaf(k.q, activated - k.mean, k.r)) * slope;
}

// da of a relu that is 0 there, whatever the gradient was
template <int N>
__device__ __forceinline__ void zeros_of_relu(float* da, const float* slope, Act act) {
  if (act != Act::relu) return;
#pragma unroll
  for (int i = 0; i < N; ++i) da[i] = slope[i] == 0 ? 0.f : da[i];
}

// grad -> da in place; a is lost
template <int N>
__device__ __forceinline__ void through_activation(float* grad, float* a, const GradientAffine& k, Act act) {
  float slope[N];
  activate_with_slope<N>(a, slope, act);
#pragma unroll
  for (int i = 0; i < N; ++i) grad[i] = pre_gradient(grad[i], a[i], slope[i], k);
  zeros_of_relu<N>(grad, slope, act);
}

}  // namespace cmx
