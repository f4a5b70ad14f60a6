// The matrix product of product_mma.cu on Hopper's own instructions (sm_90a): copies of tiles by TMA, wgmma. bf16 and fp16.
//
// D's rows and columns as there. One block a multiprocessor stays and takes tiles of 128 x 128. One thread, the producer,
// has TMA fill a ring of stages, 64 numbers along k each, of one tile after the other. Two groups of four warps multiply: one
// has the tensor cores while the other applies the epilogue to its sums and stores them ("ping-pong").
//
// Two blocks are a cluster and take two tiles of the same channels: each brings half of the weight's tile to both, so that L2
// is read as for tiles of 128 x 256.
//
//   full[stage]   phase ends: TMA has brought all bytes of the stage             the group whose turn it is waits
//   empty[stage]  phase ends: four warps of each block of the cluster are done   the producer waits: it writes to both
//   kTurn + g     the other group has issued its products                       group g waits before its own
//
// Pixels come in panels of 64, each from one image, so that a tile may end in one image and begin in the next. Beyond the
// ends of an image, of k and of the channels TMA reads zeros and stores nothing. All tiles in shared memory have rows of 64
// numbers in the 128-byte swizzle. The producer is a group of its own, idle but for one thread, because registers move
// (setmaxnreg) from one group to another.
#include "hopper.cuh"
#include "product_statistics.cuh"

namespace cmx {
namespace {

using Plan = WgmmaPlan;

struct Maps {
  TensorMap x, weight, y;
  bool x_images_second, y_images_second;
};

#if CMX_HAS_WGMMA
constexpr int LANES = 32, GROUP = 128;
constexpr int kTurn = 1, kStaged = kTurn + 2;  // named barriers, one a group
// Tiles are 64 numbers wide: of 64 rows (a panel), of 128, of 8 (the swizzle's pattern)
constexpr int PANEL_BYTES = 2 * Plan::kPanel * 64, HALF_BYTES = 2 * Plan::kTile * 64, EIGHT_ROWS = 8 * 128;

// Where a tile of D lies
struct Tile {
  int channel, image[2], pixel[2];  // first ones: of the channels, and of both panels
  int part;                         // the first one, of statistics

  // Numbers of a cluster's blocks are neighbours. Clusters that share pixels follow each other.
  __device__ __forceinline__ Tile(const Plan& plan, int number) {
    const int rank = number % plan.cluster, mine = number / plan.cluster, group = mine / plan.channel_tiles;
    const int pixels = group * plan.cluster + rank;
    part = plan.layout == ProductLayout::channels_last ? 2 * pixels : pixels;
    channel = (mine - group * plan.channel_tiles) * Plan::kTile;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      image[i] = (2 * pixels + i) / plan.image_panels;
      pixel[i] = (2 * pixels + i - image[i] * plan.image_panels) * Plan::kPanel;
    }
  }
};

// A place in the ring, and the parity of its phase
struct Place {
  int stage, parity;

  __device__ __forceinline__ explicit Place(int steps)
      : stage(steps % Plan::kStages), parity(steps / Plan::kStages % 2) {}
  __device__ __forceinline__ void advance() {
    if (++stage == Plan::kStages) stage = 0, parity ^= 1;
  }
};

// A float32 vector [c_out] for the numbers of a lane: of its four rows, kept; or of its columns, read when they are wanted
template <bool LAST>
struct Constants {
  const float* v;
  float missing, row[2][2];
  int first, end;

