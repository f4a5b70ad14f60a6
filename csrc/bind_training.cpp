// The operators of training on the CPU (cmx_kernels/ops/training.py has their formulas): checks, allocation, launches,
// and the sums of the pieces, in double and in a fixed order.
#include "bind_batchnorm.h"
#include "bind_memory.h"

namespace cmx {
namespace {

// Rows of float32 vectors of channels, padded with zeros to whole blocks
struct Table {
  std::vector<float> data;
  int64_t padded;

  Table(const Optional& t, int64_t rows, int64_t channels, const char* name)
      : padded(round_up(channels, cpu_kernels().lanes)) {
    if (!t) return;
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->size(0) == rows &&
                        t->size(1) == channels,
                    name, ": got shape ", shape_of(*t), ", wanted float32 [", rows, ", ", channels, "] on the CPU");
    const Tensor dense_rows = dense(*t);
    const float* from = (const float*)dense_rows.const_data_ptr();
    data.resize(rows * padded);
    for (int64_t r = 0; r < rows; r++) std::copy_n(from + r * channels, channels, data.begin() + r * padded);
  }
  const float* get() const { return data.empty() ? nullptr : data.data(); }
};

std::vector<float> padded_vector(const Optional& v, const char* name, int64_t channels) {
  const std::vector<double> found = values(v, name, channels, 0);
  std::vector<float> out(round_up(channels, cpu_kernels().lanes));
  std::copy(found.begin(), found.end(), out.begin());
  return out;
}

void check_like(const Tensor& t, const Tensor& x, const char* name, int64_t c, int64_t h, int64_t w) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && t.scalar_type() == x.scalar_type() && t.size(0) == x.size(0) &&
                      t.size(1) == c && t.size(2) == h && t.size(3) == w,
                  name, ": got shape ", shape_of(t), ", wanted [", x.size(0), ", ", c, ", ", h, ", ", w,
                  "] on the CPU, in x's dtype");
}

void check_training(const Tensor& x) {
  check_activations(x);
  STD_TORCH_CHECK(x.numel() > 0, "x: got shape ", shape_of(x), ", wanted at least one pixel to train on");
}

// All pixels of an image as one row; the memory of what has gaps between its rows is copied, and held by `keep`.
struct Pixels {
  Tensor keep;
  View view;
  Pixels(const Tensor& t, const char* name) : keep(t), view(view_of(t, name)) {
    if (view.sh != view.w * view.sw) keep = torch::stable::contiguous(t), view = view_of(keep, name);
    view.w *= view.h, view.h = 1;
  }
};

constexpr int64_t kMostLanes = 16;

Tensor floats(std::vector<int64_t> shape) { return torch::stable::empty(shape, ScalarType::Float); }
float* data(const Tensor& t) { return (float*)t.mutable_data_ptr(); }

// [2, C] mean and biased variance out of pieces with their own means: var = sum(M2_i + n_i (mean_i - mean)^2) / n
//
// at(i, block) is piece i of a block of channels, over pixels(i) pixels.
template <class At, class PixelsOf>
Tensor combine_moments(int64_t count, int64_t channels, const At& at, const PixelsOf& pixels) {
  const int64_t lanes = cpu_kernels().lanes;
  Tensor out = floats({2, channels});
  torch::stable::parallel_for(0, ceil_div(channels, lanes), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      double mean[kMostLanes] = {}, squares[kMostLanes] = {}, total = 0;
      auto mean_of = [&](const float* piece, int64_t lane) {
        return (double)piece[kOrigin * lanes + lane] + piece[kOffset * lanes + lane];
      };
      for (int64_t i = 0; i < count; i++) {
        const float* piece = at(i, block);
        const double n = pixels(i);
        for (int64_t lane = 0; lane < lanes; lane++) mean[lane] += mean_of(piece, lane) * n;
        total += n;
      }
      for (int64_t lane = 0; lane < lanes; lane++) mean[lane] /= total;
      for (int64_t i = 0; i < count; i++) {
        const float* piece = at(i, block);
        const double n = pixels(i);
        for (int64_t lane = 0; lane < lanes; lane++) {
          const double off = mean_of(piece, lane) - mean[lane];
          squares[lane] += piece[kSquares * lanes + lane] + n * off * off;
        }
      }
      for (int64_t lane = 0; lane < std::min(lanes, channels - block * lanes); lane++) {
        data(out)[block * lanes + lane] = mean[lane];
        data(out)[channels + block * lanes + lane] = squares[lane] / total;
      }
    }
  });
  return out;
}

