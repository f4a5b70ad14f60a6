// The cost of the depthwise kernels: what a call must move and compute, what a plan makes of it, and the cheapest plan.
// Every term is a number of cycles of one multiprocessor; the predicted time is the largest, as if the rest were hidden.
// Instruction counts are those of the compiled kernels (tests/cuda_facts.txt); rates are published or assumed, see rates_of.
#pragma once

#include <cmath>
#include <string_view>

#include "plan.h"

namespace cmx {

// Of one multiprocessor, per cycle
struct Rates {
  double tensor;     // m16n8k16 products
  double k8;         // an m16n8k8 product, in m16n8k16
  double ffma;       // warps' instructions
  double wgmma = 0;  // m16n8k16 products in wgmma; 0 where there is none
  // share of the issue slots that depthwise kernels fill, at the clock above: measured on an H200, elsewhere not known
  double ffma_issue = 1, mma_issue = 1;
};

inline Rates rates_of(const Gpu& gpu) {
  switch (gpu.arch) {
    case 80: return {0.5, 0.5, 2};    // 1024 MAC per cycle
    case 86: return {0.125, 0.5, 4};  // with float32 sums, on GeForce
    case 89: return {0.25 * gpu.tensor, 0.5, 4};
    // mma.sync reaches 62 % of 2048 MAC (arXiv 2501.12084); k8 is a guess; wgmma as cuBLAS: 790 TFLOP/s on an H200
    case 90: return {0.62, 0.75, 4, 0.83, 0.74, 0.6};
    default: return {0.25, 0.5, 4};  // not known: the lowest of a server GPU
  }
}

struct NamedGpu {
  const char* name;
  Gpu gpu;
};

// Sustained clocks; bandwidth as a device-to-device copy reaches it. GeForce has half the rate with float32 sums (165 of 330
// TFLOP/s, NVIDIA's Ada white paper).
inline constexpr NamedGpu kGpus[] = {
    {"H200", {90, 132, 227 << 10, 1.755, 4.3}},        {"H100", {90, 132, 227 << 10, 1.755, 3.0}},
    {"A100", {80, 108, 163 << 10, 1.41, 1.75}},        {"L40S", {89, 142, 99 << 10, 2.2, 0.78}},
    {"RTX 4090", {89, 128, 99 << 10, 2.4, 0.92, 0.5}},
};

enum class DepthwiseKernel : int { ffma, mma, mma_plane, mma_last };

// Cycles of one multiprocessor for the whole call, had it all of the work: memory, issue slots, pipes
struct Cost {
  double memory, issue, tensor, ffma, shared;
  double idle;  // factor: the last round of blocks does not fill the GPU
  double compute() const { return idle * std::fmax(std::fmax(issue, tensor), std::fmax(ffma, shared)); }
  double cycles() const { return std::fmax(memory, compute()); }
  double seconds(const Gpu& gpu) const {
    return cycles() / (gpu.multiprocessors * gpu.ghz * 1e9) + 2e-6;
  }  // and a launch
};

inline double outputs_of(const DepthwiseShape& s) { return double(s.n) * s.c * s.h * s.w; }
inline double bytes_of(const DepthwiseShape& s) {  // x once, y once, the filters
  return double(size_of(s.dtype)) * (2 * outputs_of(s) + double(s.c) * s.kh * s.kw);
}
inline double flop_of(const DepthwiseShape& s) { return 2 * outputs_of(s) * s.kh * s.kw; }
inline double floor_seconds(const DepthwiseShape& s, const Gpu& gpu) { return bytes_of(s) / (gpu.tb_per_s * 1e12); }

inline double memory_cycles(const DepthwiseShape& s, const Gpu& gpu) {
  return floor_seconds(s, gpu) * gpu.multiprocessors * gpu.ghz * 1e9;
}

// As compiled, which tests/test_cuda_compiled.py compares
inline double activation_instructions(Act act, Dtype dtype) {
  switch (act) {
    case Act::none: return 0;
    case Act::relu: return 1;
    case Act::gelu: return dtype == Dtype::float32 ? 15 : 13;
    case Act::gelu_tanh: return 7;
  }
  return 0;
}

// Blocks come in rounds of what the GPU holds; the last round may be short.
inline double idle_factor(double blocks, double at_once) { return std::ceil(blocks / at_once) * at_once / blocks; }

// Of a multiprocessor, whose registers and threads suffice for `most`
inline double blocks_at_once(int shared_bytes, double most, const Gpu& gpu) {
  return std::fmax(1, std::fmin(blocks_that_fit(shared_bytes, gpu), most));
}

// What a thread brings of a tile, and with how many instructions
struct FfmaLoad {
  double numbers, instructions;
};

inline FfmaLoad ffma_load(const DepthwiseShape& s, const FfmaPlan& p) {
  const int patches = p.patches_x * p.patches_y, pieces = (p.whole ? s.w : p.pitch) / p.piece;  // of a row
  const int lanes = std::min(pieces, patches);
  const double rows = std::ceil(double(p.whole ? s.h : p.tile_rows) / (patches / lanes));
  const double of_row = std::ceil(double(pieces) / lanes), numbers = rows * of_row * p.piece;
  if (p.whole) return {numbers, 96 + 6 * rows};
  if (p.copies) return {numbers, 80 + of_row * (30 + 8 * rows)};
  return {numbers, 60 + rows * (33 + of_row * (!p.vector_loads ? 58 : p.piece == 8 ? 41 : 33))};
}

// Terms of one tile of a warp: 32 patches of 4 rows x 8 columns. The constants are counted in the SASS of sm_90a.
inline Cost ffma_cost(const DepthwiseShape& s, Act act, const FfmaPlan& p, const Gpu& gpu) {
  const Rates rates = rates_of(gpu);
  const double rows = FfmaPlan::kRows + s.kh - 1, chunks = std::ceil((p.skip + s.kw) / 4.0), outputs = 32;
  const double threads = p.channels * p.patches_x * p.patches_y, warps = p.groups * p.units * std::ceil(threads / 32);
  const double fma = outputs * s.kh * s.kw, lds_weights = s.kh * 4 * chunks;
  const double lds_rows = rows * (own_width(s) ? std::ceil((p.skip + s.kw + 7) / 4.0) : 1 + chunks);
  const double loop = own_width(s) ? 22 + 6 * (s.kh - 3) : 50 + rows * 12;
  const double store = !p.vector_stores ? 4 * 8 * 3 : s.dtype == Dtype::float32 ? 8 : 20;
  const FfmaLoad load = ffma_load(s, p);
  const double other = load.instructions + outputs * (activation_instructions(act, s.dtype) + 2) + 8 + store + 66;
  Cost c{};
  c.memory = memory_cycles(s, gpu);
  c.issue = warps * (fma + lds_rows + lds_weights + loop + other) / 4 / rates.ffma_issue;
  c.ffma = warps * (fma + outputs * activation_instructions(act, s.dtype)) / rates.ffma;
  // rows: two-way bank conflicts
  c.shared = warps * ((lds_rows + 8) * 8 + lds_weights * (p.channels_first ? 4 : 1) + load.numbers);
  const double items = double(p.groups) * p.units, of_block = std::ceil(items / p.blocks);
  const double at_once =
      gpu.multiprocessors * blocks_at_once(p.shared_bytes, FfmaPlan::kBlocksPerSm * FfmaPlan::kThreads / threads, gpu);
  c.idle = idle_factor(p.blocks, at_once) * of_block * p.blocks / items;
  return c;
}

// Terms of one tile of 1024 outputs (two images of 256 where they are small)
inline Cost mma_cost(const DepthwiseShape& s, Act act, const MmaPlan& p, bool plane, const Gpu& gpu) {
  const Rates rates = rates_of(gpu);
  const int pairs = (s.kh + 1) / 2, blocks = plane ? p.column_tiles : p.column_tiles + p.window - 1;
  const double tiles = double(s.c) * p.units, values = 8.0 * p.column_tiles;  // a lane's outputs
  const bool lone = plane && s.kh % 2;
  // of the residual: one product where two blocks hold a tile's own columns, but for the tile of a plane that wraps
  const bool two = plane || p.window % 2 == 0;
  const double own16 = two ? 2.0 * (p.column_tiles - plane) : 0, own8 = plane ? 4 : two ? 0 : 2.0 * p.column_tiles;
  const double k16 = 2.0 * p.column_tiles * p.window * (pairs - lone) + own16;
  const double k8 = 2.0 * p.column_tiles * lone * p.window + own8;
  const double ldsm = blocks * (pairs + (lone ? 0.5 : 1)) + (two ? own16 : p.column_tiles);
  const double filter = plane ? 0 : pairs * p.window;
  const double pieces = plane ? values / 8 : std::ceil(p.rows * p.images() / 4.0) * 16 / p.load_bytes;
  const double stores = values / 8 * 16 / p.store_bytes;
  const double index = plane ? 75 : 160 + pieces * 7 + stores * 6;
  const double sts = values / 2;
  Cost c{};
  c.memory = memory_cycles(s, gpu);
  c.issue = tiles *
            (k16 + k8 + ldsm + filter + pieces + stores + values / 8 + sts + values / 2 + index +
             values * (activation_instructions(act, s.dtype) + 1)) /
            4 / rates.mma_issue;
  c.tensor = tiles * (k16 + k8 * rates.k8) / rates.tensor;
  c.shared = tiles * (ldsm * 4 + filter * 2 + sts + (values / 8) * 8 + pieces * p.load_bytes / 4);
  c.idle = idle_factor(p.blocks, gpu.multiprocessors * blocks_at_once(p.shared_bytes, 16. / p.warps, gpu)) *
           double(int64_t(p.splits) * p.warps) * std::ceil(double(p.units) / (p.splits * p.warps)) / p.units;
  return c;
}

// channels_last: the same, and pairs of pixels that are brought, transposed and carried out again by pieces of channels, a
// filter that is expanded for few tiles, and a cycle for each line of L1 that an access touches: one for every pixel.
// Not modelled: blocks of less than 16 channels share the sectors of 32 bytes, which then come from L2 to each of them.
inline Cost mma_last_cost(const DepthwiseShape& s, Act act, const MmaPlan& p, const Gpu& gpu) {
  const Rates rates = rates_of(gpu);
  const int pairs = (s.kh + 1) / 2, blocks = p.column_tiles + p.window - 1;
  const double tiles = double(s.c) * p.units, values = 8.0 * p.column_tiles;
  const double k16 = 2.0 * p.column_tiles * p.window * pairs, k8 = 4.0 * p.column_tiles;
  const double ldsm = blocks * (pairs + 2), fragments = pairs * p.window;
  const double in = p.images() * p.rows * blocks * 4 / 32.0, out = values / 2;  // a lane's pairs of pixels
  const auto moved = [&](int bytes) { return 2 + 38 * 2.0 / bytes; };           // instructions for one of a channel
  const double expand = fragments * 30 * p.splits / p.units;
  Cost c{};
  c.memory = memory_cycles(s, gpu);
  c.issue = tiles *
            (k16 + k8 + ldsm + fragments + in * moved(p.load_bytes) + out * moved(p.store_bytes) + values + 160 +
             expand + values * (activation_instructions(act, s.dtype) + 1)) /
            4 / rates.mma_issue;
  c.tensor = tiles * (k16 + k8 * rates.k8) / rates.tensor;
  c.shared = tiles * (ldsm * 4 + fragments * 2 + values / 2 + in + out + 2 * values * 32 / p.channels);
  c.idle = idle_factor(p.blocks, gpu.multiprocessors * blocks_at_once(p.shared_bytes, 16. / p.warps, gpu)) *
           double(p.splits) * std::ceil(double(p.units) / p.splits) / p.units;
  return c;
}

struct DepthwiseChoice {
  DepthwiseKernel kernel;
  FfmaPlan ffma;
  MmaPlan mma;
  Cost cost;
};

// Under memory's time by so much, FFMA leaves the tensor cores nothing to gain, and it spreads no NaN.
constexpr double kHidden = 0.75;

// The kernel that is predicted to be fastest. The prediction is all there is until timings replace it.
inline DepthwiseChoice choose_depthwise(const DepthwiseShape& s, const Memory& m, const Gpu& gpu, Act act) {
  DepthwiseChoice best{DepthwiseKernel::ffma, ffma_plan(s, m, gpu), {}, {}};
  best.cost = ffma_cost(s, act, best.ffma, gpu);
  if (best.cost.compute() <= kHidden * best.cost.memory) return best;
  for (const bool plane : {false, true}) {
    const MmaPlan plan = plane ? mma_plane_plan(s, m, gpu) : mma_plan(s, m, gpu);
    if (!plan.blocks) continue;
    const Cost cost = mma_cost(s, act, plan, plane, gpu);
    if (cost.cycles() > best.cost.cycles() * (plane ? 1.0001 : 1)) continue;
    best.kernel = plane ? DepthwiseKernel::mma_plane : DepthwiseKernel::mma;
    best.mma = plan, best.cost = cost;
  }
  if (const MmaPlan plan = mma_last_plan(s, m, gpu); plan.blocks) {
    const Cost cost = mma_last_cost(s, act, plan, gpu);
    if (cost.cycles() < best.cost.cycles()) best.kernel = DepthwiseKernel::mma_last, best.mma = plan, best.cost = cost;
  }
  return best;
}

// ---- both gradients

inline double gradient_instructions(Act act) {  // of act and act' of one number, in float32, as compiled
  switch (act) {
    case Act::none: return 0;
    case Act::relu: return 2;
    case Act::gelu: return 17;
    case Act::gelu_tanh: return 11;
  }
  return 0;
}

inline double backward_bytes_of(const DepthwiseShape& s) {  // the gradient, a and x once, dx once, the filters
  return double(size_of(s.dtype)) * (4 * outputs_of(s) + double(s.c) * s.kh * s.kw);
}
inline double backward_floor_seconds(const DepthwiseShape& s, const Gpu& gpu) {
  return backward_bytes_of(s) / (gpu.tb_per_s * 1e12);
}
inline double backward_memory_cycles(const DepthwiseShape& s, const Gpu& gpu) {
  return backward_floor_seconds(s, gpu) * gpu.multiprocessors * gpu.ghz * 1e9;
}

// Terms of one tile of a block: four warps, whose threads have a patch of 4 rows x 8 columns, or none
inline Cost backward_ffma_cost(const DepthwiseShape& s, Act act, const BackwardPlan& b, const Gpu& gpu) {
  const Rates rates = rates_of(gpu);
  const FfmaPlan& p = b.tile;
  const double tiles = double(p.units) * p.groups, patches = p.channels * p.patches_x * p.patches_y;
  const double active = std::ceil(patches / 32), rows = FfmaPlan::kRows + s.kh - 1;
  const double chunks = std::ceil((p.skip + s.kw) / 4.0), own = patches * 32;
  const double fma = active * 32 * s.kh * s.kw, lds = active * (rows * (1 + chunks) + s.kh * 4 * chunks);
  // the weight gradient: each task goes over the rows of its part, eight columns at a time
  const double taps = b.chunks == 1 ? s.kw : BackwardPlan::kChunk, busy = std::ceil(double(b.tasks) * b.row_parts / 32);
  const double eights = std::ceil(p.patches_y * 4.0 / b.row_parts) * p.patches_x;
  const double fma_weight = busy * eights * 8 * taps, lds_weight = busy * eights * (2 + std::ceil((10 + taps) / 4));
  // numbers that are brought: da with its halo, of which what lies outside of the plane is zero, and x
  const double halo = p.channels * double(p.tile_rows) * p.pitch,
               inside = std::fmin(halo, double(p.channels) * s.h * s.w);
  const double load = p.vector_loads ? 4 : 8, slope = gradient_instructions(act);
  const double da = inside * (slope + 8 + 2 * load) + (halo - inside) * 4;
  const double x = own * (activation_instructions(act, Dtype::float32) + load + 4);
  const double end = own * (p.vector_stores ? 14 : 18);
  Cost c{};
  c.memory = backward_memory_cycles(s, gpu);
  c.issue = tiles * (fma + fma_weight + lds + lds_weight + (da + x + end) / 32 + 4 * 60) / 4 / rates.ffma_issue;
  c.ffma = tiles * (fma + fma_weight + (inside * (slope + 6) + own * 12) / 32) / rates.ffma;
  c.shared = tiles * (lds * 6 + lds_weight * 4 + (halo + 4 * own) / 32);
  c.idle = idle_factor(p.blocks, gpu.multiprocessors * blocks_at_once(b.shared_bytes, 4, gpu)) * double(b.splits) *
           std::ceil(double(p.units) / b.splits) / p.units;
  return c;
}

// Terms of one tile of a warp, as of the forward kernel, or of the block that shares it
inline Cost backward_mma_cost(const DepthwiseShape& s, Act act, const MmaPlan& p, const Gpu& gpu) {
  const Rates rates = rates_of(gpu);
  const int pairs = (s.kh + 1) / 2, blocks = p.column_tiles + p.window - 1, tile_rows = p.tile_rows();
  const double tiles = double(s.c) * p.units, values = 8.0 * p.column_tiles;  // a lane's outputs
  // of dweight: pairs of each of so many warps; of dx: the column tiles of a warp, and parts of the filter
  const int team = p.shared_tiles ? p.warps : 1, threads = 32 * team;
  const double most = std::ceil(double(pairs) / team), of_team = std::ceil(pairs / most);
  const int columns = p.shared_tiles ? 2 : p.column_tiles, shares = team * columns / p.column_tiles;
  const double steps = team * (std::ceil(double(pairs) / shares) + 1), fragments = team / shares * pairs * p.window;
  const double k16 = 2.0 * p.column_tiles * p.window * (of_team * most + pairs);
  const double ldsm = of_team * ((most + 1) * blocks + p.column_tiles) + steps * (columns + p.window - 1);
  // numbers of da that a lane brings beside the tile's own: above and below, left and right
  const int at_once = p.shared_tiles ? 8 : 16;
  const double above = p.images() * (p.rows - tile_rows) * p.column_tiles, fours = 2 * (p.window - 1);
  const double around = std::ceil(above * 8 / (threads * at_once)) * at_once * team;
  const double sides = std::ceil(p.images() * p.rows * fours / threads) * 4 * team;
  const bool tall = s.h > tile_rows, broad = s.w > tile_rows;
  const double load = p.load_bytes == 16 ? 4 : 7, da = gradient_instructions(act) + 12 + 2 * load;
  const double input = activation_instructions(act, s.dtype) + 10 + load, end = (p.store_bytes == 16 ? 14 : 18) + load;
  const double elementwise = values * (da + input + end) + around * (tall ? da : 2) + sides * (broad ? da + 10 : 9);
  const double other = p.shared_tiles ? team * 200 + steps * 20 : 200;
  Cost c{};
  c.memory = backward_memory_cycles(s, gpu);
  c.issue = tiles * (k16 + ldsm + fragments + elementwise + other) / 4 / rates.mma_issue;
  c.tensor = tiles * k16 / rates.tensor;
  c.shared = tiles * (ldsm * 4 + fragments * 2 + values * 2 + (values + around + sides) / 4 + values * 1.75 +
                      (shares - 1) * values * 2);
  const double of_sm = blocks_at_once(p.shared_bytes, p.blocks_of_registers(), gpu),
               turns = p.splits * p.tiles_at_once();
  c.idle = idle_factor(p.blocks, gpu.multiprocessors * of_sm) * turns * std::ceil(p.units / turns) / p.units;
  return c;
}

struct BackwardChoice {
  DepthwiseKernel kernel;  // ffma or mma
  BackwardPlan ffma;
  MmaPlan mma;
  Cost cost;
};

// `m` of the input and its gradient, `g` of the gradient that comes in and of a
inline BackwardChoice choose_backward(const DepthwiseShape& s, const Memory& m, const Memory& g, const Gpu& gpu,
                                      Act act) {
  BackwardChoice best{DepthwiseKernel::ffma, backward_plan(s, m, g, gpu), mma_backward_plan(s, m, g, gpu), {}};
  best.cost = backward_ffma_cost(s, act, best.ffma, gpu);
  if (!best.mma.blocks || best.cost.compute() <= kHidden * best.cost.memory) return best;
  const Cost cost = backward_mma_cost(s, act, best.mma, gpu);
  if (cost.cycles() < best.cost.cycles()) best.kernel = DepthwiseKernel::mma, best.cost = cost;
  return best;
}

// Share of a copy's bandwidth that torch reaches where it changes the layout: a guess
constexpr double kRelaid = 0.3;

// The kernels for channels_last tensors: those for NCHW, where so many copies to it and back are predicted to pay
struct PlanesChoice {
  bool pays;
  BackwardChoice choice;
  double copies;  // seconds
};

inline PlanesChoice choose_planes(const DepthwiseShape& s, const Memory& m, const Memory& g, const Gpu& gpu, Act act,
                                  int copies = 4) {
  if (!m.channels_last || !g.channels_last || s.dtype == Dtype::float32) return {};
  const Strides dense = dense_strides(s.c, s.h, s.w, false);
  const Memory planes = memory_of(nullptr, dense, nullptr, dense, s);
  PlanesChoice p{false, choose_backward(s, planes, planes, gpu, act), {}};
  p.copies = copies * (2 * size_of(s.dtype) * outputs_of(s) / (gpu.tb_per_s * 1e12 * kRelaid) + 2e-6);
  p.pays = p.choice.kernel == DepthwiseKernel::mma &&
           p.choice.cost.seconds(gpu) + p.copies < choose_backward(s, m, g, gpu, act).cost.seconds(gpu);
  return p;
}

}  // namespace cmx
