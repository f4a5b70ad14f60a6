// Depthwise convolution on tensor cores for channels_last: any size and any kernel up to 31, bf16 and fp16.
// How: depthwise_mma.cuh.
//
// A block owns a few channels, 16 where they fit: all of a 32-byte sector of a pixel. It works through tiles of theirs:
// all threads bring the channels of pixels into one plane a channel in shared memory, each warp computes whole planes,
// and all threads carry the results out again. Global accesses go along the channels, those of shared memory along rows:
// a thread holds two neighbouring pixels and transposes 2 x BYTES / 2 numbers in registers. Several blocks of a
// multiprocessor hide each other's loads.
#include "depthwise_mma.cuh"

namespace cmx {
namespace {

// The channels of a pixel that one access moves
template <int BYTES>
struct Piece {
  static constexpr int CHANNELS = BYTES / 2;
  uint32_t word[BYTES < 4 ? 1 : BYTES / 4]{};
};

template <int BYTES>
__device__ __forceinline__ Piece<BYTES> get_piece(const void* from) {
  if constexpr (BYTES == 16) {
    const uint4 v = get<uint4>(from);
    return {{v.x, v.y, v.z, v.w}};
  } else if constexpr (BYTES == 8) {
    const uint2 v = get<uint2>(from);
    return {{v.x, v.y}};
  } else {
    return {{get<std::conditional_t<BYTES == 4, uint32_t, uint16_t>>(from)}};
  }
}

template <int BYTES>
__device__ __forceinline__ void put_piece(void* to, const Piece<BYTES>& piece) {
  const uint32_t* const v = piece.word;
  if constexpr (BYTES == 16)
    put(to, make_uint4(v[0], v[1], v[2], v[3]));
  else if constexpr (BYTES == 8)
    put(to, make_uint2(v[0], v[1]));
  else if constexpr (BYTES == 4)
    put(to, v[0]);
  else
    put(to, static_cast<uint16_t>(v[0]));
}

// A channel -> bytes to its plane. The channels of a piece and those of the next pieces lie in other banks, so that the
// words of a row's pixels of all of them are brought and carried out in one go (for pieces of 2 bytes, in two).
__device__ __forceinline__ int plane_at(int channel, const MmaPlan& plan) {
  return channel * plan.stage_bytes + channel / 2 * MmaPlan::kSkew;
}

// What a thread moves: a piece of every `pairs`-th pair of pixels of every `rows`-th row
struct Share {
  int piece, pair, row, pairs, rows;
};

template <int BYTES, int PAIRS>
__device__ __forceinline__ Share share(const MmaPlan& plan) {
  const int pieces = plan.channels / Piece<BYTES>::CHANNELS, threads = static_cast<int>(blockDim.x) / pieces;
  const int thread = static_cast<int>(threadIdx.x) / pieces, pairs = threads < PAIRS ? threads : PAIRS;
  return {static_cast<int>(threadIdx.x) % pieces, thread % pairs, thread / pairs, pairs, threads / pairs};
}

// x of `channels` channels under a tile -> their planes, zeros outside of the plane
template <class T, class G, int BYTES>
__device__ __forceinline__ void load(unsigned char* planes, const Where& at, const T* x, int channels,
                                     const DepthwiseForward& p, const MmaPlan& plan) {
  using Held = Piece<BYTES>;
  constexpr int PAIRS = 4 * G::BLOCKS, AT_ONCE = 4;  // pairs of pixels in a row of the tile; of a thread in flight
  const DepthwiseShape& s = p.shape;
  const Share mine = share<BYTES, PAIRS>(plan);
  const int c = mine.piece * Held::CHANNELS, top = at.y - (s.kh - 1) / 2;
  if (c >= channels || mine.row >= mine.rows) return;
#pragma unroll 1
  for (int pair = mine.pair; pair < G::IMAGES * PAIRS; pair += mine.pairs) {
    const int image = pair / PAIRS, n = at.n + image, column = at.x - G::LEFT + 2 * (pair - image * PAIRS);
    const bool left = n < s.n && column >= 0 && column < s.w, right = n < s.n && column + 1 >= 0 && column + 1 < s.w;
    const T* from = x + n * p.x_stride.n + (top + mine.row) * p.x_stride.h + column * p.x_stride.w + c;
    unsigned char* const to = planes + plane_at(c, plan) + image * 2 * plan.half_plane + 4 * (pair - image * PAIRS);
#pragma unroll 1
    for (int first = mine.row; first < plan.rows; first += AT_ONCE * mine.rows) {
      Held held[AT_ONCE][2];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i, from += mine.rows * p.x_stride.h) {
        const int r = first + i * mine.rows, y = top + r;
        const bool inside = r < plan.rows && y >= 0 && y < s.h;
        if (inside && left) held[i][0] = get_piece<BYTES>(from);
        if (inside && right) held[i][1] = get_piece<BYTES>(from + p.x_stride.w);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int r = first + i * mine.rows;
        if (r >= plan.rows) break;
        unsigned char* const words = to + row_offset(r, plan.half_plane, G::PITCH);
#pragma unroll
        for (int j = 0; j < Held::CHANNELS; ++j) {
          const uint32_t a = held[i][0].word[j / 2], b = held[i][1].word[j / 2];
          put(words + plane_at(j, plan), j % 2 ? halves<true>(a, b) : halves<false>(a, b));
        }
      }
    }
  }
}

// The results in the planes -> y
template <class T, class G, int BYTES>
__device__ __forceinline__ void store(T* y, const unsigned char* planes, const Where& at, int channels,
                                      const DepthwiseForward& p, const MmaPlan& plan) {
  using Held = Piece<BYTES>;
  constexpr int PAIRS = 4 * G::NT;
  const DepthwiseShape& s = p.shape;
  const Share mine = share<BYTES, PAIRS>(plan);
  const int c = mine.piece * Held::CHANNELS, rows = s.h - at.y < G::ROWS ? s.h - at.y : G::ROWS;
  if (c >= channels || mine.row >= mine.rows) return;
#pragma unroll 1
  for (int pair = mine.pair; pair < G::IMAGES * PAIRS; pair += mine.pairs) {
    const int image = pair / PAIRS, n = at.n + image, column = at.x + 2 * (pair - image * PAIRS);
    if (n >= s.n || column >= s.w) continue;
    T* to = y + n * p.y_stride.n + (at.y + mine.row) * p.y_stride.h + column * p.y_stride.w + c;
    const unsigned char* const from =
        planes + plane_at(c, plan) + image * 2 * plan.half_plane + 4 * (pair - image * PAIRS);
#pragma unroll 2
    for (int r = mine.row; r < rows; r += mine.rows, to += mine.rows * p.y_stride.h) {
      const unsigned char* const words = from + row_offset(r + (s.kh - 1) / 2, plan.half_plane, G::PITCH);
      Held held[2];
#pragma unroll
      for (int j = 0; j < Held::CHANNELS; j += 2) {
        const uint32_t a = get<uint32_t>(words + plane_at(j, plan));
        const uint32_t b = Held::CHANNELS > 1 ? get<uint32_t>(words + plane_at(j + 1, plan)) : 0u;
        held[0].word[j / 2] = halves<false>(a, b), held[1].word[j / 2] = halves<true>(a, b);
      }
      put_piece(to, held[0]);
      if (column + 1 < s.w) put_piece(to + p.y_stride.w, held[1]);
    }
  }
}

template <class T, int NT, int WINDOW>
__global__ void __launch_bounds__(32 * MmaPlan::kLastWarps, 2)
    depthwise_fwd_mma_last_kernel(const __grid_constant__ DepthwiseForward p, const __grid_constant__ MmaPlan plan) {
  using G = Tile<NT, WINDOW>;
  CMX_DYNAMIC_SHARED(shared);
  const DepthwiseShape& s = p.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int groups = (s.c + plan.channels - 1) / plan.channels, split = blockIdx.x / groups;
  const int c0 = (blockIdx.x - split * groups) * plan.channels;
  const int channels = s.c - c0 < plan.channels ? s.c - c0 : plan.channels;
  const int fragments = (s.kh + 1) / 2 * WINDOW * 32;  // of a channel's filter

  uint2* const filters = reinterpret_cast<uint2*>(shared);  // [channel][pair of filter rows][block][lane]
  unsigned char* const planes = shared + plan.channels * fragments * sizeof(uint2);
  begin_chained();
  for (int ch = warp; ch < channels; ch += warps)
    expand_filter<T, WINDOW, false>(filters + ch * fragments,
                                    static_cast<const T*>(p.weight) + int64_t(c0 + ch) * s.kh * s.kw, s.kh, s.kw, 0, 1,
                                    lane);

  for (int unit = split; unit < plan.units; unit += plan.splits) {
    const Where at = where(unit, plan, G::IMAGES, G::ROWS, G::ROWS);
    with_bytes(plan.load_bytes,
               [&]<int BYTES>() { load<T, G, BYTES>(planes, at, static_cast<const T*>(p.x) + c0, channels, p, plan); });
    __syncthreads();  // x is there
#pragma unroll 1
    for (int ch = warp; ch < channels; ch += warps) {
      const int c = c0 + ch;
      unsigned char* const tile = planes + plane_at(ch, plan);
      if (p.affine) {
        affine_on_tile<T, G>(tile, at, affine_of(p.affine, c, s.c), p, plan, lane);
        __syncwarp();
      }
      convolve_tile<T, G>(tile, filters + ch * fragments, constants_of(p, c), p, plan, lane);
      if (p.partials) {
        __syncwarp();
        RunningMoments moments;
        each_result<G>(tile, at, s, plan, lane, [&](const unsigned char* from, int, int, int x) {
          if (x < s.w) add_moments<T>(moments, get<uint4>(from), s.w - x, p.act);
        });
        store_moments(moments, p, unit, c, lane);
      }
    }
    __syncthreads();  // the results are there
    with_bytes(plan.store_bytes,
               [&]<int BYTES>() { store<T, G, BYTES>(static_cast<T*>(p.y) + c0, planes, at, channels, p, plan); });
    __syncthreads();  // the planes are free
  }
}

}  // namespace

cudaError_t depthwise_fwd_mma_last(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream) {
  if (!plan.blocks) return cudaErrorInvalidValue;
  return dispatch_tile(p, plan, [&]<class T, int NT, int WINDOW>() {
    return launch_mma(depthwise_fwd_mma_last_kernel<T, NT, WINDOW>, p, plan, stream);
  });
}

}  // namespace cmx
