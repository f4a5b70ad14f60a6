// A product by Strassen's seven of half the size instead of eight: pixels in pairs, input and output channels in halves.
//
//     U = [U11 U12]  even pixels     W = [W11 W12]  first half of the input channels
//         [U21 U22]  odd pixels          [W21 W22]  second half; columns: halves of the output channels
//
// The seven sums of W are packed once. Those of U are made in the panel, whose rows are twice as long for it:
//     even row  U11        U12 - U22   U11 + U22   U21 + U22
//     odd row   U21 - U11  U22         U11 + U12
// Pairs are neighbours in the image and never lie in two bands, so that no result depends on the tiling.
#pragma once

#include "product.h"

namespace cmx::CMX_ISA {

constexpr int64_t kQuarters = 4;  // of the result: even pixels low, even high, odd low, odd high output channels

struct HalfProduct {
  int64_t row, column;    // of its sum of U: even or odd row, half
  int weight[kQuarters];  // signs of W11, W12, W21, W22
  int sign[kQuarters];    // with which it enters the quarters of the result
};
constexpr HalfProduct kHalfProducts[] = {
    {0, 2, {1, 0, 0, 1}, {1, 0, 0, 1}},   // (U11 + U22) (W11 + W22)
    {0, 3, {1, 0, 0, 0}, {0, 0, 1, -1}},  // (U21 + U22) W11
    {0, 0, {0, 1, 0, -1}, {0, 1, 0, 1}},  // U11 (W12 - W22)
    {1, 1, {-1, 0, 1, 0}, {1, 0, 1, 0}},  // U22 (W21 - W11)
    {1, 2, {0, 0, 0, 1}, {-1, 1, 0, 0}},  // (U11 + U12) W22
    {1, 0, {1, 1, 0, 0}, {0, 0, 0, 1}},   // (U21 - U11) (W11 + W12)
    {0, 1, {0, 0, 1, 1}, {1, 0, 0, 0}},   // (U12 - U22) (W21 + W22)
};
constexpr int64_t kProducts = 7;
constexpr int64_t kShortRun = 96;  // as exact as eight products in runs of kRun, whose terms are smaller

// The first product in the order of `step` that enters a quarter of the result
constexpr int64_t entering(int64_t quarter, int64_t product, int64_t step) {
  return kHalfProducts[product].sign[quarter] ? product : entering(quarter, product + step, step);
}
constexpr int64_t begin_of(int64_t quarter) { return entering(quarter, 0, 1); }
constexpr int64_t end_of(int64_t quarter) { return entering(quarter, kProducts - 1, -1); }
constexpr int64_t kBegins[kQuarters] = {begin_of(0), begin_of(1), begin_of(2), begin_of(3)};
constexpr int64_t kEnds[kQuarters] = {end_of(0), end_of(1), end_of(2), end_of(3)};

// Below 512 channels the additions take what the eighth product took. bfloat16 products would have to round the sums,
// which doubles their error.
static bool uses_strassen(Dtype dtype, int64_t c_out, int64_t c_in) {
  constexpr int64_t kLeast = 512;
  return !kTiles && !(kBf16Products && dtype == Dtype::bfloat16) && least(c_out, c_in) >= kLeast &&
         c_in % (2 * VL) == 0 && c_out % (2 * NR * VL) == 0;
}

static int64_t packed_strassen_bytes(int64_t c_out, int64_t c_in) {
  return kProducts * packed_product_bytes<float>(c_out / 2, c_in / 2);
}

// One panel of one of the seven sums, in the order of kHalfProducts. weight as for pack_pointwise.
static void pack_strassen(const View& weight, int64_t panel, void* out) {
  constexpr int64_t kWidth = NR * VL, kStep = 64;  // input channels at a time
  const int64_t rows = weight.c / 2, half = weight.w / 2, panels = rows / kWidth, first = panel % panels * kWidth;
  const HalfProduct& h = kHalfProducts[panel / panels];
  for (int64_t k0 = 0; k0 < half; k0 += kStep) {
    const int64_t step = least(kStep, half - k0);
    float sum[kWidth * kStep] = {};
    with_dtype(weight.dtype, [&](auto t) {
      for (int64_t q = 0; q < kQuarters; q++) {  // W12: the second half of the output channels, the first of the input
        if (!h.weight[q]) continue;
        for (int64_t c = 0; c < kWidth; c++) {
          const auto* from = address<const decltype(t)>(weight, 0, first + c + q % 2 * rows, 0, q / 2 * half + k0);
          float* const to = sum + c * step;
          for (int64_t k = 0; k < step; k += VL) store(to + k, load(to + k) + (float)h.weight[q] * load(from + k));
        }
      }
    });
    const View view{sum, Dtype::float32, 1, kWidth, 1, step, 0, step, step, 1, false};
    pack_pointwise(view, 0, (float*)out + (panel * half + k0) * kWidth);
  }
}

static __attribute__((noinline)) void sums_of_pair(float* even, float* odd, int64_t half) {
  for (int64_t k = 0; k < half; k += VL) {
    const vf u11 = load(even + k), u12 = load(even + half + k), u21 = load(odd + k), u22 = load(odd + half + k);
    store(even + half + k, u12 - u22);
    store(even + 2 * half + k, u11 + u22);
    store(even + 3 * half + k, u21 + u22);
    store(odd + k, u21 - u11);
    store(odd + 2 * half + k, u11 + u12);
  }
}

// Whether the pair had no infinity or NaN: of its sums, U12 - U22 and U21 - U11 have met every value.
static bool is_finite(const float* even, const float* odd, int64_t half) {
  vf zero{};
  for (int64_t k = 0; k < half; k += VL) zero += vf{} * (load(even + half + k) + load(odd + k));
  float sum = 0;
  for (int64_t i = 0; i < VL; i++) sum += zero[i];
  return sum == 0;
}

// sums[quarter][NR][pairs][VL] += acc[NR][count][VL] with the signs of product I. A quarter that it completes goes to acc.
template <int64_t I>
static __attribute__((noinline)) void add_product(float* sums, int64_t pairs, float* acc, int64_t count) {
  for (int64_t j = 0; j < NR; j++)
    for (int64_t k = 0; k < count; k++) {
      float* const at = acc + (j * count + k) * VL;
      const vf term = load(at);
#pragma GCC unroll 4
      for (int64_t q = 0; q < kQuarters; q++) {
        const int sign = kHalfProducts[I].sign[q];
        if (!sign) continue;
        float* const to = sums + ((q * NR + j) * pairs + k) * VL;
        const vf signed_term = sign > 0 ? term : vf{} - term;
        store(I == kEnds[q] ? at : to, I == kBegins[q] ? signed_term : load(to) + signed_term);
      }
    }
}

// acc[NR][count][VL] = results of one pixel by products of eight, on values and weights taken out of the sums again.
// high: of the second half of the output channels. weight: this panel in the first of the seven matrices.
static void exact_results(const float* even, const float* odd, bool is_odd, bool high, int64_t half,
                          const float* weight, int64_t matrix, float* acc, int64_t count) {
  for (int64_t j = 0; j < NR; j++) {
    vf first{}, second{};
    for (int64_t k = 0; k < half; k++) {
      const float u11 = even[k], u22 = odd[half + k];
      const bool known = u22 - u22 == 0;  // else by U11, which is then finite or poisons the even pixel by itself
      const float u12 = known ? even[half + k] + u22 : odd[2 * half + k] - u11;
      const float u21 = known ? even[3 * half + k] - u22 : odd[k] + u11;
      const float* const at = weight + (k * NR + j) * VL;
      // W11 and W21 - W11; high: W22 and W12 - W22
      const vf w = load(at + (high ? 4 : 1) * matrix), sum = w + load(at + (high ? 2 : 3) * matrix);
      first += all(is_odd ? u21 : u11) * (high ? sum : w);
      second += all(is_odd ? u22 : u12) * (high ? w : sum);
    }
    store(acc + j * count * VL, first + second);
  }
}

// Results of quarter q, acc[NR][count][VL], of the first pairs: those that have an infinity or NaN, without the partner's.
static __attribute__((noinline)) void separate(const float* panel, int64_t pitch, int64_t pairs, int64_t half,
                                               int64_t q, const float* weight, int64_t matrix, float* acc,
                                               int64_t count) {
  for (int64_t i = 0; i < pairs; i++) {
    const float *const even = panel + 2 * i * pitch, *const odd = even + pitch;
    if (!is_finite(even, odd, half)) exact_results(even, odd, q / 2, q % 2, half, weight, matrix, acc + i * VL, count);
  }
}

CMX_INLINE int64_t strassen_sums(int64_t part) { return kQuarters * NR * VL * ceil_div(part, 2); }

// As product() with all pixels as one part, on rows of 2 * channels elements; sums has strassen_sums(pixels) floats.
template <class F, class Done>
CMX_INLINE void strassen_product(float* panel, int64_t pitch, int64_t pixels, int64_t channels, int64_t c_out,
                                 const Pointwise& p, float* sums, F f, Done done) {
  const int64_t half = channels / 2, blocks = c_out / 2 / VL, matrix = c_out / 2 * half, pairs = ceil_div(pixels, 2);
  if (pixels % 2) memset(panel + pixels * pitch, 0, channels * sizeof(float));
  bool finite = true;
  for (int64_t i = 0; i < pairs; i++) {
    float *const even = panel + 2 * i * pitch, *const odd = even + pitch;
    sums_of_pair(even, odd, half);
    finite &= is_finite(even, odd, half);
  }
  for (int64_t block = 0; block < blocks; block += NR) {
    const float* const weight = (const float*)p.weight + block * VL * half;
    auto multiply = [&](auto index) __attribute__((always_inline)) {
      constexpr int64_t I = decltype(index)::value;
      constexpr HalfProduct h = kHalfProducts[I];
      const void* next = I + 1 < kProducts     ? weight + (I + 1) * matrix
                         : block + NR < blocks ? weight + NR * VL * half
                                               : p.next;
      sweep(panel + h.row * pitch + h.column * half, 2 * pitch, pairs, half, kShortRun, weight + I * matrix, NR, next,
            [&](int64_t m, int64_t count, float* acc) {
              add_product<I>(sums + m * VL, pairs, acc, count);
              for (int64_t q = 0; q < kQuarters; q++) {
                if (I != kEnds[q]) continue;
                const int64_t pixel = 2 * m + q / 2, there = least(count, ceil_div(pixels - pixel, 2));
                if (!finite) separate(panel + 2 * m * pitch, pitch, there, half, q, weight, matrix, acc, count);
                for (int64_t j = 0; j < NR; j++) f(pixel, 2, there, block + q % 2 * blocks + j, acc + j * count * VL);
              }
            });
    };
    [&]<int64_t... I>(std::integer_sequence<int64_t, I...>) {
      (multiply(std::integral_constant<int64_t, I>()), ...);
    }(std::make_integer_sequence<int64_t, kProducts>());
    for (int64_t high = 0; high < 2; high++) done(0, pixels, block + high * blocks, NR);
  }
}

}  // namespace cmx::CMX_ISA
