// Tile plans of the CUDA kernels: the only place with tuned numbers. Plain host C++, so that every machine can ask.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"

namespace cmx {

struct DepthwiseShape {
  int n, c, h, w, kh, kw;
  Dtype dtype;
};

struct Strides {
  int64_t n, c, h, w;
};

inline Strides dense_strides(int64_t c, int64_t h, int64_t w, bool channels_last) {
  return channels_last ? Strides{c * h * w, 1, w * c, c} : Strides{c * h * w, h * w, w, 1};
}

// What a plan and a prediction need to know of a GPU
struct Gpu {
  int arch;  // 90 for compute capability 9.0
  int multiprocessors;
  int shared_bytes;      // that one block may have
  double ghz, tb_per_s;  // sustained clock, memory bandwidth (read and written bytes counted)
  double tensor = 1;     // share of the tensor cores' rate of its architecture
};

// Blocks that the shared memory of one multiprocessor holds, each with the 1 KB that the driver takes
inline int blocks_that_fit(int shared_bytes, const Gpu& gpu) {
  return (gpu.shared_bytes + 1024) / (shared_bytes + 1024);
}

// What a plan needs to know of the memory of x and y
struct Memory {
  int x_alignment, y_alignment;  // bytes, up to 16, that divide the address and the strides n, c and h
  bool x_rows, y_rows;           // neighbours in a row are neighbours in memory
  bool x_planes, y_planes;       // and rows follow each other without a gap
  bool channels_last;            // x and y: neighbouring channels are neighbours in memory
  int x_pixels, y_pixels;        // then bytes, up to 16, that divide the address and the strides n, h and w
};

inline int alignment_of(const void* address, const Strides& s, int64_t element) {
  int64_t bits = reinterpret_cast<intptr_t>(address) | s.n * element | s.c * element | s.h * element | 16;
  return static_cast<int>(bits & -bits);
}

inline Memory memory_of(const void* x, const Strides& xs, const void* y, const Strides& ys, const DepthwiseShape& s) {
  const int64_t element = size_of(s.dtype);
  Memory m{};
  m.x_alignment = alignment_of(x, xs, element), m.y_alignment = alignment_of(y, ys, element);
  m.x_rows = xs.w == 1, m.y_rows = ys.w == 1;
  m.x_planes = m.x_rows && (xs.h == s.w || s.h == 1), m.y_planes = m.y_rows && (ys.h == s.w || s.h == 1);
  m.channels_last = s.c > 1 && xs.c == 1 && ys.c == 1 && !(m.x_rows && m.y_rows);
  m.x_pixels = alignment_of(x, {xs.n, xs.w, xs.h, 1}, element);
  m.y_pixels = alignment_of(y, {ys.n, ys.w, ys.h, 1}, element);
  return m;
}

// ---- float32 pipes: depthwise_fwd_ffma.cu

struct FfmaPlan {
  static constexpr int kRows = 4, kColumns = 8;  // of the patch that a thread computes
  static constexpr int kThreads = 128;           // of a block, or fewer
  static constexpr int kShared = 48 << 10;       // bytes a block takes, more only where one channel needs it

  static constexpr int kBlocksPerSm = 4;  // that registers leave room for

  int channels, patches_y, patches_x;   // of a block
  int tiles_y, tiles_x, groups;         // tiles along the plane, groups along the channels
  int64_t units;                        // tiles of a group, of all images
  int blocks;                           // each takes its share of groups * units, one after the other
  int piece;                            // numbers that a thread brings in one access: 4, or 8 of 16 bits
  int tile_rows, pitch, channel_pitch;  // the tile in shared memory, in numbers
  int left, lead, skip;  // its columns before the outputs; of them, in pieces of 4 and then before the first tap
  int weight_pitch, weight_channel_pitch;
  bool channels_first;  // neighbouring threads take neighbouring channels
  bool vector_loads, vector_stores;
  bool copies;  // cp.async can bring pieces: float32, of which all or nothing lies in a row
  bool whole;   // and a tile is a plane, of which a thread's pieces lie below each other
  int shared_bytes;

