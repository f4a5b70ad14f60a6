// The matrix product, pooling, the float32 epilogue and kept weights under a sanitizer, as sanitized.cpp. Arguments: layouts
// (pixels, channels_last, gather, wgmma, wgmma_last, pool, epilogue, recast, unfold); all of them if none. Ends with 1 where a value
// is wrong.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "buffers.h"
#include "cuda/product.h"
#include "cuda/recast.h"
#include "cuda/unfold.h"

using namespace cmx;

struct Case {
  int n, c_in, c_out, h, w, ph, pw;
};

template <class T>
static void fill(T* v, int64_t count, int range, std::mt19937& dice) {
  for (int64_t i = 0; i < count; ++i) v[i] = T(float(int(dice() % (2 * range + 1)) - range));
}

static Strides dense(int64_t c, int64_t h, int64_t w, bool last) {
  return last ? Strides{c * h * w, 1, w * c, c} : Strides{c * h * w, h * w, w, 1};
}

constexpr Gpu gpu{90, 1, 227 << 10, 1.755, 4.3};  // few blocks: several tiles for each

static bool has_wgmma() {
#ifdef CMX_EMULATED
  return true;
#else
  cudaDeviceProp device;
  return cudaGetDeviceProperties(&device, 0) == cudaSuccess && device.major == 9 && product_wgmma_runs();
#endif
}

// Statistics of the y that was stored, without an activation: sums of integers are exact, moments nearly
static int wrong_statistics(const ProductForward& p, int parts, const bf16* y, const bf16* like) {
  int bad = 0;
  for (int c = 0; c < p.shape.c_out; ++c) {
    double wanted[3] = {}, got[3] = {};
    for (int n = 0; n < p.shape.n; ++n)
      for (int64_t i = 0; i < p.shape.plane(); ++i) {
        const int64_t at = n * p.y_stride.n + c * p.y_stride.c + i * p.y_stride.w;
        const double v = float(y[at]);
        wanted[0] += 1, wanted[1] += v, wanted[2] += p.like ? v * (float(like[at]) - p.mean[c]) : v * v;
      }
    for (int part = 0; part < parts; ++part) {
      const float* const from = p.partials + (int64_t(part) * p.shape.c_out + c) * (p.like ? 2 : 3);
      if (p.like)
        got[1] += from[0], got[2] += from[1];
      else
        got[0] += from[0], got[1] += double(from[0]) * from[1], got[2] += from[2] + double(from[0]) * from[1] * from[1];
    }
    if (p.like)
      bad += got[1] != wanted[1] || got[2] != wanted[2];
    else
      bad += got[0] != wanted[0] || !(std::fabs(got[1] - wanted[1]) <= 1e-5 * wanted[2] + 1e-3) ||
             !(std::fabs(got[2] - wanted[2]) <= 1e-5 * wanted[2] + 1e-3);
  }
  return bad;
}