// out[row][channel] = sum over i of pieces[i][block][row][lane]
void add_pieces(const float* pieces, int64_t count, int64_t rows, int64_t channels, float* out, int64_t row_step,
                int64_t channel_step) {
  const int64_t lanes = cpu_kernels().lanes, blocks = ceil_div(channels, lanes);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++)
      for (int64_t row = 0; row < rows; row++) {
        double sum[kMostLanes] = {};
        for (int64_t i = 0; i < count; i++)
          for (int64_t lane = 0; lane < lanes; lane++)
            sum[lane] += pieces[((i * blocks + block) * rows + row) * lanes + lane];
        for (int64_t lane = 0; lane < std::min(lanes, channels - block * lanes); lane++)
          out[row * row_step + (block * lanes + lane) * channel_step] = sum[lane];
      }
  });
}

// ---- depthwise

Tensor packed_as_float(const Tensor& weight) {
  const Tensor w = dense(torch::stable::to(weight, ScalarType::Float));
  return packed_depthwise(weight_view(w, w.size(2), w.size(3), "weight"));
}

// The filter turned by half a turn. A zero behind it makes an even size odd: "same" padding then is that of the gradient.
Tensor packed_turned(const Tensor& weight) {
  const Tensor w = dense(torch::stable::to(weight, ScalarType::Float));
  const int64_t c = w.size(0), kh = w.size(2), kw = w.size(3), rows = kh | 1, columns = kw | 1;
  Tensor turned = floats({c, 1, rows, columns});
  std::fill_n(data(turned), turned.numel(), 0.f);
  const float* from = (const float*)w.const_data_ptr();
  for (int64_t i = 0; i < c; i++)
    for (int64_t y = 0; y < kh; y++)
      for (int64_t x = 0; x < kw; x++)
        data(turned)[(i * rows + kh - 1 - y) * columns + kw - 1 - x] = from[(i * kh + y) * kw + x];
  return packed_depthwise(weight_view(turned, rows, columns, "weight"));
}

void check_depthwise(const Tensor& x, const Tensor& weight) {
  check_training(x);
  check_weight(x, weight,
               weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 && weight.size(2) >= 1 &&
                   weight.size(3) >= 1 && weight.size(2) <= kMaxKernel && weight.size(3) <= kMaxKernel,
               "[C, 1, kh, kw], 1 to 31 on each side");
}

