"""explain: which backend and kernel each part of a model would run on, and why not another."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmx_kernels import backends, cost_model, ops, plain_layers, registry
from cmx_kernels.activations import activation, name_of
from cmx_kernels.layers import LargeKernelDepthwiseConv2d, is_depthwise, unswap, why_not_swap
from cmx_kernels.models.conversion import revert
from cmx_kernels.models.fused import Fused, Stem
from cmx_kernels.models.networks import FusedConvMixer, FusedNetwork
from cmx_kernels.models.obstacles import check_call, plain_is_wanted
from cmx_kernels.models.stack import Stack, current, linear_of
from cmx_kernels.models.structure import Refusal, block_parts, children, looks_like_block, why_not_one_operator
from cmx_kernels.ops.checks import autocast, wants_grad

PLAIN = "torch"


@dataclass(frozen=True)
class Row:
    """``refusals``: who did not take this part, and why; empty where it runs on a kernel of ours, or needs none."""

    part: str
    backend: str
    kernel: str
    refusals: dict[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What runs where. ``print(report)`` shows a table, in which equal blocks that follow each other share a line."""

    rows: list[Row]

    @property
    def refusals(self) -> dict[str, dict[str, str]]:
        """part -> who refused it -> why"""
        return {row.part: row.refusals for row in self.rows if row.refusals}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        lines = [("part", "backend", "kernel", "")]
        for _, group in groupby(self.rows, _what_a_line_shows):
            first, *rest = group
            part = f"{first.part}-{rest[-1].part.rpartition('.')[2]}" if rest else first.part
            reasons = [f"{who}: {why}" for who, why in first.refusals.items()] or [first.note]
            lines.append((part, first.backend, first.kernel, reasons[0]))
            lines += [("", "", "", reason) for reason in reasons[1:]]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        table = [" ".join([*(line[i].ljust(widths[i]) for i in range(3)), line[3]]).rstrip() for line in lines]
        summary = f"{len(self.refusals)} of {len(self)} parts refused" if self.refusals else "no refusals"
        kernels = registry.isa_level() or "none"
        return "\n".join([*table, f"{summary}; torch {torch.__version__}, CPU kernels: {kernels}"])


