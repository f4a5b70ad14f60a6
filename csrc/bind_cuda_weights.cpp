// What a network makes of its parameters: see cmx_kernels/ops/kept_weights.py and batchnorm.py.
#ifdef CMX_WITH_CUDA
#include <algorithm>
#include <vector>

#include "bind_cuda.h"
#include "cuda/fold.h"
#include "cuda/recast.h"

namespace cmx {
namespace {

bool is_kept(const Tensor& weight, const Tensor& copy, const Tensor& samples, const Tensor& first) {
  const int device = first.get_device_index();
  for (const Tensor* const t : {&weight, &copy, &samples})
    if (!t->is_cuda() || t->get_device_index() != device) return false;
  if (weight.dim() != copy.dim() || !samples.is_contiguous()) return false;
  for (int64_t d = 0; d < weight.dim(); d++)  // dense in the same order: the caller made it so
    if (weight.size(d) != copy.size(d) || weight.stride(d) != copy.stride(d)) return false;
  return weight.scalar_type() == ScalarType::Float && copy.scalar_type() == first.scalar_type() &&
         samples.scalar_type() == ScalarType::Int && samples.numel() == recast_samples(weight.numel());
}

void recast_kept(std::vector<Tensor> weights, std::vector<Tensor> kept, std::vector<Tensor> samples, bool all) {
  STD_TORCH_CHECK(weights.size() == kept.size() && weights.size() == samples.size(), "got ", weights.size(),
                  " weights, ", kept.size(), " copies and ", samples.size(), " samples, wanted one of each");
  if (weights.empty()) return;
  const Dtype dtype = dtype_of(kept[0], "kept");
  STD_TORCH_CHECK(dtype != Dtype::float32, "kept: wanted float16 or bfloat16");
  for (size_t i = 0; i < weights.size(); i++)
    STD_TORCH_CHECK(is_kept(weights[i], kept[i], samples[i], kept[0]), "weights[", i, "]: got shape ",
                    shape_of(weights[i]), " with a copy of ", shape_of(kept[i]), " and samples of ",
                    shape_of(samples[i]), ", wanted float32, a copy of its strides and int32 samples on one device");
  const int device = kept[0].get_device_index();
  check_runs(device);
  const DeviceGuard guard(device);
  for (size_t done = 0; done < weights.size();) {
    Recast p{};
    p.dtype = dtype, p.all = all;
    for (; p.weights < Recast::kMost && done < weights.size(); done++, p.weights++)
      p.weight[p.weights] = {static_cast<const float*>(weights[done].const_data_ptr()), kept[done].mutable_data_ptr(),
                             static_cast<uint32_t*>(samples[done].mutable_data_ptr()), weights[done].numel()};
    check_cuda(recast(p, current_stream(device)), "recast");
  }
}

// vectors: five of each unit, as Fold has them
Tensor fold_rows(std::vector<Tensor> vectors, double eps) {
  constexpr size_t kEach = 5;
  STD_TORCH_CHECK(!vectors.empty() && vectors.size() % kEach == 0, "vectors: got ", vectors.size(),
                  ", wanted bias, mean, var, gamma and beta of every unit");
  const Tensor& first = vectors[0];
  const int device = first.get_device_index();
  const int64_t channels = first.dim() ? first.size(0) : 0;
  const ScalarType dtype = first.scalar_type();
  for (const Tensor& v : vectors)
    STD_TORCH_CHECK(v.is_cuda() && v.get_device_index() == device && v.dim() == 1 && v.is_contiguous() &&
                        v.size(0) == channels && v.scalar_type() == dtype,
                    "vectors: got ", shape_of(v), " beside ", shape_of(first),
                    ", wanted dense vectors [C] of one device");
  check_runs(device);
  Fold p{};
  p.dtype = dtype_of(first, "vectors"), p.eps = static_cast<float>(eps);
  p.channels = static_cast<int>(channels);
  const DeviceGuard guard(device);
  const int64_t units = static_cast<int64_t>(vectors.size() / kEach);
  Tensor rows = torch::stable::empty({units, 3, channels}, ScalarType::Float, std::nullopt, first.device());
  if (!rows.numel()) return rows;
  for (int64_t done = 0; done < units; done += p.units) {
    p.units = static_cast<int>(std::min<int64_t>(units - done, Fold::kMost));
    p.rows = static_cast<float*>(rows.mutable_data_ptr()) + done * 3 * p.channels;
    for (int i = 0; i < p.units; i++)
      for (size_t j = 0; j < kEach; j++) p.vector[i][j] = vectors[(done + i) * kEach + j].const_data_ptr();
    check_cuda(fold(p, current_stream(device)), "fold_rows");
  }
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cmx, CUDA, m) {
  m.impl("recast", TORCH_BOX(&recast_kept));
  m.impl("fold_rows", TORCH_BOX(&fold_rows));
}

}  // namespace cmx
#endif
