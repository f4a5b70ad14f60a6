// One pass over the activations, divided among the workers: by bands of rows, or in two steps by channels and by what a
// product reads.
#pragma once

#include "bind_cpu.h"

namespace cmx {

// How the workers divide a product: into parts of the pixels times shares of the output channels, such that each of them
// reads the least; the panel, of which others wrote most, counts twice. A part is read in rounds, which stay in L2, and the
// weights for each of them; a share in pieces, for workers that have ended theirs.
struct Division {
  const PlanesShape& shape;
  int64_t parts = 1, shares = 1, rounds = 1, pieces = 1;
  Division(const PlanesShape& shape, int64_t workers) : shape(shape) {
    for (int64_t p = 1, least_bytes = INT64_MAX; p <= std::min(workers, shape.pairs); p++) {
      if (workers % p) continue;
      const int64_t q = std::min(workers / p, shape.blocks), part = ceil_div(shape.pairs, p) * shape.pair_bytes,
                    r = ceil_div(part, l2_bytes() / 2),
                    bytes = 2 * part + ceil_div(shape.blocks, q) * shape.block_bytes * r;
      if (bytes < least_bytes) least_bytes = bytes, parts = p, shares = q, rounds = r;
    }
    pieces = std::min(ceil_div(4, rounds), ceil_div(shape.blocks, shares));
  }
  int64_t tasks() const { return parts * shares * rounds * pieces; }
  PlanesProduct task(int64_t i, int64_t y0) const {  // all of a worker's one after the other
    const int64_t piece = i % pieces, round = i / pieces % rounds, share = i / pieces / rounds % shares,
                  part = i / pieces / rounds / shares * rounds + round;
    const auto pair = [&](int64_t part) { return shape.pairs * part / (parts * rounds); };
    const auto block = [&](int64_t piece) { return shape.blocks * piece / (shares * pieces); };
    return {y0,
            pair(part),
            pair(part + 1),
            block(share * pieces + piece),
            block(share * pieces + piece + 1),
            block(share * pieces),
            block((share + 1) * pieces),
            round + 1 == rounds};
  }
};

// Bands of so many rows that their panel fits into the L2 of all workers together
inline void run_planes(Stage& s) {
  const CpuKernels& k = cpu_kernels();
  const int64_t workers = torch::stable::get_num_threads(), step = k.band_step(s.in.dtype);
  const bool patches = s.producer == Stage::Producer::patches;
  s.times = stage_times(s.producer);
  s.rows = round_up(s.out.h, step);
  PlanesShape shape = k.planes_shape(s, 0);
  if (const int64_t bands = ceil_div(shape.panel_bytes, workers * l2_bytes()); bands > 1) {
    s.rows = round_up(ceil_div(s.out.h, bands), step);
    shape = k.planes_shape(s, 0);
  }
  const Scratch panel(Scratch::panel, shape.panel_bytes);
  s.panel = panel.data();
  for (int64_t y0 = 0; y0 < s.out.h; y0 += s.rows) {
    if (y0) shape = k.planes_shape(s, y0);
    // Pieces of an image: blocks of channels, some at once. Images are divided where these are fewer than the workers, for
    // whom those that stay together share what is made of the filters; and then rows, some of which are read twice.
    const int64_t at_once = std::max<int64_t>(1, shape.units / (8 * workers)), units = ceil_div(shape.units, at_once);
    const int64_t images = std::min(s.out.n, ceil_div(workers, units));
    const int64_t rows = std::min(shape.cell_rows, ceil_div((patches ? 8 : 1) * workers, units * images));
    run(
        units * images * rows, shape.fill_scratch,
        [&](int64_t task, char* scratch) {
          const int64_t row = task % rows, image = task / rows % images, unit = task / rows / images * at_once;
          const auto part = [](int64_t size, int64_t i, int64_t parts) { return size * i / parts; };
          k.planes_fill(s,
                        {y0, part(s.out.n, image, images), part(s.out.n, image + 1, images), unit,
                         std::min(unit + at_once, shape.units), part(shape.cell_rows, row, rows),
                         part(shape.cell_rows, row + 1, rows)},
                        scratch);
        },
        Tasks::then_others);
    const Division division(shape, workers);
    run(
        division.tasks(), shape.product_scratch,
        [&](int64_t task, char* scratch) { k.planes_product(s, division.task(task, y0), scratch); },
        Tasks::then_others);
  }
}

inline void run_stage(Stage& s) {
  if (!s.out.n || !s.out.h || !s.out.w) return;
  if (s.pointwise.form == Form::planes) return run_planes(s);
  const CpuKernels& k = cpu_kernels();
  const bool patches = s.producer == Stage::Producer::patches;
  const int64_t channels = patches ? s.in.c * s.ph * s.pw : s.in.c;
  const int64_t pixel = channels * k.panel_bytes(s.in.dtype);
  int64_t most_rows = (4 << 20) / (pixel * s.out.w) + 1;
  if (k.tiles) most_rows = l2_bytes() / 2 / (pixel * s.out.w);
  s.rows = band_rows(s.out.n, s.out.h, most_rows);
  if (s.pointwise.form == Form::strassen && s.out.w % 2) s.rows = round_up(s.rows, 2);  // bands begin with a whole pair
  s.part = std::max<int64_t>(64, l2_bytes() * 3 / 4 / pixel / 16 * 16);
  s.times = stage_times(s.producer);
  const int64_t bands = ceil_div(s.out.h, s.rows);
  run(
      s.out.n * bands, k.stage_scratch_bytes(s),
      [&](int64_t task, char* scratch) { k.stage_band(s, task / bands, task % bands * s.rows, scratch); },
      Tasks::then_others);
}

}  // namespace cmx