  int64_t parts() const { return units; }  // of a channel's moments
};

// `before`: columns of padding on the left
inline bool ffma_layout(FfmaPlan& p, const DepthwiseShape& s, int before) {
  p.skip = (4 - before % 4) % 4;
  p.left = static_cast<int>(round_up(before, p.piece));
  p.lead = p.left - p.skip - before;
  p.tile_rows = p.patches_y * FfmaPlan::kRows + s.kh - 1;
  p.pitch = static_cast<int>(round_up(p.lead + p.patches_x * FfmaPlan::kColumns + p.skip + s.kw - 1, p.piece));
  p.channel_pitch = p.tile_rows * p.pitch;
  p.weight_pitch = static_cast<int>(round_up(p.skip + s.kw, 4));
  p.weight_channel_pitch = s.kh * p.weight_pitch;
  if (p.channels_first) {  // 4 modulo 32: eight lanes then read eight different groups of four banks
    p.channel_pitch = static_cast<int>(round_up(p.channel_pitch - 4, 32)) + 4;
    p.weight_channel_pitch = static_cast<int>(round_up(p.weight_channel_pitch - 4, 32)) + 4;
  }
  p.shared_bytes = 4 * p.channels * (p.channel_pitch + p.weight_channel_pitch);
  return p.shared_bytes <= FfmaPlan::kShared;
}

inline void ffma_tiles(FfmaPlan& p, const DepthwiseShape& s) {
  p.tiles_x = static_cast<int>(ceil_div(s.w, FfmaPlan::kColumns * p.patches_x));
  p.tiles_y = static_cast<int>(ceil_div(s.h, FfmaPlan::kRows * p.patches_y));
  p.groups = static_cast<int>(ceil_div(s.c, p.channels));
  p.units = static_cast<int64_t>(s.n) * p.tiles_y * p.tiles_x;
}

inline int load_lanes(const FfmaPlan& p, int threads, int pitch) {
  return std::max(1, std::min(pitch / 4, threads / (p.channels_first ? p.channels : 1)));
}

inline FfmaPlan ffma_plan(const DepthwiseShape& s, const Memory& m, const Gpu& gpu) {
  FfmaPlan p{};
  const bool wide = s.dtype != Dtype::float32 && m.x_rows && m.x_alignment == 16;
  p.piece = wide ? 8 : 4;
  const int along_x = static_cast<int>(ceil_div(s.w, FfmaPlan::kColumns)),
            along_y = static_cast<int>(ceil_div(s.h, FfmaPlan::kRows));
  p.channels_first = m.channels_last;
  if (p.channels_first) {
    p.channels = std::min<int>(s.c, s.dtype == Dtype::float32 ? 16 : 32);  // 64 bytes a pixel
    p.patches_x = std::min(along_x, 2);
    p.patches_y = std::clamp(FfmaPlan::kThreads / (p.channels * p.patches_x), 1, std::min(along_y, 4));
  } else {
    p.patches_x = std::min(along_x, 4);
    p.patches_y = std::min(along_y, 8);
    p.channels = std::clamp(FfmaPlan::kThreads / (p.patches_x * p.patches_y), 1, s.c);
  }
  while (!ffma_layout(p, s, (s.kw - 1) / 2) && p.channels > (p.channels_first ? 8 : 1))
    p.channels = std::max(1, p.channels / 2);
  while (!ffma_layout(p, s, (s.kw - 1) / 2) && p.patches_y > 1 && p.shared_bytes > gpu.shared_bytes) p.patches_y /= 2;
  while (!ffma_layout(p, s, (s.kw - 1) / 2) && p.channels > 1 && p.shared_bytes > gpu.shared_bytes) p.channels /= 2;

  ffma_tiles(p, s);
  const int threads = p.channels * p.patches_x * p.patches_y;
  const int of_sm = blocks_that_fit(p.shared_bytes, gpu);
  const int most = FfmaPlan::kBlocksPerSm * FfmaPlan::kThreads / threads;
  p.blocks = static_cast<int>(std::min(p.groups * p.units, int64_t(gpu.multiprocessors) * std::clamp(of_sm, 1, most)));
  const int four = static_cast<int>(4 * size_of(s.dtype));
  p.vector_loads = m.x_rows && m.x_alignment % four == 0;
  p.vector_stores = m.y_rows && m.y_alignment == 16;
  p.copies = p.vector_loads && s.dtype == Dtype::float32 && s.w % 4 == 0;
  p.whole = p.copies && p.tiles_y == 1 && p.tiles_x == 1 && s.w / 4 <= p.patches_y * p.patches_x;
  return p;
}

// Has the kernel's width code of its own? It takes filter rows for all rows of a patch, or one less under a width of 3.
constexpr bool own_width(const DepthwiseShape& s) {
  return s.kh >= FfmaPlan::kRows - (s.kw == 3) && (s.kw == 3 || s.kw == 5 || s.kw == 7 || s.kw == 9);
}

// Backward: depthwise_bwd_ffma.cu

struct BackwardPlan {
  static constexpr int kThreads = 128;
  static constexpr int kChunk = 8;  // taps of a filter row that a thread sums, where the width has no code of its own
  static constexpr int kBlocksPerSm = 8;  // so many rounds of blocks even out their ends