std::tuple<Tensor, Tensor> depthwise_train(const Tensor& x, const Optional& affine, const Tensor& weight,
                                           const Optional& bias, std::string act) {
  check_depthwise(x, weight);
  const CpuKernels& k = cpu_kernels();
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), blocks = ceil_div(c, k.lanes);
  const Table rows(affine, 3, c, "affine");
  const std::vector<float> b = padded_vector(bias, "bias", c);
  const Tensor packed = packed_as_float(weight), a = output_like(x, c, h, w);
  const Tensor pieces = kept_floats(n * blocks * h * kMomentPieces * k.lanes);
  DepthwiseTrain s{{view_of(x, "x"), rows.get()},
                   view_of(a, "a"),
                   act_of(act),
                   packed.const_data_ptr(),
                   b.data(),
                   weight.size(2),
                   weight.size(3),
                   0,
                   data(pieces)};
  s.rows = band_rows(n * blocks, h, l2_bytes() / 4 / (w * k.lanes * 4) + s.kh);
  const int64_t bands = ceil_div(h, s.rows);
  run(n * blocks * bands, k.depthwise_train_scratch_bytes(s), [&](int64_t task, char* scratch) {
    k.depthwise_train_band(s, task / bands / blocks, task / bands % blocks, task % bands * s.rows, scratch);
  });
  auto piece = [&](int64_t i, int64_t block) {
    return s.moments + ((i / h * blocks + block) * h + i % h) * kMomentPieces * k.lanes;
  };
  return {a, combine_moments(n * h, c, piece, [&](int64_t) { return w; })};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_backward(const Tensor& grad, const Tensor& a,
                                                              const Tensor& coefficients, const Tensor& x,
                                                              const Optional& affine, const Tensor& weight,
                                                              std::string act, bool residual, bool need_input,
                                                              bool need_weight) {
  check_depthwise(x, weight);
  const CpuKernels& k = cpu_kernels();
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), blocks = ceil_div(c, k.lanes);
  const int64_t kh = weight.size(2), kw = weight.size(3), lanes = k.lanes;
  check_like(a, x, "a", c, h, w);
  check_like(grad, x, "grad", c, h, w);
  const Table rows(affine, 3, c, "affine"), terms(coefficients, 4, c, "coefficients");
  const Tensor nothing = floats({0});
  const Tensor dx = need_input ? output_like(x, c, h, w) : torch::stable::empty({0}, x.scalar_type());
  const Tensor turned = need_input ? packed_turned(weight) : floats({0});
  const Tensor sums = floats({n * blocks * kSumPieces * lanes}), dbias = floats({n * blocks * lanes}),
               dweight = kept_floats(need_weight ? n * blocks * kh * kw * lanes : 0);
  DepthwiseBackward s{};
  s.out = {view_of(grad, "grad"), view_of(a, "a"), terms.get()};
  s.in = {view_of(x, "x"), rows.get()};
  s.dx = need_input ? view_of(dx, "dx") : s.in.x;
  s.act = act_of(act);
  s.flipped = turned.const_data_ptr();
  s.kh = kh, s.kw = kw;
  s.rows = std::max(std::min<int64_t>(h, 8), std::min(h, l2_bytes() / 4 / ((w + kw) * lanes * 4)));
  s.residual = residual, s.need_input = need_input, s.need_weight = need_weight;
  s.sums = data(sums), s.dbias = data(dbias), s.dweight = data(dweight);
  run(n * blocks, k.depthwise_backward_scratch_bytes(s),
      [&](int64_t task, char* scratch) { k.depthwise_backward_plane(s, task / blocks, task % blocks, scratch); });
  const bool with_sums = need_input && affine;
  const Tensor total = with_sums ? floats({2, c}) : floats({0}), db = need_weight ? floats({c}) : floats({0}),
               dw = need_weight ? floats({c, 1, kh, kw}) : floats({0});
  if (with_sums) add_pieces(s.sums, n, kSumPieces, c, data(total), c, 1);
  if (need_weight) {
    add_pieces(s.dbias, n, 1, c, data(db), 0, 1);
    add_pieces(s.dweight, n, kh * kw, c, data(dw), 1, kh * kw);
  }
  return {dx, dw, db, total};
}

// ---- products

// Pixels of a chunk: a panel takes half of L2, in tiles of 6 pixels and whole steps. Independent of the threads.
int64_t chunk_pixels(Dtype dtype, int64_t channels, int64_t pixels) {
  const int64_t fit = std::max<int64_t>(48, l2_bytes() / 2 / (channels * 4) / 48 * 48);
  return round_up(ceil_div(pixels, ceil_div(pixels, fit)), cpu_kernels().chunk_step(dtype));
}

struct Input {
  std::optional<Pixels> x, skip;
  Table rows, skip_rows;
  ProductInput params{};

