// The operators behind torch's stable ABI: checks, allocation, a params struct, a launch. Only bind*.{h,cpp} know torch.
// Schemas are defined in Python (cmx_kernels/registry.py); the checks here keep a direct call from touching wrong memory.
#include "bind_memory.h"
#include "bind_stage.h"
#include "direct.h"

namespace cmx {

Tensor packed_pointwise(const View& weight) {
  const CpuKernels& k = cpu_kernels();
  const bool pairs = k.bf16_products && weight.dtype == Dtype::bfloat16;
  const int64_t size = k.packed_pointwise_bytes(weight.dtype, weight.c, weight.w) / (pairs ? 2 : 4);
  Tensor out = torch::stable::empty({size}, pairs ? ScalarType::BFloat16 : ScalarType::Float);
  void* const to = out.mutable_data_ptr();
  run(ceil_div(weight.c, k.tile_channels), 0, [&](int64_t panel, char*) { k.pack_pointwise(weight, panel, to); });
  return out;
}

Tensor packed_depthwise(const View& weight) {
  const CpuKernels& k = cpu_kernels();
  const int64_t size = k.packed_depthwise_bytes(weight.dtype, weight.c, weight.h, weight.w) / 4;
  Tensor out = torch::stable::empty({size}, ScalarType::Float);
  void* const to = out.mutable_data_ptr();
  run(ceil_div(weight.c, k.lanes), 0, [&](int64_t block, char*) { k.pack_depthwise(weight, block, to); });
  return out;
}

namespace {

// Products of a stack: a weight packed once, activations that nobody sees
Form form_of(Dtype dtype, int64_t c_out, int64_t c_in) {
  return cpu_kernels().stack_form(dtype, c_out, c_in, strassen_allowed());
}

int64_t packed_product_bytes(Dtype dtype, int64_t c_out, int64_t c_in) {
  return cpu_kernels().packed_stack_bytes(form_of(dtype, c_out, c_in), dtype, c_out, c_in);
}

Tensor packed_product(const View& weight) {
  const CpuKernels& k = cpu_kernels();
  const Form form = form_of(weight.dtype, weight.c, weight.w);
  const bool pairs = k.bf16_products && weight.dtype == Dtype::bfloat16;
  Tensor out = torch::stable::empty({k.packed_stack_bytes(form, weight.dtype, weight.c, weight.w) / (pairs ? 2 : 4)},
                                    pairs ? ScalarType::BFloat16 : ScalarType::Float);
  void* const to = out.mutable_data_ptr();
  run(k.stack_tasks(form, weight.c), 0, [&](int64_t task, char*) { k.pack_stack(form, weight, task, to); });
  return out;
}

// ---- arguments

// bias, scale and shift as float32, padded with zeros to whole blocks of channels
struct ConstantsBuffer {
  int64_t padded;
  std::vector<float> data;
  const float* rows = nullptr;  // somebody else's, instead of `data`
  explicit ConstantsBuffer(int64_t channels) : padded(round_up(channels, cpu_kernels().lanes)), data(3 * padded) {}
  ConstantsBuffer(int64_t channels, const float* padded_rows) : padded(channels), rows(padded_rows) {}
  ConstantsBuffer(const Optional& bias, const Optional& scale, const Optional& shift, int64_t channels)
      : ConstantsBuffer(channels) {
    fill(0, values(bias, "bias", channels, 0));
    fill(1, values(scale, "scale", channels, 1));
    fill(2, values(shift, "shift", channels, 0));
  }
  void fill(int64_t row, const std::vector<double>& v) { std::copy(v.begin(), v.end(), data.begin() + row * padded); }
  Constants get() const {
    const float* const at = rows ? rows : data.data();
    return {at, at + padded, at + 2 * padded};
  }
};

Tensor pack_pointwise(const Tensor& given) {
  STD_TORCH_CHECK(given.is_cpu() && given.dim() == 2 && given.numel() > 0, "weight: got shape ", shape_of(given),
                  ", wanted [C, Cin] on the CPU");
  const Tensor w = dense(given);
  return packed_product(weight_view(w, 1, w.size(1), "weight"));
}

Tensor pack_depthwise(const Tensor& given) {
  STD_TORCH_CHECK(given.is_cpu() && given.dim() == 4 && given.size(0) >= 1 && given.size(1) == 1, "weight: got shape ",
                  shape_of(given), ", wanted [C, 1, kh, kw] on the CPU");
  STD_TORCH_CHECK(
      given.size(2) >= 1 && given.size(3) >= 1 && given.size(2) <= kMaxKernel && given.size(3) <= kMaxKernel,
      "weight: got a ", given.size(2), "x", given.size(3), " kernel, wanted 1 to ", kMaxKernel, " on each side");
  const Tensor w = dense(given);
  return packed_depthwise(weight_view(w, w.size(2), w.size(3), "weight"));
}

// ---- operators. They allocate what they return first: all else, freed before it, leaves it the pages it had in the last
// call. Pages that are new take as long as a small layer.

Tensor direct(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& scale, const Optional& shift,
              const std::string& act, int64_t stride_h, int64_t stride_w, bool depthwise, bool residual) {
  const int64_t c = weight.size(0), kh = weight.size(2), kw = weight.size(3);
  Tensor y =
      output_like(x, c, depthwise ? x.size(2) : x.size(2) / stride_h, depthwise ? x.size(3) : x.size(3) / stride_w);
  const Tensor w = dense(weight);
  DirectConv p{(const double*)x.const_data_ptr(),
               (const double*)w.const_data_ptr(),
               (double*)y.mutable_data_ptr(),
               x.size(0),
               x.size(1),
               x.size(2),
               x.size(3),
               c,
               y.size(2),
               y.size(3),
               kh,
               kw,
               stride_h,
               stride_w,
               depthwise ? (kh - 1) / 2 : 0,
               depthwise ? (kw - 1) / 2 : 0,
               x.strides().data(),
               y.strides().data(),
               values(bias, "bias", c, 0),
               values(scale, "scale", c, 1),
               values(shift, "shift", c, 0),
               depthwise,
               residual,
               act_of(act)};
  torch::stable::parallel_for(0, p.n * c, 1, [&](int64_t begin, int64_t end) { direct_conv(p, begin, end); });
  return y;
}

// patch_embed and pointwise_block: a product behind two different producers
Tensor product_block(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& scale,
                     const Optional& shift, const std::string& act, Stage::Producer producer) {
  check_activations(x);
  const bool patches = producer == Stage::Producer::patches;
  const bool fits = weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) >= 1 && weight.size(3) >= 1 &&
                    weight.size(0) >= 1;
  check_weight(x, weight, fits && (patches || (weight.size(2) == 1 && weight.size(3) == 1)),
               patches ? "[C, Cin, p, q]" : "[C, Cin, 1, 1]");
  const int64_t c = weight.size(0), p = weight.size(2), q = weight.size(3);
  STD_TORCH_CHECK(!patches || (x.size(2) >= p && x.size(3) >= q), "x: got an image of ", x.size(2), "x", x.size(3),
                  ", wanted at least one patch of ", p, "x", q);
  if (x.scalar_type() == ScalarType::Double) return direct(x, weight, bias, scale, shift, act, p, q, false, false);
  const View in = view_of(x, "x");
  Tensor y = output_like(x, c, x.size(2) / p, x.size(3) / q);
  const ConstantsBuffer constants(bias, scale, shift, c);
  const Tensor w = dense(weight), packed = packed_pointwise(weight_view(w, 1, x.size(1) * p * q, "weight"));
  Stage s{};
  s.producer = producer;
  s.in = in, s.out = view_of(y, "y");
  s.ph = p, s.pw = q;
  s.pointwise = {packed.const_data_ptr(), constants.get(), nullptr, Form::plain};
  s.act = act_of(act);
  run_stage(s);
  return y;
}

Tensor patch_embed(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& scale,
                   const Optional& shift, std::string act) {
  return product_block(x, weight, bias, scale, shift, act, Stage::Producer::patches);
}

Tensor pointwise_block(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& scale,
                       const Optional& shift, std::string act) {
  return product_block(x, weight, bias, scale, shift, act, Stage::Producer::copy);
}

Tensor depthwise_layer(const View& in, Tensor y, const Depthwise& depthwise, Act act) {
  if (!in.n || !in.h || !in.w) return y;
  const CpuKernels& k = cpu_kernels();
  const int64_t blocks = ceil_div(in.c, k.lanes);
  DepthwiseStage s{in, view_of(y, "y"), depthwise, act, 0};
  s.rows = round_up(band_rows(in.n * blocks, in.h, l2_bytes() / 4 / (in.w * k.lanes * 4) + depthwise.kh),
                    k.band_step(in.dtype));
  const int64_t bands = ceil_div(in.h, s.rows);
  run(in.n * blocks * bands, k.depthwise_scratch_bytes(s), [&](int64_t task, char* scratch) {
    k.depthwise_band(s, task / bands / blocks, task / bands % blocks, task % bands * s.rows, scratch);
  });
  return y;
}

Tensor depthwise_block(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& scale,
                       const Optional& shift, std::string act, bool residual) {
  check_activations(x);
  check_weight(x, weight,
               weight.dim() == 4 && weight.size(2) >= 1 && weight.size(3) >= 1 && weight.size(0) == x.size(1) &&
                   weight.size(1) == 1,
               "[C, 1, kh, kw]");
  if (x.scalar_type() == ScalarType::Double) return direct(x, weight, bias, scale, shift, act, 1, 1, true, residual);
  const View in = view_of(x, "x");
  Tensor y = output_like(x, in.c, in.h, in.w);
  const ConstantsBuffer constants(bias, scale, shift, in.c);
  const Tensor packed = pack_depthwise(weight);
  return depthwise_layer(in, std::move(y),
                         {packed.const_data_ptr(), constants.get(), weight.size(2), weight.size(3), residual},
                         act_of(act));
}

void pool(const PoolHead& p) {
  const CpuKernels& k = cpu_kernels();
  const int64_t step = k.pool_blocks_at_once, tasks = ceil_div(ceil_div(p.in.c, k.lanes), step);
  run(p.in.n * tasks, 0, [&](int64_t task, char*) { k.pool_blocks(p, task / tasks, task % tasks * step); });
}

void classify(const PoolHead& p) {
  const int64_t step = 8;  // classes a task
  run(ceil_div(p.classes, step), 0,
      [&](int64_t task, char*) { cpu_kernels().classify(p, task * step, std::min((task + 1) * step, p.classes)); });
}

void check_head(const Tensor& x, const Tensor& weight, int64_t channels) {
  check_weight(x, weight, weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) == channels, "[classes, C]");
}

