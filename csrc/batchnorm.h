// BatchNorm in training, a channel of it: the formulas of cmx_kernels/ops/batchnorm.py, for a loop on the CPU and a thread on
// a GPU. IEEE float32 in one order, so that both give the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define CMX_ANYWHERE __host__ __device__
#else
#define CMX_ANYWHERE
#endif

namespace cmx {

// rows (mean, scale, shift) and rstd of the moments (mean, biased variance); statistics: mean and unbiased variance
struct BatchNormRows {
  const float *moments, *gamma, *beta;  // [2][c]; [c] or null
  float *rows, *rstd, *statistics;      // [3][c], [c], [2][c]
  int64_t c;
  float eps, unbiased;  // count / (count - 1)

  CMX_ANYWHERE void channel(int64_t i) const {
    const float mean = moments[i], var = moments[c + i], r = 1 / sqrtf(var + eps);
    rows[i] = mean, rows[c + i] = gamma ? r * gamma[i] : r, rows[2 * c + i] = beta ? beta[i] : 0;
    rstd[i] = r;
    statistics[i] = mean, statistics[c + i] = var * unbiased;
  }
};

// coefficients (p, q, r, mean), dgamma and dbeta of sums (sum(grad), sum(grad * (act(a) - mean)))
struct BatchNormGradients {
  const float *sums, *rows, *rstd;       // [2][c], [3][c], [c]
  float *coefficients, *dgamma, *dbeta;  // [4][c], [c], [c]
  int64_t c;
  float count;
  bool fixed;  // the statistics are constants

  CMX_ANYWHERE void channel(int64_t i) const {
    const float total = sums[i], centred = sums[c + i], scale = rows[c + i], r = rstd[i];
    coefficients[i] = scale;
    coefficients[c + i] = fixed ? 0 : -scale * r * r * (centred / count);
    coefficients[2 * c + i] = fixed ? 0 : -scale * (total / count);
    coefficients[3 * c + i] = rows[i];
    dgamma[i] = centred * r, dbeta[i] = total;
  }
};

}  // namespace cmx