// Small integers, no scale and no activation: exact
static int product(const char* layout, const Case& k, int tile, int order, ProductUse use) {
  const bool wgmma = *layout == 'w', last = std::strstr(layout, "last");
  const int64_t H = int64_t(k.h) * k.ph, W = int64_t(k.w) * k.pw, depth = int64_t(k.c_in) * k.ph * k.pw;
  const int64_t count = k.n * k.c_in * H * W, out = int64_t(k.n) * k.c_out * k.h * k.w;
  const Buffer<bf16> x = allocate<bf16>(count), weight = allocate<bf16>(k.c_out * depth), y = allocate<bf16>(out);
  const Buffer<bf16> like = allocate<bf16>(out);
  const Buffer<float> bias = allocate<float>(k.c_out), mean = allocate<float>(k.c_out);
  std::mt19937 dice(7);
  fill(like.get(), out, 2, dice), fill(mean.get(), k.c_out, 2, dice);
  fill(x.get(), count, 2, dice), fill(weight.get(), k.c_out * depth, 1, dice), fill(bias.get(), k.c_out, 3, dice);
  for (int64_t i = 0; i < out; ++i) y[i] = bf16(NAN);
  ProductForward p{};
  p.x = x.get(), p.weight = weight.get(), p.y = y.get(), p.bias = bias.get(), p.act = Act::none;
  p.shape = {k.n, k.c_in, k.c_out, k.h, k.w, k.ph, k.pw, Dtype::bfloat16};
  p.x_stride = dense(k.c_in, H, W, last), p.y_stride = dense(k.c_out, k.h, k.w, last);
  if (use == ProductUse::sums) p.like = like.get(), p.mean = mean.get();
  const ProductMemory m = product_memory_of(p);
  const char* const found[] = {"pixels", "channels_last", "gather"};
  if (!wgmma && std::strcmp(found[static_cast<int>(m.layout)], layout))
    throw std::runtime_error(std::string("not ") + layout);
  const ProductPlan plan = product_plan(p.shape, m, tile);
  if (!plan.blocks() && !wgmma) return 0;
  const WgmmaPlan hopper = wgmma_plan(p.shape, m, gpu);
  if (!wgmma && !kProductTiles[tile].has_statistics()) use = ProductUse::inference;
  const int parts = use == ProductUse::inference ? 0 : wgmma ? hopper.parts : plan.parts();
  const Buffer<float> partials = allocate<float>(std::max<int64_t>(1, int64_t(parts) * k.c_out * (p.like ? 2 : 3)));
  if (parts) p.partials = partials.get();
  prepare(order);
  check(wgmma ? product_fwd_wgmma(p, hopper, nullptr) : product_fwd_mma(p, plan, nullptr));
  check(finish());
  int bad = parts ? wrong_statistics(p, parts, y.get(), like.get()) : 0;
  for (int n = 0; n < k.n; ++n)
    for (int o = 0; o < k.c_out; ++o)
      for (int i = 0; i < k.h; ++i)
        for (int j = 0; j < k.w; ++j) {
          float sum = bias[o];
          for (int c = 0; c < k.c_in; ++c)
            for (int a = 0; a < k.ph; ++a)
              for (int b = 0; b < k.pw; ++b)
                sum += float(weight[((o * int64_t(k.c_in) + c) * k.ph + a) * k.pw + b]) *
                       float(x[n * p.x_stride.n + c * p.x_stride.c + (i * k.ph + a) * p.x_stride.h +
                               (j * k.pw + b) * p.x_stride.w]);
          const bf16 got = y[n * p.y_stride.n + o * p.y_stride.c + i * p.y_stride.h + j * p.y_stride.w];
          bad += !(float(got) == float(bf16(sum)));
        }
  if (bad)
    std::printf("%s %dx%dx%dx%dx%d tile %d order %d: %d wrong\n", layout, k.n, k.c_in, k.c_out, k.h, k.w, tile, order,
                bad);
  return bad;
}

static int pool(const Case& k, bool last, int order) {
  const int64_t plane = int64_t(k.h) * k.w, count = k.n * k.c_in * plane;
  const Buffer<bf16> x = allocate<bf16>(count), weight = allocate<bf16>(k.c_out * k.c_in),
                     y = allocate<bf16>(k.n * k.c_out);
  const Buffer<float> pooled = allocate<float>(k.n * k.c_in);
  std::mt19937 dice(7);
  fill(x.get(), count, 2, dice), fill(weight.get(), k.c_out * k.c_in, 1, dice);
  PoolHeadForward p{};
  p.x = x.get(), p.weight = weight.get(), p.pooled = pooled.get(), p.y = y.get();
  p.n = k.n, p.c = k.c_in, p.h = k.h, p.w = k.w, p.classes = k.c_out, p.dtype = Dtype::bfloat16;
  p.x_stride = dense(k.c_in, k.h, k.w, last);
  prepare(order);
  check(pool_head_fwd(p, nullptr));
  check(finish());
  int bad = 0;
  for (int n = 0; n < k.n; ++n)
    for (int o = 0; o < k.c_out; ++o) {
      double sum = 0, size = 0;
      for (int c = 0; c < k.c_in; ++c)
        for (int i = 0; i < plane; ++i) {
          const double term =
              double(float(weight[o * k.c_in + c])) * float(x[n * p.x_stride.n + c * p.x_stride.c + i * p.x_stride.w]);
          sum += term / plane, size += std::fabs(term) / plane;
        }
      bad += !(std::fabs(float(y[n * k.c_out + o]) - sum) <= std::fabs(sum) / 256 + size * 1e-5);
    }
  if (bad) std::printf("pool %dx%d last %d order %d: %d wrong\n", k.n, k.c_in, last, order, bad);
  return bad;
}