Tensor pool_head(const Tensor& x, const Tensor& weight, const Optional& bias) {
  check_activations(x);
  STD_TORCH_CHECK(x.size(2) * x.size(3) > 0, "x: got shape ", shape_of(x), ", wanted at least one pixel to average");
  check_head(x, weight, x.size(1));
  const Tensor w = dense(weight);
  Tensor y = torch::stable::empty({x.size(0), w.size(0)}, x.scalar_type());
  const std::vector<double> b = values(bias, "bias", w.size(0), 0);
  if (x.scalar_type() == ScalarType::Double) {
    const double *xp = (const double*)x.const_data_ptr(), *wp = (const double*)w.const_data_ptr();
    const auto s = x.strides();
    for (int64_t n = 0; n < x.size(0); n++)
      for (int64_t k = 0; k < w.size(0); k++) {
        double sum = 0;
        for (int64_t c = 0; c < x.size(1); c++)
          for (int64_t i = 0; i < x.size(2); i++)
            for (int64_t j = 0; j < x.size(3); j++)
              sum += xp[n * s[0] + c * s[1] + i * s[2] + j * s[3]] * wp[k * x.size(1) + c];
        ((double*)y.mutable_data_ptr())[n * w.size(0) + k] = sum / (x.size(2) * x.size(3)) + b[k];
      }
    return y;
  }
  const std::vector<float> bias32(b.begin(), b.end());
  std::vector<float> pooled(x.size(0) * x.size(1));
  const PoolHead p{view_of(x, "x"), pooled.data(), w.const_data_ptr(), bias32.data(), w.size(0), y.mutable_data_ptr()};
  pool(p);
  classify(p);
  return y;
}

