// What the kernels of both depthwise gradients on tensor cores share: bringing da, act(x) and dx, by WARPS warps that own a tile.
#pragma once

#include "depthwise_mma.cuh"
#include "neighbours.cuh"

namespace cmx {

struct GradientSums {  // of a thread, over its tiles
  float da = 0, dx = 0, dx_centred = 0;
};

// Eight neighbours, of which the first `count` exist, zeros behind them, as they lie. WIDE: all or none, read at once.
template <bool WIDE, class T>
__device__ __forceinline__ uint4 load8(const T* from, int count) {
  if constexpr (WIDE) {
    return count > 0 ? get<uint4>(from) : make_uint4(0, 0, 0, 0);
  } else {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      word[i] = bits_or_zero(from + 2 * i, 2 * i < count) | bits_or_zero(from + 2 * i + 1, 2 * i + 1 < count) << 16;
    return make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// The tile's own rows, of one image or two, are 32: a warp moves 32 / NT of them at once, eight columns a lane.
struct Row {
  int image, row;
};

template <class G>
__device__ __forceinline__ Row own_row(int i) {
  return G::IMAGES == 2 ? Row{i / G::ROWS, i % G::ROWS} : Row{0, i};
}

// From column x on the rows of a tile, counted from the plane's row `from`
template <class T, class G>
struct Rows {
  T* first;
  const Strides& stride;

  __device__ __forceinline__ Rows(T* data, const Strides& strides, const Where& at, int c, int from, int x)
      : first(data + c * strides.c + at.n * strides.n + from * strides.h + x), stride(strides) {}
  __device__ __forceinline__ T* operator()(const Row& r) const {
    return first + (G::IMAGES == 2 ? r.image * stride.n : 0) + r.row * stride.h;
  }
};
template <class G, class T>
__device__ __forceinline__ Rows<T, G> rows_of(T* data, const Strides& strides, const Where& at, int c, int from,
                                              int x) {
  return {data, strides, at, c, from, x};
}

// Bytes from the start of act(x) to eight columns of a row
template <class G>
__device__ __forceinline__ int own_offset(const Row& r, int eight) {
  constexpr int HALF = G::ROWS / 2 * G::OWN_PITCH;
  return r.image * 2 * HALF + row_offset(r.row, HALF, G::OWN_PITCH) + 16 * eight;
}

// da of the tile and its halo, zeros outside of the plane; adds up the tile's own
template <class T, class G, int WARPS>
__device__ __forceinline__ void load_gradient(unsigned char* tile, float& sum, const Where& at,
                                              const DepthwiseGradients& p, const MmaPlan& plan, int c, int thread) {
  constexpr int AT_ONCE = 32 * WARPS / G::NT, STEPS = WARPS == 1 ? 2 : 1, LEFT = G::LEFT;
  const DepthwiseShape& s = p.shape;
  const GradientAffine affine = gradient_affine(p.coefficients, c, s.c);
  const int up = s.kh / 2, column = thread % G::NT * 8, x = at.x + column;
  const auto grad = rows_of<G>(static_cast<const T*>(p.grad), p.grad_stride, at, c, at.y - up, x);
  const auto a = rows_of<G>(static_cast<const T*>(p.a), p.a_stride, at, c, at.y - up, x);
  const int around = plan.rows - G::ROWS, rows = 32 + G::IMAGES * around;  // rows above and below; all
  const bool wide = plan.load_bytes == 16;
  const auto row_of_index = [&](int i) {  // the tile's own first
    if (i < 32) return Row{own_row<G>(i).image, own_row<G>(i).row + up};
    const int image = G::IMAGES == 2 && i - 32 >= around, row = i - 32 - image * around;
    return Row{image, row < up ? row : row + G::ROWS};
  };
  const auto inside = [&](const Row& r) {
    return at.n + r.image < s.n && at.y + r.row - up >= 0 && at.y + r.row - up < s.h;
  };
  const auto place = [&](const Row& r) {
    return tile + r.image * 2 * plan.half_plane + row_offset(r.row, plan.half_plane, G::PITCH);
  };
  const int loaded = plan.tiles_y == 1 ? 32 : rows;  // what is left lies outside of the plane
#pragma unroll 1
  for (int i = 32 + thread / G::NT; loaded == 32 && i < rows; i += AT_ONCE) {
    unsigned char* const to = place(row_of_index(i)) + 2 * (LEFT + column);
    put(to, make_uint2(0, 0)), put(to + 8, make_uint2(0, 0));
  }
#pragma unroll 1
  for (int i = thread / G::NT; i < loaded; i += STEPS * AT_ONCE) {
    uint4 grads[STEPS], pre[STEPS];
    const auto load = [&]<bool WIDE>() {
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const Row r = row_of_index(i + step * AT_ONCE);
        const int count = inside(r) ? s.w - x : 0;
        grads[step] = load8<WIDE>(grad(r), count), pre[step] = load8<WIDE>(a(r), count);
      }
    };
    wide ? load.template operator()<true>() : load.template operator()<false>();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const Row r = row_of_index(i + step * AT_ONCE);
      unsigned char* const to = place(r) + 2 * (LEFT + column);
      const uint2 grad_words[2] = {{grads[step].x, grads[step].y}, {grads[step].z, grads[step].w}};
      const uint2 pre_words[2] = {{pre[step].x, pre[step].y}, {pre[step].z, pre[step].w}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // or registers spill
        float v[4] = {}, other[4];
        if (inside(r) && x < s.w) {
          unpack4<T>(v, grad_words[half]), unpack4<T>(other, pre_words[half]);
          through_activation<4>(v, other, affine, p.act);
          if (!wide)
#pragma unroll
            for (int j = 0; j < 4; ++j) v[j] = x + 4 * half + j < s.w ? v[j] : 0.f;
        }
        if (i + step * AT_ONCE < 32) sum += (v[0] + v[1]) + (v[2] + v[3]);
        if (i + step * AT_ONCE < rows) put(to + 8 * half, make_uint2(pack<T>(v[0], v[1]), pack<T>(v[2], v[3])));
      }
    }
  }
  constexpr int FOURS = G::LEFT / 4;  // columns to the left and as many to the right, by four
#pragma unroll 1
  for (int i = thread; i < 2 * FOURS * G::IMAGES * plan.rows; i += 32 * WARPS) {
    const int image = G::IMAGES == 2 && i >= 2 * FOURS * plan.rows, four = i % (2 * FOURS);
    const Row r{image, i / (2 * FOURS) - image * plan.rows};
    const int side = 4 * four + (four < FOURS ? 0 : 8 * G::NT), first = at.x + side - LEFT;
    float v[4] = {}, other[4];
    if (inside(r) && first >= 0 && first < s.w) {
      load_or_zeros<4>(v, grad(r) - x, 1, first, s.w, true, false);
      load_or_zeros<4>(other, a(r) - x, 1, first, s.w, true, false);
      through_activation<4>(v, other, affine, p.act);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = first + j < s.w ? v[j] : 0.f;
    }
    put(place(r) + 2 * side, make_uint2(pack<T>(v[0], v[1]), pack<T>(v[2], v[3])));
  }
}

// act(x) of the tile, or x where there is no affine; zeros outside of the plane, which every activation keeps
template <class T, class G, int WARPS>
__device__ __forceinline__ void load_input(unsigned char* input, const Where& at, const DepthwiseGradients& p,
                                           const MmaPlan& plan, int c, int thread) {
  constexpr int STEPS = G::NT < WARPS ? 1 : G::NT / WARPS;
  const DepthwiseShape& s = p.shape;
  if (WARPS > G::NT && thread >= 32 * G::NT) return;
  const int x = at.x + thread % G::NT * 8;
  const auto from = rows_of<G>(static_cast<const T*>(p.x), p.x_stride, at, c, at.y, x);
  const auto own = [&](int step) { return own_row<G>(thread / G::NT + step * 32 / G::NT); };
  uint4 words[STEPS];
  const auto load = [&]<bool WIDE>() {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const Row r = own(step);
      words[step] = load8<WIDE>(from(r), at.n + r.image < s.n && at.y + r.row < s.h ? s.w - x : 0);
    }
  };
  plan.load_bytes == 16 ? load.template operator()<true>() : load.template operator()<false>();
#pragma unroll
  for (int step = 0; step < STEPS; ++step) put(input + own_offset<G>(own(step), thread % G::NT), words[step]);
  if (!p.affine) return;
#pragma unroll 1  // the code is already long
  for (int step = 0; step < STEPS; ++step) {
    unsigned char* const place = input + own_offset<G>(own(step), thread % G::NT);
    float v[8];
    unpack8<T>(v, get<uint4>(place));
    activate<T, 8>(v, p.act);
    put(place, make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])));
  }
}