static int epilogue(const Case& k, bool last, int order) {
  const int64_t plane = int64_t(k.h) * k.w, count = k.n * k.c_in * plane;
  const Buffer<float> y = allocate<float>(count), before = allocate<float>(count), bias = allocate<float>(k.c_in),
                      scale = allocate<float>(k.c_in);
  std::mt19937 dice(7);
  fill(y.get(), count, 9, dice), fill(bias.get(), k.c_in, 3, dice), fill(scale.get(), k.c_in, 3, dice);
  std::memcpy(before.get(), y.get(), count * 4);
  EpilogueInplace p{
      y.get(), bias.get(), scale.get(), nullptr, last ? k.n * plane : int64_t(k.n) * k.c_in, last ? k.c_in : plane,
      k.c_in,  Act::relu,  last};
  prepare(order);
  check(epilogue_inplace(p, gpu, nullptr));
  check(finish());
  int bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = last ? i % k.c_in : i / plane % k.c_in;
    bad += y[i] != std::fmax(before[i] + bias[c], 0.f) * scale[c];
  }
  if (bad) std::printf("epilogue %dx%d last %d order %d: %d wrong\n", k.n, k.c_in, last, order, bad);
  return bad;
}

static int kept(int order) {
  constexpr int kCount = 3;
  const int64_t counts[kCount] = {1, 130, kRecastRun + 3};
  Buffer<float> from[kCount];
  Buffer<bf16> to[kCount];
  Buffer<uint32_t> samples[kCount];
  Recast p{};
  p.weights = kCount, p.dtype = Dtype::bfloat16;
  std::mt19937 dice(7);
  for (int i = 0; i < kCount; ++i) {
    from[i] = allocate<float>(counts[i]), to[i] = allocate<bf16>(counts[i]);
    samples[i] = allocate<uint32_t>(recast_samples(counts[i]));
    fill(from[i].get(), counts[i], 9, dice);
    p.weight[i] = {from[i].get(), to[i].get(), samples[i].get(), counts[i]};
  }
  int bad = 0;
  for (const bool all : {true, false}) {  // then one value of the last run has changed
    p.all = all;
    prepare(order);
    check(recast(p, nullptr));
    check(finish());
    for (int i = 0; i < kCount; ++i)
      for (int64_t k = 0; k < counts[i]; ++k) bad += float(to[i][k]) != from[i][k];
    from[kCount - 1][kRecastRun + 2] = 20;
  }
  if (bad) std::printf("recast order %d: %d wrong\n", order, bad);
  return bad;
}