// ---- a stem and a stack of blocks

void check_packed(const Tensor& t, int64_t bytes, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.numel() * (int64_t)t.element_size() == bytes, "packed: got ",
                  t.numel() * (int64_t)t.element_size(), " bytes for ", name, ", wanted ", bytes,
                  ": pack it on this machine, for x's dtype");
}

void check_kernel(const std::vector<int64_t>& kernel) {
  STD_TORCH_CHECK(
      kernel.size() == 2 && std::min(kernel[0], kernel[1]) >= 1 && std::max(kernel[0], kernel[1]) <= kMaxKernel,
      "kernel: wanted two sizes from 1 to ", kMaxKernel);
}

// bias, scale and shift in float32, one row each: `t` itself if its rows are whole blocks of channels, else a padded copy
ConstantsBuffer packed_constants(const Tensor& t, int64_t c) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::Float && t.dim() == 2 &&
                      t.size(0) == 3 && t.size(1) == c,
                  "packed: got constants of ", shape_of(t), ", wanted float32 [3, ", c, "]");
  const float* const rows = (const float*)t.const_data_ptr();
  if (c % cpu_kernels().lanes == 0) return ConstantsBuffer(c, rows);
  ConstantsBuffer buffer(c);
  for (int64_t row = 0; row < 3; row++)
    std::copy(rows + row * c, rows + (row + 1) * c, buffer.data.begin() + row * buffer.padded);
  return buffer;
}