  FfmaPlan tile;                 // of the gradient, with its halo
  int splits;                    // blocks = groups * splits; each block takes every splits-th tile of its channels
  int x_pitch, x_channel_pitch;  // of the input, which needs no halo
  int load_lanes, x_load_lanes;  // threads side by side along a row
  int chunks, tasks, row_parts;  // tasks: sums of taps of a block; row_parts: threads that share one
  int shared_bytes;
};

inline bool backward_layout(BackwardPlan& b, const DepthwiseShape& s) {
  FfmaPlan& p = b.tile;
  ffma_layout(p, s, s.kw / 2);
  b.chunks = own_width(s) ? 1 : static_cast<int>(ceil_div(p.skip + s.kw, BackwardPlan::kChunk));
  b.tasks = p.channels * s.kh * b.chunks;
  b.row_parts = std::max(1, std::min(BackwardPlan::kThreads / b.tasks, p.patches_y * FfmaPlan::kRows));
  b.x_pitch = p.patches_x * FfmaPlan::kColumns + 4;
  b.x_channel_pitch = p.patches_y * FfmaPlan::kRows * b.x_pitch;
  const int taps = own_width(s) ? s.kw : BackwardPlan::kChunk;
  const int sums = std::max(b.tasks * b.row_parts * taps, 3 * BackwardPlan::kThreads);  // at the end, over the tiles
  b.shared_bytes = std::max(p.shared_bytes + 4 * p.channels * b.x_channel_pitch, 4 * sums);
  return b.shared_bytes <= FfmaPlan::kShared;
}

// `m` of the input and its gradient, `g` of the gradient that comes in and the pre-activation
inline BackwardPlan backward_plan(const DepthwiseShape& s, const Memory& m, const Memory& g, const Gpu& gpu) {
  BackwardPlan b{};
  FfmaPlan& p = b.tile;
  p.piece = 4;
  const int along_x = static_cast<int>(ceil_div(s.w, FfmaPlan::kColumns)),
            along_y = static_cast<int>(ceil_div(s.h, FfmaPlan::kRows));
  p.channels_first = m.channels_last && g.channels_last;
  p.patches_x = std::min(along_x, p.channels_first ? 2 : 4);
  p.patches_y = std::min(along_y, p.channels_first ? 4 : 8);
  p.channels = 1;
  backward_layout(b, s);
  const int most = std::max(1, BackwardPlan::kThreads / std::max(b.tasks, p.patches_x * p.patches_y));
  p.channels = std::min(s.c, most);
  while (!backward_layout(b, s) && p.channels > 1) p.channels /= 2;
  while (!backward_layout(b, s) && p.patches_y > 1 && b.shared_bytes > gpu.shared_bytes) p.patches_y /= 2;

  ffma_tiles(p, s);
  const int64_t wanted = ceil_div(int64_t(gpu.multiprocessors) * BackwardPlan::kBlocksPerSm, p.groups);
  b.splits = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, p.units)));
  p.blocks = p.groups * b.splits;
  b.load_lanes = load_lanes(p, BackwardPlan::kThreads, p.pitch);
  b.x_load_lanes = load_lanes(p, BackwardPlan::kThreads, b.x_pitch - 4);
  const int four = static_cast<int>(4 * size_of(s.dtype));
  p.vector_loads = m.x_rows && g.x_rows && g.y_rows && m.x_alignment % four == 0 && g.x_alignment % four == 0 &&
                   g.y_alignment % four == 0;
  p.vector_stores = m.y_rows && m.y_alignment == 16;
  return b;
}

