"""The end of every kernel: y = scale * act(a + bias) + shift in float32, channels along the first dimension."""

import triton
import triton.language as tl


@triton.jit
def activate(v, ACT: tl.constexpr, NARROW: tl.constexpr):
    """act(v) for float32 v; NARROW: the result will be rounded to 16 bits."""
    if ACT == "relu":
        v = tl.where(v < 0, 0.0, v)  # NaN stays
    if ACT == "gelu":
        if NARROW:
            # max(v, 0) - |v| 2^P(|v|), P = log2 Phi(-|v|) to degree 7; 0.02 ulp of fp16 off, see csrc/cuda/epilogue.cuh
            t = tl.where(tl.abs(v) < 16.0, tl.abs(v), 16.0)
            p = -1.5450897e-6 * t + 5.6756748e-5
            p = p * t - 9.006022e-4
            p = p * t + 8.425818e-3
            p = p * t - 5.387164e-2
            p = p * t - 0.45846742
            p = p * t - 1.15129
            p = p * t - 0.999985
            # a large negative v times exactly 2^-155 = 0, and -inf times 0 is NaN, as in v Phi(v)
            v = tl.where(v < 0, 0.0, v) - tl.where(v < -16.0, -v, t) * tl.exp2(p)
        else:
            v = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    if ACT == "gelu_tanh":
        # v (1 + tanh u) / 2 = v / (1 + 2^(-2u log2 e)), u = sqrt(2/pi) (v + 0.044715 v^3)
        v = v / (1 + tl.exp2(v * (-0.10294324 * v * v - 2.3022082)))
    return v


@triton.jit
def per_channel(vector, stride, c, inside):
    """[C] -> [C, 1] in float32"""
    return tl.load(vector + c * stride, mask=inside, other=0).to(tl.float32)[:, None]


@triton.jit
def finish(
    a, c, inside, bias, scale, shift, bias_stride, scale_stride, shift_stride, ACT: tl.constexpr, NARROW: tl.constexpr
):
    """a [C, P] float32 -> scale * act(a + bias) + shift; a vector may be None."""
    if bias is not None:
        a += per_channel(bias, bias_stride, c, inside)
    a = activate(a, ACT, NARROW)
    if scale is not None:
        a *= per_channel(scale, scale_stride, c, inside)
    if shift is not None:
        a += per_channel(shift, shift_stride, c, inside)
    return a