  __device__ __forceinline__ Constants(const float* from, float none, int channel, int lane, int warp, int c_out)
      : v(from), missing(none), first(channel + (LAST ? lane % 4 * 2 : warp * 16 + lane / 4)), end(c_out) {
    if constexpr (!LAST) {
#pragma unroll
      for (int i = 0; i < 4; ++i) row[i / 2][i % 2] = read(i / 2 * 64 + i % 2 * 8, 0);
    }
  }
  __device__ __forceinline__ float read(int offset, int e) const {
    const int c = first + offset;                   // channels of columns come in eights: if it is one, so is the next
    return v ? v[(c < end ? c : 0) + e] : missing;  // what is beyond the last channel is not stored
  }
  __device__ __forceinline__ float of(int i, int half, int j, int e) const {
    return LAST ? read(8 * j, e) : row[i][half];
  }
};

// acc[i][4 j + 2 half + e]: row 64 i + 16 warp + 8 half + lane / 4, column 8 j + 2 (lane % 4) + e of the tile
template <class T, bool LAST>
__device__ __forceinline__ void finish(float (&acc)[2][64], const ProductForward& p, int channel, int warp, int lane,
                                       unsigned char* staging) {
  const int c_out = p.shape.c_out;
  const Constants<LAST> bias(p.bias, 0.f, channel, lane, warp, c_out);
#pragma unroll
  for (int j = 0; j < 16; ++j)
#pragma unroll
    for (int n = 0; n < 8; ++n) acc[n / 4][4 * j + n % 4] += bias.of(n / 4, n / 2 % 2, j, n % 2);

  activate<T, 128>(&acc[0][0], p.partials ? Act::none : p.act);

  const Constants<LAST> scale(p.scale, 1.f, channel, lane, warp, c_out),
      shift(p.shift, 0.f, channel, lane, warp, c_out);
  unsigned char* const mine = staging + (warp * 16 + lane / 4) * 128 + lane % 4 * 4;
#pragma unroll
  for (int j = 0; j < 16; ++j)
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int i = n / 2, half = n % 2;
      float v[2];
#pragma unroll
      for (int e = 0; e < 2; ++e)
        v[e] = fmaf(acc[i][4 * j + 2 * half + e], scale.of(i, half, j, e), shift.of(i, half, j, e));
      put(mine + j / 8 * HALF_BYTES + (64 * i + 8 * half) * 128 + (j % 8 ^ lane / 4) * 16, pack<T>(v[0], v[1]));
    }
}

// Statistics of a group's tile, in training: a warp's piece is 32 channels of all pixels, or 64 of a panel of pixels.
template <class T, bool LAST>
__device__ __forceinline__ void statistics(const ProductForward& p, const Plan& plan, const Tile& tile, int warp,
                                           int lane, const unsigned char* staging) {
  const ProductShape& s = p.shape;
  const int plane = s.h * s.w;
  const auto image_of = [&](int panel) { return panel ? tile.image[1] : tile.image[0]; };
  const auto pixel_of = [&](int panel) { return panel ? tile.pixel[1] : tile.pixel[0]; };
  const auto like = [&](int panel, int pixel, int c) {  // of eight numbers, which exist or not together
    const int n = image_of(panel), at = pixel_of(panel) + pixel;
    if (n >= s.n || at >= plane || c >= s.c_out) return make_uint4(0, 0, 0, 0);
    return get<uint4>(static_cast<const T*>(p.like) + n * p.y_stride.n + c * p.y_stride.c + at * p.y_stride.w);
  };
  if constexpr (LAST) {
    const int half = warp % 2, panel = warp / 2, c = tile.channel + half * 64;
    if (tile.part + panel >= plan.parts) return;
    statistics_of_columns<T, 8>(
        p, staging + half * HALF_BYTES, panel * 64, 0, c, tile.part + panel, lane,
        [&](int row) { return pixel_of(panel) + row < plane; },
        [&](int row, int chunk) { return like(panel, row, c + chunk * 8); });
  } else {
    if (tile.part >= plan.parts) return;
    const int row = warp * 32, c = tile.channel + row;
    statistics_of_rows<T, 32, 2>(
        p, staging, HALF_BYTES, row, c, tile.part, lane,
        [&](int panel, int chunk) { return image_of(panel) < s.n && pixel_of(panel) + chunk * 8 < plane ? 8 : 0; },
        [&](int r, int panel, int chunk) { return like(panel, chunk * 8, c + r); });
  }
}

// Shared memory: the ring, both groups' tiles on their way out, the mbarriers
struct Shared {
  unsigned char *ring, *stagings;
  uint64_t *full, *empty;

  __device__ __forceinline__ explicit Shared(unsigned char* unaligned)
      : ring(of_warp(unaligned + (-shared_address(unaligned) & 1023))),
        stagings(ring + Plan::kStages * Plan::kStageBytes),
        full(reinterpret_cast<uint64_t*>(stagings + Plan::kGroups * Plan::kOutBytes)),
        empty(full + Plan::kStages) {}
};