// dx of the tile: the results [image][S(m) or S(m) + 2][column] in float32, and what the residual connection adds
template <class T, class G, int WARPS>
__device__ __forceinline__ void store_results(const unsigned char* results, const unsigned char* input,
                                              GradientSums& sums, const Where& at, const DepthwiseGradients& p,
                                              const MmaPlan& plan, int c, int thread) {
  constexpr int AT_ONCE = 32 * WARPS / G::NT, STEPS = WARPS == 1 ? 2 : 1;
  const DepthwiseShape& s = p.shape;
  const float mean = p.affine ? p.affine[c] : 0.f;
  const int column = thread % G::NT * 8, x = at.x + column;
  const auto grad = rows_of<G>(static_cast<const T*>(p.grad), p.grad_stride, at, c, at.y, x);
  const auto dx = rows_of<G>(static_cast<T*>(p.dx), p.dx_stride, at, c, at.y, 0);
  const bool wide = plan.load_bytes == 16;
  const auto inside = [&](const Row& r) { return at.n + r.image < s.n && at.y + r.row < s.h && x < s.w; };
#pragma unroll 1
  for (int i = thread / G::NT; i < 32; i += STEPS * AT_ONCE) {
    uint4 grads[STEPS];
    const auto load = [&]<bool WIDE>() {
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const Row r = own_row<G>(i + step * AT_ONCE);
        grads[step] = load8<WIDE>(grad(r), p.residual && inside(r) ? s.w - x : 0);
      }
    };
    wide ? load.template operator()<true>() : load.template operator()<false>();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const Row r = own_row<G>(i + step * AT_ONCE);
      if (!inside(r)) continue;
      const auto* const result = reinterpret_cast<const float*>(
          results + r.image * 8 * G::RESULT_PITCH + row_offset(r.row, 16 * G::RESULT_PITCH, G::RESULT_PITCH));
      float v[8], other[8];
      load4(v, result + column), load4(v + 4, result + column + 4);
      unpack8<T>(other, grads[step]);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] += other[j];
      const uint4 words =
          make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
      store8_words(dx(r), x, s.w, words, plan.store_bytes);
      if (!p.affine) continue;
      unpack8<T>(v, words), unpack8<T>(other, get<uint4>(input + own_offset<G>(r, thread % G::NT)));
      if (!wide)
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = x + j < s.w ? v[j] : 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) sums.dx += v[j], sums.dx_centred = fmaf(v[j], other[j] - mean, sums.dx_centred);
    }
  }
}