  Input(const Tensor& given, const Optional& affine, const Optional& given_skip, const Optional& skip_affine)
      : rows(affine, 3, given.size(1), "affine"), skip_rows(skip_affine, 3, given.size(1), "skip_affine") {
    x.emplace(given, "x");
    params.in = {x->view, rows.get()};
    params.channels = given.size(1);
    if (!given_skip) return;
    check_like(*given_skip, given, "skip", given.size(1), given.size(2), given.size(3));
    skip.emplace(*given_skip, "skip");
    params.skip = {skip->view, skip_rows.get()};
  }
  Input(const Tensor& image, int64_t ph, int64_t pw)
      : rows({}, 3, image.size(1), "affine"), skip_rows({}, 3, image.size(1), "affine") {
    params.image = view_of(image, "x");
    params.ph = ph, params.pw = pw, params.columns = image.size(3) / pw;
    params.channels = image.size(1) * ph * pw;
  }
};

std::tuple<Tensor, Tensor> product_train(const Tensor& x, const Input& in, const Tensor& weight, const Optional& bias,
                                         const std::string& act, int64_t h, int64_t w) {
  const CpuKernels& k = cpu_kernels();
  const int64_t n = x.size(0), c = weight.size(0), pixels = h * w, lanes = k.lanes, blocks = ceil_div(c, lanes);
  const Tensor dense_weight = dense(weight), a = output_like(x, c, h, w);
  const Tensor packed = packed_pointwise(weight_view(dense_weight, 1, in.params.channels, "weight"));
  const std::vector<float> b = padded_vector(bias, "bias", c);
  const Pixels flat(a, "a");
  const int64_t chunk = chunk_pixels(flat.view.dtype, std::max(c, in.params.channels), pixels),
                chunks = ceil_div(pixels, chunk);
  const Tensor pieces = kept_floats(n * chunks * blocks * kMomentPieces * lanes);
  const ProductTrain s{in.params, flat.view, act_of(act), packed.const_data_ptr(), b.data(), chunk, data(pieces)};
  run(n * chunks, k.product_scratch_bytes(s.a.dtype, chunk, in.params.channels, c),
      [&](int64_t task, char* scratch) { k.product_train_chunk(s, task / chunks, task % chunks * chunk, scratch); });
  auto piece = [&](int64_t i, int64_t block) { return s.moments + (i * blocks + block) * kMomentPieces * lanes; };
  return {a, combine_moments(n * chunks, c, piece,
                             [&](int64_t i) { return std::min(chunk, pixels - i % chunks * chunk); })};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> product_backward(const Tensor& grad, const Tensor& a,
                                                            const Tensor& coefficients, const Tensor& x,
                                                            const Input& in, const Tensor& weight,
                                                            const std::string& act, bool need_input, bool need_weight) {
  const CpuKernels& k = cpu_kernels();
  const int64_t n = x.size(0), c = weight.size(0), channels = in.params.channels, lanes = k.lanes;
  const Pixels out(a, "a"), out_grad(grad, "grad");
  const int64_t pixels = out.view.w, blocks = ceil_div(channels, lanes), c_blocks = ceil_div(c, lanes);
  const Table terms(coefficients, 4, c, "coefficients");
  const Tensor nothing = floats({0}), dense_weight = dense(weight);
  Tensor dx = torch::stable::empty({0}, x.scalar_type());
  if (need_input) dx = output_like(x, channels, a.size(2), a.size(3));
  ProductBackward s{};
  s.out = {out_grad.view, out.view, terms.get()};
  s.in = in.params;
  s.act = act_of(act);
  s.need_input = need_input, s.need_weight = need_weight;
  s.chunk = chunk_pixels(out.view.dtype, std::max(c, channels), pixels);
  std::optional<Pixels> flat;
  Tensor transposed = nothing;
  if (need_input) {
    flat.emplace(dx, "dx");
    s.dx = flat->view;
    View turned = weight_view(dense_weight, 1, channels, "weight");  // [channels][c]
    turned.c = channels, turned.w = c, turned.sc = 1, turned.sw = channels;
    transposed = packed_pointwise(turned);
    s.transposed = transposed.const_data_ptr();
  }
  // Chunks in groups, which the weight gradient takes one after the other; their size follows the problem alone.
  const int64_t chunks = ceil_div(pixels, s.chunk), tasks = n * chunks;
  const int64_t group = std::min(tasks, std::max<int64_t>(1, (n * pixels < 16384 ? 1024 : 4096) / s.chunk));
  s.pixels = need_weight ? group * s.chunk : 0;
  const Tensor da = kept_bytes(need_weight ? k.group_da_bytes(s.out.a.dtype, s.pixels, c) : 0);
  const Tensor panel = kept_bytes(need_weight ? k.group_input_bytes(s.out.a.dtype, s.pixels, channels) : 0);
  s.da = aligned(da), s.panel = aligned(panel);
  const Tensor wide = floats({need_weight ? c * round_up(channels, lanes) : 0});
  std::fill_n(data(wide), wide.numel(), 0.f);
  s.dweight = data(wide);
  const Tensor sums = floats({tasks * blocks * kSumPieces * lanes}), dbias = floats({tasks * c_blocks * lanes});
  for (int64_t first = 0; first < tasks; first += group) {
    const int64_t count = std::min(group, tasks - first);
    s.pixels = need_weight ? count * s.chunk : 0;
    run(count, k.product_scratch_bytes(s.out.a.dtype, s.chunk, channels, c), [&](int64_t task, char* scratch) {
      const int64_t i = first + task;
      ProductBackward mine = s;
      mine.sums = data(sums) + i * blocks * kSumPieces * lanes;
      mine.dbias = data(dbias) + i * c_blocks * lanes;
      k.product_backward_chunk(mine, i / chunks, i % chunks * s.chunk, task * s.chunk, scratch);
    });
    const int64_t step = 48;  // rows of the weight at a time
    if (need_weight)
      run(ceil_div(c, step), 0,
          [&](int64_t task, char*) { k.weight_gradient(s, task * step, std::min(step, c - task * step)); });
  }
  const bool with_sums = need_input && in.params.in.rows;
  const Tensor total = with_sums ? floats({2, channels}) : floats({0}), db = need_weight ? floats({c}) : floats({0});
  if (with_sums) add_pieces(data(sums), tasks, kSumPieces, channels, data(total), channels, 1);
  Tensor dw = floats({0});
  if (need_weight) {
    add_pieces(data(dbias), tasks, 1, c, data(db), 0, 1);
    dw = floats({c, weight.size(1), weight.size(2), weight.size(3)});
    for (int64_t row = 0; row < c; row++)
      std::copy_n(data(wide) + row * round_up(channels, lanes), channels, data(dw) + row * channels);
  }
  return {dx, dw, db, total};
}

void check_pointwise(const Tensor& x, const Tensor& weight) {
  check_training(x);
  check_weight(x, weight,
               weight.dim() == 4 && weight.size(0) >= 1 && weight.size(1) == x.size(1) && weight.size(2) == 1 &&
                   weight.size(3) == 1,
               "[C, Cin, 1, 1]");
}

std::tuple<Tensor, Tensor> pointwise_train(const Tensor& x, const Optional& affine, const Optional& skip,
                                           const Optional& skip_affine, const Tensor& weight, const Optional& bias,
                                           std::string act) {
  check_pointwise(x, weight);
  return product_train(x, Input(x, affine, skip, skip_affine), weight, bias, act, x.size(2), x.size(3));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pointwise_backward(const Tensor& grad, const Tensor& a,
                                                              const Tensor& coefficients, const Tensor& x,
                                                              const Optional& affine, const Optional& skip,
                                                              const Optional& skip_affine, const Tensor& weight,
                                                              std::string act, bool need_input, bool need_weight) {
  check_pointwise(x, weight);
  check_like(a, x, "a", weight.size(0), x.size(2), x.size(3));
  check_like(grad, x, "grad", weight.size(0), x.size(2), x.size(3));
  const Input in(x, affine, skip, skip_affine);
  return product_backward(grad, a, coefficients, x, in, weight, act, need_input, need_weight);
}

void check_patches(const Tensor& x, const Tensor& weight) {
  check_training(x);
  const bool fits = weight.dim() == 4 && weight.size(0) >= 1 && weight.size(1) == x.size(1) && weight.size(2) >= 1 &&
                    weight.size(3) >= 1 && weight.size(2) <= x.size(2) && weight.size(3) <= x.size(3);
  check_weight(x, weight, fits, "[C, Cin, p, q], a patch no larger than the image");
}

std::tuple<Tensor, Tensor> patch_embed_train(const Tensor& x, const Tensor& weight, const Optional& bias,
                                             std::string act) {
  check_patches(x, weight);
  const int64_t p = weight.size(2), q = weight.size(3);
  return product_train(x, Input(x, p, q), weight, bias, act, x.size(2) / p, x.size(3) / q);
}

// The gradient of the patches [n, c * p * q, h, w] as that of the image; zero where no patch was
Tensor folded(const Tensor& patches, const Tensor& x, int64_t p, int64_t q) {
  const Tensor from = dense(patches), out = output_like(x, x.size(1), x.size(2), x.size(3));
  const int64_t size = x.element_size(), c = x.size(1), h = from.size(2), w = from.size(3);
  const auto step = out.strides();
  char* const to = (char*)out.mutable_data_ptr();
  const char* const source = (const char*)from.const_data_ptr();
  memset(to, 0, out.numel() * size);
  torch::stable::parallel_for(0, x.size(0) * c, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; plane++)
      for (int64_t i = 0; i < p * q; i++)
        for (int64_t y = 0; y < h; y++)
          for (int64_t z = 0; z < w; z++)
            memcpy(to + (plane / c * step[0] + plane % c * step[1] + (y * p + i / q) * step[2] +
                         (z * q + i % q) * step[3]) *
                            size,
                   source + (((plane * p * q + i) * h + y) * w + z) * size, size);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> patch_embed_backward(const Tensor& grad, const Tensor& a,
                                                                const Tensor& coefficients, const Tensor& x,
                                                                const Tensor& weight, std::string act, bool need_input,
                                                                bool need_weight) {
  check_patches(x, weight);
  const int64_t p = weight.size(2), q = weight.size(3);
  check_like(a, x, "a", weight.size(0), x.size(2) / p, x.size(3) / q);
  check_like(grad, x, "grad", weight.size(0), x.size(2) / p, x.size(3) / q);
  auto [dx, dw, db, sums] =
      product_backward(grad, a, coefficients, x, Input(x, p, q), weight, act, need_input, need_weight);
  return {need_input ? folded(dx, x, p, q) : dx, dw, db, sums};
}

// ---- BatchNorm: too few numbers for threads

constexpr auto each_channel = [](const auto& p) {
  for (int64_t i = 0; i < p.c; i++) p.channel(i);
};

Three batchnorm_rows_cpu(const Tensor& moments, const Optional& gamma, const Optional& beta, double eps,
                         int64_t count) {
  return batchnorm_rows(moments, gamma, beta, eps, count, each_channel);
}

Three batchnorm_gradients_cpu(const Tensor& sums, const Tensor& rows, const Tensor& rstd, int64_t count, bool fixed) {
  return batchnorm_gradients(sums, rows, rstd, count, fixed, each_channel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cmx, CPU, m) {
  m.impl("depthwise_block_train", TORCH_BOX(&depthwise_train));
  m.impl("depthwise_block_backward", TORCH_BOX(&depthwise_backward));
  m.impl("pointwise_block_train", TORCH_BOX(&pointwise_train));
  m.impl("pointwise_block_backward", TORCH_BOX(&pointwise_backward));
  m.impl("patch_embed_train", TORCH_BOX(&patch_embed_train));
  m.impl("patch_embed_backward", TORCH_BOX(&patch_embed_backward));
  m.impl("batchnorm_rows", TORCH_BOX(&batchnorm_rows_cpu));
  m.impl("batchnorm_gradients", TORCH_BOX(&batchnorm_gradients_cpu));
}

void release_memory() { KeptMemory::of_process().release(); }

}  // namespace cmx
