// The cost of the matrix product: bytes, instructions and cycles of a tile plan, and the cheapest plan. As cost.h.
#pragma once

#include "cost.h"
#include "product_plan.h"

namespace cmx {

// x once, y once, the weight once; for sums also the other tensor. Partial sums, 1 to 5 % of it, are not counted.
inline double bytes_of(const ProductShape& s, ProductUse use = ProductUse::inference) {
  const double pixels = double(s.n) * s.plane(), tensors = use == ProductUse::sums ? 2 : 1;
  return double(size_of(s.dtype)) * (pixels * (double(s.k()) + tensors * s.c_out) + double(s.k()) * s.c_out);
}
inline double flop_of(const ProductShape& s) { return 2. * s.n * s.plane() * s.k() * s.c_out; }
inline double floor_seconds(const ProductShape& s, const Gpu& gpu, ProductUse use = ProductUse::inference) {
  const Rates rates = rates_of(gpu);
  const double flop_per_s = std::fmax(rates.tensor, rates.wgmma) * 2 * 2048 * gpu.multiprocessors * gpu.ghz * 1e9;
  return std::fmax(bytes_of(s, use) / (gpu.tb_per_s * 1e12), flop_of(s) / flop_per_s);
}

// Instructions for one output between the sums and the store, and for its statistics: the activation beside its unused
// derivative is 4 cheaper than with it
inline double output_instructions(const ProductShape& s, Act act, ProductUse use) {
  switch (use) {
    case ProductUse::inference: return activation_instructions(act, s.dtype);
    case ProductUse::moments: return std::fmax(0, gradient_instructions(act) - 4) + 5;
    case ProductUse::sums: return std::fmax(0, gradient_instructions(act) - 4) + 7;
  }
  return 0;
}

// Factor of the last round, and of multiprocessors with a single block of the `resident` ones: two fill the pipes
inline double rounds(double blocks, double resident, const Gpu& gpu) {
  const double of_sm = std::ceil(blocks / gpu.multiprocessors);
  return of_sm * gpu.multiprocessors / blocks * std::fmax(1, 2 / std::fmin(of_sm, resident));
}

// Terms of one block, its steps along k and its epilogue
inline Cost product_cost(const ProductShape& s, Act act, const ProductPlan& p, const Gpu& gpu,
                         ProductUse use = ProductUse::inference) {
  const ProductTile& t = kProductTiles[p.tile];
  const Rates rates = rates_of(gpu);
  const double steps = std::ceil(double(p.k) / t.depth), outputs = double(t.rows) * t.columns;
  const double mma = outputs * t.depth / 2048;
  const double ldsm = t.depth / 16. * t.warps() * (t.warp_rows / 16. + t.warp_columns / 16.);
  const bool gather = p.layout == ProductLayout::gather;
  // of an access; 9 instructions where numbers are gathered, which on an H200 take the time of so many
  const auto access = [&](int bytes, bool gathered) { return gathered ? 34. : bytes == 2 ? 8. : 4.; };
  const double copies =
      2. * t.depth / 32 *
      (t.rows * access(p.a_bytes, false) / p.a_bytes + t.columns * access(p.b_bytes, gather) / p.b_bytes);
  const double sums = (t.slices() - 1) * outputs / 32 / t.slices() * 2;  // to shared memory and back
  const double per_output = output_instructions(s, act, use) + 5 + (p.y_bytes == 16 ? 1 : 24. / p.y_bytes);
  Cost c{};
  const double blocks = p.blocks();
  c.memory = bytes_of(s, use) / (gpu.tb_per_s * 1e12) * gpu.multiprocessors * gpu.ghz * 1e9;
  c.tensor = blocks * steps * mma / rates.tensor;
  c.issue = blocks * (steps * (mma + ldsm + copies + 4 * 25) + outputs / 32 * per_output + sums + 4 * 300) / 4;
  c.shared = blocks * (steps * (4 * ldsm + t.stage_bytes() / 128.) + outputs / 32 + sums);
  const double reached = gpu.arch == 90 ? t.reached : 1;  // not measured elsewhere
  c.idle = rounds(blocks, blocks_at_once(p.shared_bytes, t.blocks_per_sm, gpu), gpu) / reached;
  return c;
}

// Terms of one tile; what a block cannot hide are the first stage and the last epilogue
inline Cost wgmma_cost(const ProductShape& s, Act act, const WgmmaPlan& p, const Gpu& gpu,
                       ProductUse use = ProductUse::inference) {
  constexpr double kFill = 1500;  // cycles until a block's first stage is there: a guess
  const double outputs = double(p.kTile) * p.kTile, mma = outputs * p.kDepth / 2048;
  const double per_output = output_instructions(s, act, use) + 4;
  // 8 products of 64 x 128 a step read 2 and 4 KB of operands each; TMA writes the stage, and reads y
  const double shared = (8 * 6144 + p.kStageBytes) / 128., step = std::fmax(shared, mma / rates_of(gpu).wgmma);
  const double epilogue = outputs / 32 * per_output / 4, of_block = std::ceil(double(p.tiles) / p.blocks);
  Cost c{};
  c.memory = bytes_of(s, use) / (gpu.tb_per_s * 1e12) * gpu.multiprocessors * gpu.ghz * 1e9;
  c.tensor = double(p.tiles) * p.steps * mma / rates_of(gpu).wgmma;
  c.issue = p.tiles * (p.steps * 4 * 75. / 4 + epilogue);
  c.shared = p.tiles * (p.steps * shared + 2 * p.kOutBytes / 128.);
  c.idle = of_block * gpu.multiprocessors / p.tiles * (1 + (kFill + epilogue) / (of_block * p.steps * step));
  return c;
}

struct ProductChoice {
  ProductPlan plan;
  WgmmaPlan wgmma;  // where it has blocks, it is chosen
  Cost cost;
};

// The plan that is predicted to be fastest; no blocks where nothing is to be computed. `has_wgmma`: this binary has code
// for sm_90a. `only`: a tile, or kProductTileCount for wgmma; no blocks where that does not take the product.
inline ProductChoice choose_product(const ProductShape& s, const ProductMemory& m, const Gpu& gpu, Act act,
                                    bool has_wgmma = true, ProductUse use = ProductUse::inference,
                                    int only = kEveryProduct) {
  ProductChoice best{};
  for (int tile = 0; tile < kProductTileCount; ++tile) {
    if (only != kEveryProduct && only != tile) continue;
    const ProductPlan plan = product_plan(s, m, tile);
    if (!plan.blocks() || plan.shared_bytes > gpu.shared_bytes) continue;
    if (use != ProductUse::inference && !kProductTiles[tile].has_statistics()) continue;
    const Cost cost = product_cost(s, act, plan, gpu, use);
    if (!best.plan.blocks() || cost.cycles() < best.cost.cycles()) best.plan = plan, best.cost = cost;
  }
  if (gpu.arch != 90 || !has_wgmma || (only != kEveryProduct && only != kProductTileCount)) return best;
  const WgmmaPlan plan = wgmma_plan(s, m, gpu);
  if (!plan.blocks) return best;
  const Cost cost = wgmma_cost(s, act, plan, gpu, use);
  if (!best.plan.blocks() || cost.cycles() < best.cost.cycles()) best.wgmma = plan, best.cost = cost;
  return best;
}

// What unfolding takes. Instructions of a number that is stored: counted in the SASS of sm_90a.
inline Cost unfold_cost(const ProductShape& s, const UnfoldPlan& p, const Gpu& gpu) {
  const double patches = double(s.n) * s.plane(), weight = s.k() % 8 ? s.c_out : 0;
  const double read = (patches + weight) * s.k(), stored = (patches + weight) * unfolded(s).c_in;
  Cost c{};
  c.memory = 2 * (read + stored) / (gpu.tb_per_s * 1e12) * gpu.multiprocessors * gpu.ghz * 1e9;
  c.issue = (read * (p.vector_loads ? 10 : 18) + stored * (p.each == 8 ? 17 : 90)) / 32 / 4;
  c.shared = (read / 16 + stored * (p.each == 8 ? 2 : 1)) / 32;
  c.idle = rounds(p.blocks, blocks_at_once(p.shared_bytes, 4, gpu), gpu);
  return c;
}

// Patches: gathered by the product, or unfolded first
struct PatchChoice {
  UnfoldPlan unfold;  // no blocks: gathered
  Cost unfold_cost;
  ProductChoice product;  // of s, or of unfolded(s)
  ProductMemory memory;   // of its operands
};

// As choose_product, for a product of patches at `x`
inline PatchChoice choose_patches(const ProductShape& s, const ProductMemory& m, const void* x, const Strides& xs,
                                  const void* y, const Strides& ys, const Gpu& gpu, Act act, bool has_wgmma = true,
                                  ProductUse use = ProductUse::inference, int only = kEveryProduct) {
  const PatchChoice gathered{{}, {}, choose_product(s, m, gpu, act, has_wgmma, use, only), m};
  if ((s.ph == 1 && s.pw == 1) || use != ProductUse::inference) return gathered;
  const ProductShape u = unfolded(s);
  const bool last = is_last(ys);
  PatchChoice found{unfold_plan(s, x, xs, last, gpu), {}, {}, {}};
  if (!found.unfold.blocks) return gathered;
  found.unfold_cost = unfold_cost(s, found.unfold, gpu);
  found.memory = product_memory_of(nullptr, dense_strides(u.c_in, u.h, u.w, last), nullptr, y, ys, u);
  if (found.memory.layout == ProductLayout::gather) return gathered;
  found.product = choose_product(u, found.memory, gpu, act, has_wgmma, use, only);
  const auto none = [](const ProductChoice& c) { return !c.plan.blocks() && !c.wgmma.blocks; };
  if (none(found.product)) return gathered;
  const double seconds = found.unfold_cost.seconds(gpu) + found.product.cost.seconds(gpu);
  return none(gathered.product) || seconds < gathered.product.cost.seconds(gpu) ? found : gathered;
}

}  // namespace cmx