// Exact copies; the weight, rows of which are seldom whole pieces, beside the image
static int patches(const Case& k, bool last, int order) {
  const ProductShape s{k.n, k.c_in, k.c_out, k.h, k.w, k.ph, k.pw, Dtype::bfloat16};
  const int64_t H = int64_t(k.h) * k.ph, W = int64_t(k.w) * k.pw, pixels = k.n * s.plane(), row = unfolded(s).c_in;
  const Buffer<bf16> x = allocate<bf16>(k.n * k.c_in * H * W), weight = allocate<bf16>(k.c_out * s.k()),
                     to = allocate<bf16>(pixels * row), rows = allocate<bf16>(k.c_out * row);
  std::mt19937 dice(7);
  fill(x.get(), k.n * k.c_in * H * W, 99, dice), fill(weight.get(), k.c_out * s.k(), 99, dice);
  const Strides xs = dense(k.c_in, H, W, last), dense_weight = dense(k.c_in, k.ph, k.pw, false);
  const Unfold p{patches_of(s, x.get(), xs, to.get(), last, gpu),
                 weight_rows_of(s, weight.get(), dense_weight, rows.get(), gpu)};
  prepare(order);
  check(unfold(p, nullptr));
  check(finish());
  int bad = 0;
  for (int64_t i = 0; i < pixels * row; ++i) {
    const int64_t n = i / (s.plane() * row), at = i % (s.plane() * row), in_k = last ? at % row : at / s.plane();
    const int64_t pixel = last ? at / row : at % s.plane(), c = in_k / (k.ph * k.pw), a = in_k / k.pw % k.ph;
    const int64_t from =
        n * xs.n + c * xs.c + (pixel / k.w * k.ph + a) * xs.h + (pixel % k.w * k.pw + in_k % k.pw) * xs.w;
    bad += float(to[i]) != (in_k < s.k() ? float(x[from]) : 0.f);
  }
  for (int64_t i = 0; i < k.c_out * row; ++i)
    bad += float(rows[i]) != (i % row < s.k() ? float(weight[i / row * s.k() + i % row]) : 0.f);
  if (bad) std::printf("unfold %dx%d last %d order %d: %d wrong\n", k.n, k.c_in, last, order, bad);
  return bad;
}

static int all_wrong(const char* name) {
  const Case planes[] = {{2, 130, 70, 4, 18, 1, 1}, {1, 24, 131, 1, 136, 1, 1}, {3, 40, 9, 2, 2, 1, 1}};
  const Case last[] = {{2, 136, 72, 3, 11, 1, 1}, {1, 21, 33, 5, 29, 1, 1}, {3, 260, 6, 2, 2, 1, 1}};
  const Case gathered[] = {{2, 3, 70, 5, 7, 7, 7}, {3, 270, 5, 3, 5, 1, 1}, {1, 5, 9, 1, 9, 2, 3}};
  const Case tiles[] = {{7, 200, 136, 5, 8, 1, 1}, {1, 72, 136, 9, 24, 1, 1}, {2, 8, 16, 4, 6, 1, 1}};
  const Case images[] = {{2, 3, 5, 2, 8, 7, 7}, {1, 2, 3, 3, 5, 4, 3}, {1, 3, 4, 2, 24, 2, 4}};
  const Case pooled[] = {{9, 35, 11, 3, 5, 1, 1}, {2, 33, 9, 4, 8, 1, 1}};
  int bad = 0, order = 0;  // every call another order
  if (!std::strcmp(name, "recast")) return kept(0) + kept(1);
  if (!std::strcmp(name, "unfold")) {
    for (const Case& k : images)
      for (const bool channels_last : {false, true}) bad += patches(k, channels_last, order++ % 6);
    return bad;
  }
  if (!std::strcmp(name, "pool") || !std::strcmp(name, "epilogue")) {
    for (const Case& k : pooled)
      for (const bool channels_last : {false, true})
        bad += *name == 'p' ? pool(k, channels_last, order++ % 6) : epilogue(k, channels_last, order++ % 6);
    return bad;
  }
  if (*name == 'w') {
    if (!has_wgmma()) return 0;
    for (int i = 0; i < 6; ++i)
      bad += product(name, tiles[i % 3], 0, order++, static_cast<ProductUse>((i + i / 3) % 3));
    return bad;
  }
  for (int tile = 0; tile < kProductTileCount; ++tile)
    for (int i = 0; i < 3; ++i)
      bad += product(name,
                     *name == 'p'   ? planes[i]
                     : *name == 'c' ? last[i]
                                    : gathered[i],
                     tile, order++ % 6, static_cast<ProductUse>((i + tile) % 3));
  return bad;
}

int main(int count, char** names) {
  const char* all[] = {"",           "pixels", "channels_last", "gather", "wgmma",
                       "wgmma_last", "pool",   "epilogue",      "recast", "unfold"};
  int bad = 0;
  try {
    for (int i = 1; i < (count > 1 ? count : int(std::size(all))); ++i) bad += all_wrong(count > 1 ? names[i] : all[i]);
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  return bad != 0;
}