// ---- tensor cores: depthwise_fwd_mma.cu and, for whole planes of 16x16 and 32x32, depthwise_fwd_mma_plane.cu;
// ---- for channels_last depthwise_fwd_mma_last.cu

// Of depthwise_bwd_mma_large, on a multiprocessor: what its registers leave room for
constexpr int mma_large_blocks(int window) { return window < 4 ? 4 : 3; }

struct MmaPlan {
  static constexpr int kWarps = 4;   // of a block, or fewer; each has its own tile
  static constexpr int kStages = 2;  // tiles of a warp in shared memory: one computed, the rest on their way
  static constexpr int kPlaneStages = 3;
  static constexpr int kPlaneTaps = 1024;  // bytes for a channel's taps in shared memory
  static constexpr int kRounds = 8;        // at most so many rounds of blocks, where there is work enough
  static constexpr int kBlocksPerSm = 4;   // what registers and shared memory allow for the planes
  static constexpr int kWaves = 4;         // so many rounds of blocks even out their ends, where there is work enough
  static constexpr int kUnitsOfAWarp = 4;  // fewer do not pay for reading and expanding the filter
  // channels_last, channels of a block: a sector of memory, or fewer until two blocks fit a multiprocessor, but not under 4
  static constexpr int kChannels = 16, kFewChannels = 4;
  static constexpr int kLastWarps = kChannels / 2;
  static constexpr int kSkew = 16;  // bytes between the planes of two channels and those of the next two

  int blocks, splits, warps;          // blocks = channels * splits, or groups of channels * splits
  int channels;                       // of a block, for channels_last; else 0: one
  int window;                         // blocks of 8 columns that 8 outputs and their taps lie in: 2 to 5
  int column_tiles;                   // 8 columns each: 4, or 2 where two images of 16x16 share a tile
  int tiles_y, tiles_x, units;        // tiles of a channel
  int rows, half_plane, stage_bytes;  // of a tile in shared memory
  int load_bytes, store_bytes;        // of one access
  int shared_bytes;
  bool shared_tiles;  // backward: the warps of a block work on the same tile

  int tile_rows() const { return 8 * column_tiles; }
  int images() const { return 4 / column_tiles; }
  int64_t parts() const { return channels ? units : int64_t(splits) * warps; }  // of a channel's moments
  int tiles_at_once() const { return shared_tiles ? 1 : warps; }                // of a block
  int blocks_of_registers() const {  // that a multiprocessor has registers for
    return shared_tiles ? mma_large_blocks(window) : kBlocksPerSm * kWarps / warps;
  }
  int pitch() const { return ((column_tiles + window - 1) | 1) * 16; }
};

constexpr bool mma_plane_kernel(int kh, int kw) { return kh == kw && (kh == 7 || kh == 9); }

inline int common_bytes(int a, int b) { return std::min(a & -a, b & -b); }

// Enough blocks for the GPU, enough work for each. `groups` of channels, of which a block takes `at_once` units at once
inline void split_units(MmaPlan& p, int groups, int at_once, const Gpu& gpu) {
  const int64_t wanted = ceil_div(int64_t(MmaPlan::kWaves) * MmaPlan::kBlocksPerSm * gpu.multiprocessors, groups);
  const int64_t most = std::max<int64_t>(1, p.units / (at_once * MmaPlan::kUnitsOfAWarp));
  const int64_t at_least =
      ceil_div(gpu.multiprocessors, groups);  // few channels: rather short blocks than idle multiprocessors
  p.splits = static_cast<int>(
      std::clamp<int64_t>(std::min(wanted, most), at_least, std::max<int64_t>(at_least, ceil_div(p.units, at_once))));
  p.splits = static_cast<int>(std::min<int64_t>(p.splits, ceil_div(p.units, at_once)));
  p.blocks = groups * p.splits;
}

