"""Operators on random shapes, strides, kernel sizes and dtypes, against float64 and against their fakes' strides."""

from typing import NamedTuple

import cases
import torch
from cases import LAYOUTS
from compare import check, check_equal
from conftest import Runner
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

_channels = st.one_of(st.integers(1, 20), st.integers(1, 140))
_pixels = st.one_of(st.integers(1, 9), st.integers(1, 40))
_kernel = st.one_of(st.integers(1, 9), st.integers(1, 31))


class Call(NamedTuple):
    """Everything that makes a call; small enough to be read in a report."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    act: str = "gelu"
    vectors: tuple[torch.dtype | None, ...] = (torch.float32,) * 3
    residual: bool = True
    layout: str = "contiguous"

    def args(self) -> tuple[object, ...]:
        x, *rest = cases.inputs(*self[:6])
        return (LAYOUTS[self.layout](x), *rest)


@st.composite
def _calls(draw: st.DrawFn) -> Call:
    op = draw(st.sampled_from(cases.OPS))
    n, c, h, w = draw(st.sampled_from((1, 1, 2, 3, 5, 0))), draw(_channels), draw(_pixels), draw(_pixels)
    if op == "depthwise_block":
        shape = (n, c, h, w, draw(_kernel), draw(_kernel))
    elif op == "patch_embed":
        p, q = draw(st.integers(1, min(h, 31))), draw(st.integers(1, min(w, 31)))
        shape = (n, min(c, 20), draw(_channels), h, w, p, q)
    else:
        shape = (n, c, draw(_channels), h, w)
    dtype = draw(st.sampled_from(cases.DTYPES))
    kinds = st.sampled_from((None, dtype, torch.float32))
    act, vectors = draw(st.sampled_from(cases.ACTS)), draw(st.tuples(kinds, kinds, kinds))
    return Call(op, shape, dtype, act, vectors, draw(st.booleans()), draw(st.sampled_from(sorted(LAYOUTS))))


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(call=_calls())
@example(call=Call("depthwise_block", (1, 16, 1, 1, 31, 31)))
def test_random_calls(backend: Runner, call: Call) -> None:
    args = call.args()
    assume(backend.name not in ("cuda", "triton") or backend.why_not(call.op, *args) is None)
    out = backend(call.op, *args)
    check(out, cases.expect(call.op, args))
    check_equal(backend(call.op, *args), out, "the second time")
    fake = getattr(torch.ops.cmx, call.op)(*(_meta(a) for a in args))
    assert (out.shape, out.dtype) == (fake.shape, fake.dtype)
    assert out.stride() == fake.stride(), f"x has strides {args[0].stride()}: {out.stride()}, fake {fake.stride()}"


def _meta(value: object) -> object:
    """The same strides without memory: what runs on it is the fake."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