Tensor depthwise_packed(const Tensor& x, const Tensor& packed, const Tensor& packed_rows, std::vector<int64_t> kernel,
                        std::string act, bool residual) {
  check_activations(x);
  const View in = view_of(x, "x");
  check_kernel(kernel);
  check_packed(packed, cpu_kernels().packed_depthwise_bytes(in.dtype, in.c, kernel[0], kernel[1]),
               "a depthwise weight");
  Tensor y = output_like(x, in.c, in.h, in.w);
  const ConstantsBuffer constants = packed_constants(packed_rows, in.c);
  return depthwise_layer(in, std::move(y), {packed.const_data_ptr(), constants.get(), kernel[0], kernel[1], residual},
                         act_of(act));
}

int64_t plane_elements(int64_t h, int64_t w) { return round_up(h * w, 32) + 32; }

View blocked(void* data, Dtype dtype, int64_t n, int64_t c, int64_t h, int64_t w, bool paired) {
  return {data, dtype, n, c, h, w, 0, 0, 0, 0, true, paired};
}

// Planes of an image, which must not share their sets of the cache
View planes(void* data, Dtype dtype, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t plane = plane_elements(h, w);
  return {data, dtype, n, c, h, w, c * plane, plane, w, 1, false};
}

View images(View v, int64_t first, int64_t count) {
  v.data = (char*)v.data + first * v.sn * size_of(v.dtype);
  v.n = count;
  return v;
}