// One thread keeps the ring full, its part of the weight's in all blocks of the cluster.
template <bool LAST>
__device__ __forceinline__ void produce(const Maps& maps, const Plan& plan, const Shared& shared) {
  constexpr int X_AT = LAST ? 0 : Plan::kOperandBytes, WEIGHT_AT = Plan::kOperandBytes - X_AT;  // A, then B
  const int cluster = plan.cluster, rank = blockIdx.x % cluster;
  const unsigned all = (1u << cluster) - 1;
  Place at(0);
  for (int number = blockIdx.x; number < plan.tiles; number += gridDim.x) {
    const Tile tile(plan, number);
#pragma unroll 1
    for (int k = 0; k < plan.steps * Plan::kDepth; k += Plan::kDepth) {
      mbarrier_wait(shared.empty + at.stage, at.parity ^ 1);
      uint64_t* const full = shared.full + at.stage;
      unsigned char* const to = shared.ring + at.stage * Plan::kStageBytes;
      mbarrier_expect(full, Plan::kStageBytes);
      for (int i = rank; i < 2; i += cluster)
        load_tile<true>(to + WEIGHT_AT + i * PANEL_BYTES, maps.weight, k, tile.channel + i * 64, 0, full, all);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = LAST ? tile.pixel[i] : k, image = tile.image[i];
        load_tile(to + X_AT + i * PANEL_BYTES, maps.x, LAST ? k : tile.pixel[i], maps.x_images_second ? image : row,
                  maps.x_images_second ? row : image, full);
      }
      at.advance();
    }
  }
}

// The sums of tile number `turn` of this block: acc = A B
template <class T, bool LAST>
__device__ __forceinline__ void multiply(float (&acc)[2][64], const Plan& plan, const Shared& shared, int turn,
                                         bool is_last, int lane) {
  // B of planes: 16 along k are 16 of its rows, and 64 pixels are a panel
  constexpr int B_LEADING = LAST ? 16 : PANEL_BYTES, B_STEP = LAST ? 32 : 2 * EIGHT_ROWS;
  const uint32_t ring = shared_address(shared.ring);
  const uint64_t a_ring = operand(ring, 16, EIGHT_ROWS),
                 b_ring = operand(ring + Plan::kOperandBytes, B_LEADING, EIGHT_ROWS);
  Place at(turn * plan.steps);
  int before = 0;
  if (turn > 0) barrier_sync(kTurn + turn % Plan::kGroups, 2 * GROUP);
#pragma unroll 1
  for (int step = 0; step < plan.steps; ++step) {
    const uint32_t stage = of_warp(at.stage * (Plan::kStageBytes / 16));
    mbarrier_wait(shared.full + at.stage, at.parity);
    fence_products();
#pragma unroll
    for (int kk = 0; kk < Plan::kDepth / 16; ++kk)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        multiply_async<T, LAST>(acc[i], further(a_ring, stage + (i * 8 * EIGHT_ROWS + kk * 32) / 16),
                                further(b_ring, stage + kk * B_STEP / 16), step > 0 || kk > 0);
    commit_products();
    wait_for_products<1>();  // the step before this one
    if (step > 0 && lane < plan.cluster) mbarrier_arrive_in(shared.empty + before, lane);
    before = at.stage;
    at.advance();
  }
  if (!is_last) barrier_arrive(kTurn + (turn + 1) % Plan::kGroups, 2 * GROUP);
  wait_for_products<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) products_done(acc[i]);
  if (lane < plan.cluster) mbarrier_arrive_in(shared.empty + before, lane);
}

// One thread begins the stores of a group's tile.
template <bool LAST>
__device__ __forceinline__ void store(const Maps& maps, const Tile& tile, const unsigned char* staging) {
  const auto box = [&](const unsigned char* from, int first, int row, int image) {
    store_tile(from, maps.y, first, maps.y_images_second ? image : row, maps.y_images_second ? row : image);
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const unsigned char* const from = staging + half * HALF_BYTES;
    if constexpr (LAST) {
#pragma unroll
      for (int i = 0; i < 2; ++i) box(from + i * PANEL_BYTES, tile.channel + half * 64, tile.pixel[i], tile.image[i]);
    } else {
      box(from, tile.pixel[half], tile.channel, tile.image[half]);
    }
  }
  commit_stores();
}
#endif

