// The operators batchnorm_rows and batchnorm_gradients for both bindings, but for who runs the channels.
#pragma once

#include <algorithm>
#include <tuple>

#include "batchnorm.h"
#include "bind.h"

namespace cmx {

using Three = std::tuple<Tensor, Tensor, Tensor>;

// [rows, c], or [c] of 0 rows, as dense float32 on the device of `like`
inline Tensor batchnorm_input(const Tensor& t, const char* name, int64_t rows, int64_t c, const Tensor& like) {
  const bool fits = rows ? t.dim() == 2 && t.size(0) == rows && t.size(1) == c : t.dim() == 1 && t.size(0) == c;
  STD_TORCH_CHECK(fits && t.device() == like.device(), name, ": got shape ", shape_of(t), ", wanted [",
                  rows ? std::to_string(rows) + ", " : "", c, "] on the device of the first argument");
  return dense(t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

// C of [2, C]
inline int64_t channels_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == 2 && t.scalar_type() == ScalarType::Float, name, ": got shape ",
                  shape_of(t), ", wanted float32 [2, C]");
  return t.size(1);
}

// run(p) calls p.channel(i) of every i below p.c
template <class Run>
Three batchnorm_rows(const Tensor& moments, const Optional& gamma, const Optional& beta, double eps, int64_t count,
                     const Run& run) {
  const int64_t c = channels_of(moments, "moments");
  const Tensor given = batchnorm_input(moments, "moments", 2, c, moments);
  const auto vector = [&](const Optional& v, const char* name) {
    return v ? Optional(batchnorm_input(*v, name, 0, c, moments)) : Optional();
  };
  const Optional scale = vector(gamma, "gamma"), shift = vector(beta, "beta");
  const auto out = [&](std::vector<int64_t> size) {
    return torch::stable::empty(size, ScalarType::Float, std::nullopt, moments.device());
  };
  const Tensor rows = out({3, c}), rstd = out({c}), statistics = out({2, c});
  const auto from = [](const Optional& t) { return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr; };
  const auto to = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const double unbiased = static_cast<double>(count) / static_cast<double>(std::max<int64_t>(1, count - 1));
  run(BatchNormRows{from(given), from(scale), from(shift), to(rows), to(rstd), to(statistics), c,
                    static_cast<float>(eps), static_cast<float>(unbiased)});
  return {rows, rstd, statistics};
}

template <class Run>
Three batchnorm_gradients(const Tensor& sums, const Tensor& rows, const Tensor& rstd, int64_t count, bool fixed,
                          const Run& run) {
  const int64_t c = channels_of(sums, "sums");
  const Tensor given = batchnorm_input(sums, "sums", 2, c, sums), affine = batchnorm_input(rows, "rows", 3, c, sums),
               deviations = batchnorm_input(rstd, "rstd", 0, c, sums);
  const auto out = [&](std::vector<int64_t> size) {
    return torch::stable::empty(size, ScalarType::Float, std::nullopt, sums.device());
  };
  const Tensor coefficients = out({4, c}), dgamma = out({c}), dbeta = out({c});
  const auto from = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
  const auto to = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  run(BatchNormGradients{from(given), from(affine), from(deviations), to(coefficients), to(dgamma), to(dbeta), c,
                         static_cast<float>(count), fixed});
  return {coefficients, dgamma, dbeta};
}

}  // namespace cmx