def explain(model_or_op: nn.Module | str | Callable[..., Tensor], x: Tensor, act: str = "gelu") -> Report:
    """What would run if ``model_or_op`` were called on ``x`` now, in this mode, under this autocast and grad mode.

    Args:
        model_or_op: a model, fused or with fused parts; or an operator or its name, as ops.depthwise_block.
        x: the input, [N, C, H, W]; nothing is computed on it.
        act: for an operator, its activation.

    Raises:
        TypeError: neither a model nor an operator, or x is no tensor. ValueError: no such activation.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, wanted a torch.Tensor [N, C, H, W]")
    if isinstance(model_or_op, nn.Module):
        return Report(list(_model_rows(model_or_op, x)))
    name = model_or_op if isinstance(model_or_op, str) else getattr(model_or_op, "__name__", None)
    if name not in ops.__all__:
        known = ", ".join(f"ops.{op}" for op in ops.__all__)
        raise TypeError(f"model_or_op: got {model_or_op!r}, wanted an nn.Module or one of {known}")
    activation(act)
    return Report([_op_row(name, [name], x, act)])


def _op_row(part: str, names: list[str], x: Tensor, act: str, note: str = "", weights: Sequence[Tensor] = ()) -> Row:
    chosen: list[str] = []
    refusals: dict[str, str] = {}
    for i, name in enumerate(names):
        weight = weights[i].shape if weights else None
        backend = backends.select(name, x, act, quiet=True, weight=weight)
        chosen.append(backend)
        if backend == "reference":
            refusals |= {f"{name}, {who}": why for who, why in backends.refusals(name, x, act, weight).items()}
            refusals |= {} if backends.FUSED else {"all": "CMX_FUSED=0"}
        elif backend == "cuda" and weight is not None:
            plan = cost_model.product_note(torch.cuda.get_device_name(x.device), name, x, weight, act)
            note = "; ".join(filter(None, (note, plan)))
    return Row(part, " + ".join(dict.fromkeys(chosen)), " + ".join(names), refusals, note)


def _model_rows(model: nn.Module, x: Tensor) -> Iterator[Row]:
    parts = dict(outermost(model, ""))
    refused = list(_refused_blocks(model))
    yield from refused
    if not (parts or refused):
        way_out = "no part of it is fused: call cmx_kernels.fuse(model)"
        yield Row("model", PLAIN, type(model).__name__, {"fusion": way_out})
    inputs = {"": x} if "" in parts else inputs_of(model, parts, x)
    for name, part in parts.items():
        if name in inputs:
            yield from _part_rows(name, part, inputs[name])
        else:
            yield Row(name, PLAIN, type(part).__name__, {"fusion": "it is not called in this forward"})


def _refused_blocks(model: nn.Module) -> Iterator[Row]:
    for name, module in model.named_modules():
        if not looks_like_block(module):  # which a fused one does no more
            continue
        try:
            block_parts(module)
        except Refusal as reason:
            yield Row(name or "block", PLAIN, "its modules", {"fusion": str(reason)})


def outermost(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, Fused) or is_depthwise(module):
        yield name, module
        return
    for key, child in module.named_children():
        yield from outermost(child, _join(name, key))


def inputs_of(model: nn.Module, parts: dict[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    """What each part would be given, without its values: a plain copy of the model runs on the meta device.

    Where gradients are recorded, what comes out of a part that is trained requires them.
    """
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(t): t.detach().to("meta").requires_grad_(t.requires_grad) for t in tensors}
    memo |= {id(p): nn.Parameter(memo[id(p)], p.requires_grad) for p in model.parameters()}
    twin = copy.deepcopy(model, memo)
    revert(twin)
    unswap(twin)
    seen: dict[str, Tensor] = {}
    for name, part in parts.items():

        def note(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            seen.setdefault(name, torch.empty_like(args[0], device=x.device).requires_grad_(args[0].requires_grad))

        at = twin.get_submodule(name)
        at.register_forward_pre_hook(note)
        if isinstance(part, FusedConvMixer):  # whose forward_features may be called in its place
            at.get_submodule("stem").register_forward_pre_hook(note)
    twin(x.detach().to("meta").requires_grad_(x.requires_grad))
    return seen


def _part_rows(name: str, part: nn.Module, x: Tensor) -> Iterator[Row]:
    if isinstance(part, nn.Conv2d) and not isinstance(part, LargeKernelDepthwiseConv2d):
        way_out = "it is a plain nn.Conv2d: call cmx_kernels.fuse(model)"
        yield Row(name or "layer", PLAIN, "conv2d", {"fusion": why_not_swap(part) or way_out})
        return
    if isinstance(part, LargeKernelDepthwiseConv2d):
        reason = "CMX_FUSED=0" if plain_is_wanted(x) else part.why_plain(x)
        given, row = autocast(x)[0], None
        if reason is None:
            row = _op_row(name or "layer", ["depthwise_block"], given, "none", weights=[part.weight])
        how = given, part.weight, wants_grad(x, part.weight, part.bias)
        if row is not None and not (row.backend == "cpu" and plain_layers.is_faster(*how)):
            yield row
            return
        why = {"fusion": reason} if reason else {"cpu": plain_layers.why_faster(*how)}
        yield Row(name or "layer", PLAIN, "conv2d", why)
        return
    try:
        stack, obstacle = stack_of(part, x)
    except Refusal as reason:
        stack, obstacle = None, str(reason)
    if isinstance(part, FusedNetwork):
        rows = _network_rows(name, part, x, stack if obstacle is None else None)
        if stack is not None and stack.stem_refusal is not None:
            stem = [_join(name, key) for key, _ in part.named_children()][stack.span[0] - 3 : stack.span[0]]
            why = {"fusion": stack.stem_refusal}
            rows = (replace(row, refusals=why) if row.part in stem else row for row in rows)
        if stack is None:  # its parts may still be fused; where they are, they do not say why each is called alone
            yield from (row if row.backend == PLAIN or row.note else replace(row, note=str(obstacle)) for row in rows)
        else:
            yield from rows if obstacle is None else _in_parts(rows, part, stack, x)
    elif stack is None:
        yield Row(name or "block", PLAIN, "its modules", {"fusion": str(obstacle)})
    elif obstacle is None:
        yield _stack_row(name or "block", stack, x)
    else:
        names = ["patch_embed"] if isinstance(part, Stem) else ["depthwise_block", "pointwise_block"]
        weights = [unit.conv.weight for unit in stack.units]
        yield _op_row(name or "block", names, autocast(x)[0], stack.act, obstacle, weights)


def _in_parts(rows: Iterator[Row], part: FusedNetwork, stack: Stack, x: Tensor) -> Iterator[Row]:
    """Rows of a network whose operators run one by one, perhaps a few images at a time through all of them."""
    x, listed = autocast(x)[0], list(rows)
    if stack.stem is not None and why_not_one_operator(stack.stem) is None:
        for i in range(stack.span[0], min(stack.span[0] + 3, stack.span[1])):
            if listed[i].backend == PLAIN:  # one of three modules that are no Stem
                act, weights = name_of(stack.stem.act) or "", [stack.stem.conv.weight]
                listed[i] = _op_row(listed[i].part, ["patch_embed"], x, act, listed[i].note, weights)
    found = None if stack.trains(x, stack.tensors(part) or []) else stack.micro_batch_of(x)
    if found is None or any("reference" in row.backend for row in listed):
        yield from listed
        return
    note = f"{found[0]} images at a time through all blocks" if found[0] < len(x) else ""
    for row in listed:
        yield row if row.backend == PLAIN else replace(row, note="; ".join(filter(None, (row.note, note))))


def stack_of(part: Any, x: Tensor) -> tuple[Stack, str | None]:
    """The stack of a fused module and what is in the way of running it in one call; Refusal if the plain path runs."""
    if plain_is_wanted(x):
        raise Refusal("fusion is off (CMX_FUSED=0), or a tracer or a mode follows PyTorch's operators")
    check_call(x)
    stack, tensors = cast(tuple[Stack, list[Tensor]], current(part))  # no graph asks
    x = autocast(x)[0]
    return stack, stack.obstacle(x, stack.trains(x, tensors))


def _stack_row(part: str, stack: Stack, x: Tensor) -> Row:
    x = autocast(x)[0]
    trains = stack.trains(x, [p for module in stack.children.values() if module for p in module.parameters()])
    op = "depthwise_block_train" if trains else "block_stack"
    return Row(part, backends.select(op, x, stack.act, quiet=True), "training" if trains else op)


def _network_rows(name: str, net: FusedNetwork, x: Tensor, stack: Stack | None) -> Iterator[Row]:
    """``stack``: the one that takes the network in one call, None if its parts run one by one."""
    if isinstance(net, FusedConvMixer):
        blocks = [(f"blocks.{key}", block) for key, block in net.blocks.named_children()]
        pieces: list[tuple[str, nn.Module]] = [
            ("stem", net.stem),
            *blocks,
            ("global_pool", net.global_pool),
            ("head", net.head),
        ]
        first, last = 0, 1 + len(blocks) + (stack is not None and stack.pool)
    else:
        pieces = list(net.named_children())
        first, last = stack.span if stack is not None else (0, 0)
    if stack is not None and _takes_head(stack, net, x):
        last += 1
    for i, (key, piece) in enumerate(pieces):
        label = _join(name, key)
        if stack is not None and first <= i < last:
            yield _stack_row(label, stack, x)
        elif isinstance(piece, Fused):
            yield from _part_rows(label, piece, x)
        else:
            yield Row(label, PLAIN, type(piece).__name__)
        trained = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in piece.parameters()))
        if isinstance(piece, (Stem, nn.Conv2d)):
            x = after_patches(x, piece if isinstance(piece, nn.Conv2d) else children(piece)[0])
        x = x.detach().requires_grad_(trained and x.is_floating_point())


def _takes_head(stack: Stack, net: FusedNetwork, x: Tensor) -> bool:
    head = net.last_layer(stack)
    if head is None or stack.trains(x, stack.tensors(net) or []):
        return False
    return linear_of(head, autocast(x)[0]) is not None


def after_patches(x: Tensor, conv: nn.Module) -> Tensor:
    """What a stem's convolution makes of ``x``, without its values; ``x`` itself where it does not fit."""
    if not isinstance(conv, nn.Conv2d) or x.dim() != 4:
        return x
    rows, columns = (size // step for size, step in zip(x.shape[2:], conv.stride, strict=True))
    return x.new_empty((x.shape[0], conv.out_channels, rows, columns))


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _what_a_line_shows(row: Row) -> tuple[str, ...]:
    """Parts that differ only in a number at the end may share a line."""
    head, _, tail = row.part.rpartition(".")
    return head if tail.isdigit() else row.part, row.backend, row.kernel, str(row.refusals), row.note