Tensor block_stack(const Tensor& x, std::vector<Tensor> packed, int64_t channels, std::vector<int64_t> patch,
                   std::vector<int64_t> kernel, std::string act_name, bool want_pool, const Optional& head,
                   const Optional& head_bias) {
  const CpuKernels& k = cpu_kernels();
  check_activations(x);
  STD_TORCH_CHECK(want_pool || !head, "head: got a weight with pool=False, wanted pool=True: it takes pooled channels");
  STD_TORCH_CHECK(head || !head_bias, "head_bias: got a tensor without a head, wanted both");
  if (head) check_head(x, *head, channels);
  const View in = view_of(x, "x");
  const Act act = act_of(act_name);
  const bool stem = !patch.empty();
  const int64_t first = stem ? 2 : 0, depth = ((int64_t)packed.size() - first) / 4, ph = stem ? patch[0] : 1,
                pw = stem ? patch.back() : 1;
  STD_TORCH_CHECK((stem ? patch.size() == 2 && ph > 0 && pw > 0 : depth > 0) &&
                      (int64_t)packed.size() == first + 4 * depth && depth >= 0 && channels > 0,
                  "packed: got ", packed.size(), " tensors, wanted 2 for a stem and 4 for every block");
  if (depth) check_kernel(kernel);
  STD_TORCH_CHECK(stem || in.c == channels, "x: got ", in.c, " channels, wanted ", channels);
  STD_TORCH_CHECK(!stem || (in.h >= ph && in.w >= pw), "x: got an image of ", in.h, "x", in.w,
                  ", wanted at least one patch of ", ph, "x", pw);
  const int64_t h = in.h / ph, w = in.w / pw;

  auto inputs_of = [&](int64_t i) { return i < first ? in.c * ph * pw : channels; };  // of a product
  std::vector<ConstantsBuffer> constants;
  constants.reserve(packed.size() / 2);
  for (int64_t i = 0; i < (int64_t)packed.size(); i += 2) {
    const bool depthwise = i >= first && (i - first) % 4 == 0;
    check_packed(packed[i],
                 depthwise ? k.packed_depthwise_bytes(in.dtype, channels, kernel[0], kernel[1])
                           : packed_product_bytes(in.dtype, channels, inputs_of(i)),
                 depthwise ? "a depthwise weight" : "a pointwise weight");
    constants.push_back(packed_constants(packed[i + 1], channels));
  }
  std::vector<Stage> stages;
  auto pointwise = [&](int64_t i) {  // its successor among the products: the next block's
    const int64_t next = i + 4 < (int64_t)packed.size() ? i + 4 : stem ? 0 : 2;
    return Pointwise{packed[i].const_data_ptr(), constants[i / 2].get(), packed[next].const_data_ptr(),
                     form_of(in.dtype, channels, inputs_of(i))};
  };
  auto memory_of = [](const Tensor& t) {
    return Ahead{(const char*)t.const_data_ptr(), t.numel() * (int64_t)t.element_size()};
  };
  auto stage = [&](int64_t i) {  // pointwise i; then the next block's depthwise weights and constants, or the head
    Stage s{};
    s.pointwise = pointwise(i);
    if (i + 2 < (int64_t)packed.size())
      for (int64_t j = 0; j < 3; j++) s.after[j] = memory_of(packed[i + (j < 2 ? 2 + j : 5)]);
    else if (head)
      s.after[0] = memory_of(*head);
    return s;
  };
  if (stem) {
    Stage s = stage(0);
    s.producer = Stage::Producer::patches;
    s.ph = ph, s.pw = pw;
    stages.push_back(s);
  }
  for (int64_t i = first; i < (int64_t)packed.size(); i += 4) {
    Stage s = stage(i + 2);
    s.producer = Stage::Producer::depthwise;
    s.depthwise = {packed[i].const_data_ptr(), constants[i / 2].get(), kernel[0], kernel[1], true};
    stages.push_back(s);
  }

  const bool paired =
      depth && w % 2 == 0 && k.pairs_depthwise(in.dtype, kernel[1]);  // as the depthwise half reads them
  Tensor y = want_pool ? torch::stable::empty({in.n, channels}, ScalarType::Float) : output_like(x, channels, h, w);
  const View out = want_pool ? View{} : view_of(y, "y");
  // depth first: so many images go through all blocks that their activations stay in the cache
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunk =
      std::max<int64_t>({1, 1024 / std::max<int64_t>(1, h * w), ceil_div(4 * threads, std::max<int64_t>(1, h))});
  const bool as_planes = stages[0].pointwise.form == Form::planes;
  const int64_t most = std::min(chunk, in.n), pixels = as_planes ? plane_elements(h, w) : h * w,
                size = round_up(most * round_up(channels, k.lanes) * pixels * size_of(in.dtype), 64);
  auto between = [&](char* data, int64_t count) {
    return as_planes ? planes(data, in.dtype, count, channels, h, w)
                     : blocked(data, in.dtype, count, channels, h, w, paired);
  };
  const Scratch memory(Scratch::activations, stages.size() > 2 || want_pool ? 2 * size : size);
  for (int64_t n = 0; n < in.n; n += chunk) {
    const int64_t count = std::min(chunk, in.n - n);
    View from = images(in, n, count);
    for (size_t i = 0; i < stages.size(); i++) {
      Stage& s = stages[i];
      s.in = from;
      s.between = i + 1 < stages.size() || want_pool;
      s.out = s.between ? between(memory.data() + i % 2 * size, count) : images(out, n, count);
      s.act = act;
      run_stage(s);
      from = s.out;
    }
    if (want_pool) pool({from, (float*)y.mutable_data_ptr() + n * channels, nullptr, nullptr, 0, nullptr});
  }
  if (!head) return want_pool && in.dtype != Dtype::float32 ? torch::stable::to(y, x.scalar_type()) : y;
  const Tensor weight = dense(*head);
  const int64_t classes = weight.size(0);
  Tensor logits = torch::stable::empty({in.n, classes}, x.scalar_type());
  const std::vector<double> b = values(head_bias, "head_bias", classes, 0);
  const std::vector<float> bias(b.begin(), b.end());
  const View pooled = blocked(nullptr, in.dtype, in.n, channels, 1, 1, false);
  classify(
      {pooled, (float*)y.mutable_data_ptr(), weight.const_data_ptr(), bias.data(), classes, logits.mutable_data_ptr()});
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cmx, CPU, m) {
  m.impl("patch_embed", TORCH_BOX(&patch_embed));
  m.impl("depthwise_block", TORCH_BOX(&depthwise_block));
  m.impl("pointwise_block", TORCH_BOX(&pointwise_block));
  m.impl("pool_head", TORCH_BOX(&pool_head));
  m.impl("block_stack", TORCH_BOX(&block_stack));
  m.impl("depthwise_packed", TORCH_BOX(&depthwise_packed));
  m.impl("pack_depthwise", TORCH_BOX(&pack_depthwise));
  m.impl("pack_pointwise", TORCH_BOX(&pack_pointwise));
}

}  // namespace cmx