template <class T, bool LAST>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    product_wgmma_kernel(const __grid_constant__ Maps maps, const __grid_constant__ ProductForward p,
                         const __grid_constant__ Plan plan) {
#if CMX_HAS_WGMMA
  CMX_DYNAMIC_SHARED(unaligned);
  const Shared shared(unaligned);
  const int thread = threadIdx.x % GROUP, group = of_warp(int(threadIdx.x / GROUP)), warp = thread / LANES,
            lane = thread % LANES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Plan::kStages; ++i)
      mbarrier_init(shared.full + i, 1), mbarrier_init(shared.empty + i, plan.cluster * GROUP / LANES);
    mbarrier_init_done();
  }
  cluster_sync();
  begin_chained();

  if (group == Plan::kGroups) {
    keep_registers<40>();
    if (thread == 0) produce<LAST>(maps, plan, shared);
    cluster_sync();  // the other block still writes here
  } else {
    take_registers<232>();
    unsigned char* const staging = shared.stagings + group * Plan::kOutBytes;
    const int grid = gridDim.x;
#pragma unroll 1
    for (int turn = group, number = blockIdx.x + group * grid; number < plan.tiles; turn += 2, number += 2 * grid) {
      float acc[2][64];
      multiply<T, LAST>(acc, plan, shared, turn, number + grid >= plan.tiles, lane);
      const Tile tile(plan, number);
      if (thread == 0) wait_for_stores_read();
      barrier_sync(kStaged + group, GROUP);  // the tile before this one is out
      finish<T, LAST>(acc, p, tile.channel, warp, lane, staging);
      show_to_copies();
      barrier_sync(kStaged + group, GROUP);  // this one is there
      if (thread == 0) store<LAST>(maps, tile, staging);
      if (p.partials) statistics<T, LAST>(p, plan, tile, warp, lane, staging);
    }
    if (thread == 0) wait_for_stores_read();  // shared memory must outlive them
    cluster_sync();
  }
#endif
}

template <class T, bool LAST>
cudaError_t launch_kernel(const ProductForward& p, const Plan& plan, cudaStream_t stream) {
  const int64_t k = p.shape.k(), c_out = p.shape.c_out;
  const TensorView x = tensor_view(p.shape, plan.layout, k, p.x_stride),
                   y = tensor_view(p.shape, plan.layout, c_out, p.y_stride),
                   weight{{k, c_out, 1}, {2 * k, 2 * k * c_out}, false};
  Maps maps{{}, {}, {}, x.images_second, y.images_second};
  for (const cudaError_t error :
       {encode_tensor_map(&maps.x, p.x, x.size, x.stride, Plan::kPanel, x.images_second),
        encode_tensor_map(&maps.weight, p.weight, weight.size, weight.stride, Plan::kTile / 2),
        encode_tensor_map(&maps.y, p.y, y.size, y.stride, LAST ? Plan::kPanel : Plan::kTile, y.images_second)})
    if (error) return error;
  const Launch how{plan.blocks, Plan::kThreads, Plan::kShared, stream, plan.cluster};
  return launch(product_wgmma_kernel<T, LAST>, how, maps, p, plan);
}

template <class T>
cudaError_t launch_layout(const ProductForward& p, const Plan& plan, cudaStream_t stream) {
  return plan.layout == ProductLayout::pixels ? launch_kernel<T, false>(p, plan, stream)
                                              : launch_kernel<T, true>(p, plan, stream);
}

}  // namespace

cudaError_t product_fwd_wgmma(const ProductForward& p, const WgmmaPlan& plan, cudaStream_t stream) {
  if (plan.blocks < 1) return cudaErrorInvalidValue;
  return p.shape.dtype == Dtype::bfloat16 ? launch_layout<bf16>(p, plan, stream) : launch_layout<fp16>(p, plan, stream);
}

#ifndef CMX_EMULATED
bool product_wgmma_runs() {
  static const bool answer = [] {
    constexpr int kEmpty = 64;  // registers: more than the kernel that is empty, compiled for anything but sm_90a
    cudaFuncAttributes attributes;
    const cudaError_t error = taken(cudaFuncGetAttributes(&attributes, product_wgmma_kernel<bf16, false>));
    return error == cudaSuccess && attributes.numRegs > kEmpty && tensor_map_encoder() != nullptr;
  }();
  return answer;
}
#endif

}  // namespace cmx
