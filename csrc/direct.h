// float64 by plain loops: what gradcheck calls, and a second opinion for the vector kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "params.h"

namespace cmx {

struct DirectConv {
  const double *x, *weight;  // any strides for x, weight contiguous
  double* y;
  int64_t n, c_in, h, w, c_out, h_out, w_out, kh, kw, stride_h, stride_w, top, left;
  const int64_t *sx, *sy;                  // strides of x and y
  std::vector<double> bias, scale, shift;  // [c_out]
  bool depthwise, residual;
  Act act;
};

inline double activate(Act act, double a) {
  switch (act) {
    case Act::relu: return a > 0 || a != a ? a : 0;
    case Act::gelu: return a * 0.5 * std::erfc(-a * M_SQRT1_2);
    case Act::gelu_tanh: return 0.5 * a * (1 + std::tanh(M_2_SQRTPI * M_SQRT1_2 * (a + 0.044715 * a * a * a)));
    case Act::none: return a;
  }
  return a;
}

// y = act(conv(x, weight) + bias) * scale + shift (+ x), output planes [begin, end) of n * c_out
inline void direct_conv(const DirectConv& p, int64_t begin, int64_t end) {
  for (int64_t plane = begin; plane < end; plane++) {
    const int64_t n = plane / p.c_out, c = plane % p.c_out, channels = p.depthwise ? 1 : p.c_in;
    for (int64_t i = 0; i < p.h_out; i++)
      for (int64_t j = 0; j < p.w_out; j++) {
        auto at = [&](int64_t ch, int64_t r, int64_t s) {
          return p.x[n * p.sx[0] + ch * p.sx[1] + r * p.sx[2] + s * p.sx[3]];
        };
        double a = p.bias[c];
        for (int64_t k = 0; k < channels; k++)
          for (int64_t u = 0; u < p.kh; u++)
            for (int64_t v = 0; v < p.kw; v++) {
              const int64_t r = i * p.stride_h + u - p.top, s = j * p.stride_w + v - p.left;
              if (r < 0 || r >= p.h || s < 0 || s >= p.w) continue;
              a += at(p.depthwise ? c : k, r, s) * p.weight[((c * channels + k) * p.kh + u) * p.kw + v];
            }
        double y = activate(p.act, a) * p.scale[c] + p.shift[c];
        if (p.residual) y += at(c, i, j);
        p.y[n * p.sy[0] + c * p.sy[1] + i * p.sy[2] + j * p.sy[3]] = y;
      }
  }
}

}  // namespace cmx