// Columns of act(x) or x' for products, of the rows S(m) and S(m) + 2, by ldmatrix.trans; from: this lane's row
template <class G>
__device__ __forceinline__ void load_columns(uint32_t (&in)[2][G::NT][2], uint32_t from) {
  constexpr int HALF = G::ROWS / 2 * G::OWN_PITCH;
#pragma unroll
  for (int set = 0; set < 2; ++set)
#pragma unroll
    for (int i = 0; i < G::NT; i += 2) {
      uint32_t two[4];
      load_matrices<true>(two, from + set * HALF + 16 * i);
      in[set][i][0] = two[0], in[set][i][1] = two[1], in[set][i + 1][0] = two[2], in[set][i + 1][1] = two[3];
    }
}

// What the next tile reads, from memory into L2: one row and 32 columns a lane
template <class T, class G>
__device__ __forceinline__ void prefetch(const Where& at, const DepthwiseGradients& p, int c, int lane) {
  const int n = at.n + lane / G::ROWS, y = at.y + lane % G::ROWS;
  if (n >= p.shape.n || y >= p.shape.h) return;
  const auto row = [&](const void* data, const Strides& s) {
    prefetch_to_l2(static_cast<const T*>(data) + n * s.n + c * s.c + y * s.h + at.x);
  };
  row(p.grad, p.grad_stride), row(p.a, p.a_stride), row(p.x, p.x_stride);
}

}  // namespace cmx