// The same where a block has a channel and a warp a tile: of so many rounds of blocks those that end first. What a block
// does beside its units takes it about as long as one of them.
inline void split_rounds(MmaPlan& p, int channels, const Gpu& gpu) {
  const int64_t of_sm = std::min(p.blocks_of_registers(), blocks_that_fit(p.shared_bytes, gpu)),
                tiles = p.tiles_at_once();
  const int64_t at_once = gpu.multiprocessors * std::max<int64_t>(1, of_sm), most = ceil_div(p.units, tiles);
  int64_t best = 0;
  for (int rounds = 1; rounds <= MmaPlan::kRounds; ++rounds) {
    const int64_t splits = std::clamp<int64_t>(rounds * at_once / channels, 1, most);
    const int64_t time = ceil_div(channels * splits, at_once) * (ceil_div(p.units, splits * tiles) + 1);
    if (!best || time < best) best = time, p.splits = static_cast<int>(splits);
  }
  p.blocks = channels * p.splits;
}

inline bool mma_sizes(const DepthwiseShape& s) {
  return s.dtype != Dtype::float32 && int64_t(s.n) * ceil_div(s.h, 16) * ceil_div(s.w, 16) < 1 << 30 &&
         int64_t(s.c) * s.n < 1 << 30;
}
inline bool mma_basics(const DepthwiseShape& s, const Memory& m) { return mma_sizes(s) && m.x_rows && m.y_rows; }

// Tiles with their halo, of any size
inline void mma_tiles(MmaPlan& p, const DepthwiseShape& s) {
  p.window = std::max(2, static_cast<int>(ceil_div(s.kw + 7, 8)));
  p.column_tiles = s.h <= 16 && s.w <= 16 ? 2 : 4;
  p.tiles_y = static_cast<int>(ceil_div(s.h, p.tile_rows())),
  p.tiles_x = static_cast<int>(ceil_div(s.w, 8 * p.column_tiles));
  p.units = static_cast<int>(ceil_div(s.n, p.images())) * p.tiles_y * p.tiles_x;
  p.rows = p.tile_rows() + 2 * ((s.kh + 1) / 2) - 1;
  p.half_plane = static_cast<int>(round_up((2 * ((p.rows - 1) / 4) + 2) * p.pitch(), 128));
  p.stage_bytes = p.images() * 2 * p.half_plane;
}

// A tile a warp, fewer warps where the GPU has less shared memory than they want, and the blocks; none where it has too little
inline void fit_blocks(MmaPlan& p, int channels, int filter_bytes, int warp_bytes, const Gpu& gpu) {
  p.warps = std::min(MmaPlan::kWarps, p.units);
  while ((p.shared_bytes = filter_bytes + p.warps * warp_bytes) > gpu.shared_bytes && p.warps > 1) --p.warps;
  if (p.shared_bytes <= gpu.shared_bytes) split_rounds(p, channels, gpu);
}

// blocks == 0: not for these kernels
inline MmaPlan mma_plan(const DepthwiseShape& s, const Memory& m, const Gpu& gpu) {
  MmaPlan p{};
  if (!mma_basics(s, m)) return p;
  mma_tiles(p, s);
  // a tile starts 4 (window - 1) columns left of its outputs: for an even window in the middle of 16 bytes
  const int width = 2 * s.w;
  p.load_bytes = std::min({p.window % 2 ? 16 : 8, m.x_alignment, common_bytes(width, 16)});
  p.store_bytes = std::min(m.y_alignment, common_bytes(width, 16));
  fit_blocks(p, s.c, (s.kh + 1) / 2 * p.window * 256, MmaPlan::kStages * p.stage_bytes, gpu);
  return p;
}

inline MmaPlan mma_last_plan(const DepthwiseShape& s, const Memory& m, const Gpu& gpu) {
  MmaPlan p{};
  if (!mma_sizes(s) || !m.channels_last) return p;
  mma_tiles(p, s);
  const int channel_bytes = (s.kh + 1) / 2 * p.window * 256 + p.stage_bytes;
  const auto with = [&](int channels) {
    p.channels = channels;
    p.shared_bytes = channels * channel_bytes + (channels - 1) / 2 * MmaPlan::kSkew;
  };
  with(MmaPlan::kChannels);
  while (p.channels > MmaPlan::kFewChannels &&
         (blocks_that_fit(p.shared_bytes, gpu) < 2 || ceil_div(s.c, p.channels) * p.units < gpu.multiprocessors))
    with(p.channels / 2);
  while (p.channels > 1 && (blocks_that_fit(p.shared_bytes, gpu) < 1 || p.channels / 2 >= s.c)) with(p.channels / 2);
  if (blocks_that_fit(p.shared_bytes, gpu) < 1) return p;
  p.warps = p.channels > MmaPlan::kFewChannels ? p.channels / 2 : p.channels;
  const int width = common_bytes(2 * s.c, 2 * p.channels);
  p.load_bytes = std::min({16, m.x_pixels, width}), p.store_bytes = std::min({16, m.y_pixels, width});
  split_units(p, static_cast<int>(ceil_div(s.c, p.channels)), 1, gpu);
  return p;
}

inline MmaPlan mma_plane_plan(const DepthwiseShape& s, const Memory& m, const Gpu& gpu) {
  MmaPlan p{};
  const bool fits = (s.h == 32 && s.w == 32) || (s.h == 16 && s.w == 16);
  if (!mma_basics(s, m) || !fits || !mma_plane_kernel(s.kh, s.kw) || !m.x_planes || !m.y_planes) return p;
  if (m.x_alignment != 16 || m.y_alignment != 16) return p;
  p.window = 2;
  p.column_tiles = s.h / 8;
  p.tiles_y = p.tiles_x = 1;
  p.units = static_cast<int>(ceil_div(s.n, p.images()));
  p.load_bytes = p.store_bytes = 16;
  p.rows = p.tile_rows() + s.kh - 1;
  p.half_plane = static_cast<int>(round_up((2 * ((p.rows - 1) / 4) + 2) * (p.column_tiles | 1) * 16, 128));
  p.stage_bytes = p.images() * 2 * p.half_plane;
  fit_blocks(p, s.c, MmaPlan::kPlaneTaps, MmaPlan::kPlaneStages * p.stage_bytes, gpu);
  return p;
}

// Backward: depthwise_bwd_mma.cu, depthwise_bwd_mma_large.cu

// The weight gradient keeps 4 numbers in registers for each pair of filter rows and each block of a window, and the input's
// gradient 32 beside: up to 9x9 that are 72 of the 128 that four blocks a multiprocessor leave. Of larger kernels each warp
// of a block takes a part of the pairs, at most so many, on a tile that they share.
constexpr int kMmaBackwardPairs = 5, kMmaBackwardWindow = 2, kMmaLargePairs = 4;
static_assert(MmaPlan::kWarps * kMmaLargePairs >= (kMaxKernel + 1) / 2);

// blocks == 0: not for these kernels. `m` of the input and its gradient, `g` of the gradient that comes in and of a.
// Of a tile in shared memory: da with its halo as products take it, then in its place the results in float32; at the end
// act(x) without a halo and, where warps share a tile, x'. After all tiles the sums of the weight gradient, 16 x 8 for a pair
// and a block, and three more; where warps share a tile they have room for one pair each.
inline MmaPlan mma_backward_plan(const DepthwiseShape& s, const Memory& m, const Memory& g, const Gpu& gpu) {
  MmaPlan p{};
  if (!mma_basics(s, m) || !g.x_rows || !g.y_rows) return p;
  p.shared_tiles = s.kh > 2 * kMmaBackwardPairs - 1 || s.kw > 8 * kMmaBackwardWindow - 7;
  mma_tiles(p, s);
  const int pairs = (s.kh + 1) / 2, filter = pairs * p.window * 256;
  const int inputs = (p.shared_tiles ? 2 : 1) * 32 * (p.column_tiles | 1) * 16,
            results = 32 * 32 * (p.column_tiles + 1);
  const int sums =
      (p.shared_tiles ? MmaPlan::kWarps : pairs) * p.window * 16 * 8 * 4 + (p.shared_tiles ? MmaPlan::kWarps : 1) * 16;
  p.stage_bytes = static_cast<int>(round_up(std::max(std::max(p.stage_bytes, results) + inputs, sums), 128));
  const int width = common_bytes(2 * s.w, 16);
  p.load_bytes = std::min({m.x_alignment, g.x_alignment, g.y_alignment, width}) == 16 ? 16 : 2;
  p.store_bytes = std::min(m.y_alignment, width);
  if (!p.shared_tiles) {
    fit_blocks(p, s.c, filter, p.stage_bytes, gpu);
    return p;
  }
  p.warps = MmaPlan::kWarps, p.shared_bytes = filter + p.stage_bytes;
  if (p.shared_bytes <= gpu.shared_bytes) split_rounds(p, s.c, gpu);
  return p;
}

}  // namespace cmx
