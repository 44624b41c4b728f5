"""Operators that emit nothing: what each does to a pending affine (batch norm, arithmetic with constants, identities).

Every rule maps a node with one variable operand to ``(operand, outer)`` with ``v_out = outer(v_operand)``, or to None when
the operator is something else here (two variables, a constant that enlarges the tensor, batch statistics).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from foldexport.fold.affine import Affine
from foldexport.fold.constants import Constants
from foldexport.trace import bound

Rule = Callable[[dict, Constants, int], "tuple[fx.Node, Affine] | None"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and standard deviation of a batch norm's operand, as stored with it; broadcastable to the operand."""

    mean: Tensor
    std: Tensor


def name_of(node: fx.Node) -> str:
    """The ATen family of an operator: "conv2d", "batch_norm"; "" for anything that is not an ATen call."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None and schema.name.startswith("aten::") else ""


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Sizes at the traced example."""
    return tuple(hint(size) for size in node.meta["val"].shape)


def dynamic_axes(node: fx.Node) -> frozenset[int]:
    """Axes whose size is symbolic."""
    return frozenset(i for i, size in enumerate(node.meta["val"].shape) if not isinstance(size, int))


def hint(size) -> int:
    """The size at the traced example of an axis that may be symbolic."""
    return size if isinstance(size, int) else int(size.node.hint)


def is_float(node: object) -> bool:
    """Whether a node's value is one floating-point tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_floating_point()


def channel_vector(vector: Tensor, rank: int) -> Tensor:
    """``[C]`` as ``[1, C, 1, …]``."""
    return vector.reshape((1, -1) + (1,) * (rank - 2))


def batch_norm_vectors(args: dict, constants: Constants, channels: int) -> tuple[Tensor, ...] | None:
    """``(γ, β, μ, σ²)`` in float64 of a batch norm on stored statistics; None when it uses the batch's own."""
    training = args.get("training", args.get("use_input_stats", False))
    mean, var = args.get("running_mean"), args.get("running_var")
    if training or mean not in constants or var not in constants:
        return None
    weight, bias = args.get("weight"), args.get("bias")
    if any(value is not None and value not in constants for value in (weight, bias)):
        return None
    gamma = constants.value(weight) if weight is not None else torch.ones(channels, dtype=torch.float64)
    beta = constants.value(bias) if bias is not None else torch.zeros(channels, dtype=torch.float64)
    return gamma, beta, constants.value(mean), constants.value(var)


def _batch_norm(args: dict, constants: Constants, rank: int):
    """``k = γ/√(σ²+ε)``: ``v ↦ k·v + (β − k·μ)`` (Ioffe & Szegedy 2015, inference)."""
    source = args["input"]
    vectors = batch_norm_vectors(args, constants, shape_of(source)[1])
    if vectors is None:
        return None
    gamma, beta, mean, var = vectors
    k = gamma / torch.sqrt(var + args["eps"])
    return source, Affine(channel_vector(k, rank), channel_vector(beta - k * mean, rank))


def statistics(node: fx.Node, constants: Constants) -> Statistics | None:
    """The stored statistics of a batch norm on its operand."""
    args = bound(node)
    vectors = batch_norm_vectors(args, constants, shape_of(args["input"])[1])
    if vectors is None:
        return None
    rank = len(shape_of(node))
    return Statistics(channel_vector(vectors[2], rank), channel_vector(torch.sqrt(vectors[3] + args["eps"]), rank))


def _constant(value: object, constants: Constants, source: fx.Node, rank: int) -> Tensor | None:
    """A constant operand, aligned to the variable one; None when it is variable or enlarges it."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return torch.full((1,) * rank, float(value), dtype=torch.float64)
    if value not in constants:
        return None
    tensor = constants.value(value)
    if not isinstance(tensor, Tensor) or tensor.is_complex() or tensor.dim() > rank:
        return None
    tensor = tensor.double().reshape((1,) * (rank - tensor.dim()) + tuple(tensor.shape))
    shape, dynamic = shape_of(source), dynamic_axes(source)
    fits = all(size == 1 or (size == shape[i] and i not in dynamic and i > 0) for i, size in enumerate(tensor.shape))
    return tensor if fits else None


def _binary(combine: Callable[[Tensor, float], tuple[Tensor, Tensor]], reverse: Callable | None) -> Rule:
    """A rule for ``v ∘ constant`` and, where ``reverse`` is given, ``constant ∘ v``."""

    def rule(args: dict, constants: Constants, rank: int):
        left, right = args.get("input", args.get("self")), args["other"]
        alpha = args.get("alpha", 1)
        if args.get("rounding_mode") is not None:
            return None
        for source, other, form in ((left, right, combine), (right, left, reverse)):
            if form is None or not is_float(source) or source in constants:
                continue
            constant = _constant(other, constants, source, rank)
            if constant is not None and len(shape_of(source)) == rank:
                scale, shift = form(constant, float(alpha))
                return source, Affine.of(scale, shift, rank)
        return None

    return rule


_one = lambda c: torch.ones_like(c)  # noqa: E731 - names a constant in the table below
_zero = lambda c: torch.zeros_like(c)  # noqa: E731

_add = _binary(lambda c, alpha: (_one(c), alpha * c), lambda c, alpha: (alpha * _one(c), c))
_sub = _binary(lambda c, alpha: (_one(c), -alpha * c), lambda c, alpha: (-alpha * _one(c), c))
_rsub = _binary(lambda c, alpha: (-alpha * _one(c), c), lambda c, alpha: (_one(c), -alpha * c))
_mul = _binary(lambda c, alpha: (c, _zero(c)), lambda c, alpha: (c, _zero(c)))


def _div(args: dict, constants: Constants, rank: int):
    """Division by a constant without zeros."""
    found = _binary(lambda c, alpha: (1.0 / c, _zero(c)), None)(args, constants, rank)
    return found if found is None or bool(torch.isfinite(found[1].scale).all()) else None


def _negate(args: dict, constants: Constants, rank: int):
    return args.get("input", args.get("self")), Affine.identity(rank).negated()


def _same(args: dict, constants: Constants, rank: int):
    return args.get("input", args.get("self")), Affine.identity(rank)


def _single(args: dict, constants: Constants, rank: int):
    """A concatenation of one tensor."""
    return (args["tensors"][0], Affine.identity(rank)) if len(args["tensors"]) == 1 else None


def _dropout(args: dict, constants: Constants, rank: int):
    return None if args.get("train", args.get("training")) else _same(args, constants, rank)


def _addcmul(args: dict, constants: Constants, rank: int):
    """``c + value·a·v``."""
    base, a, b, value = args["self"], args["tensor1"], args["tensor2"], float(args.get("value", 1))
    source, factor = (a, b) if a not in constants else (b, a)
    if not is_float(source) or source in constants:
        return None
    scale, shift = _constant(factor, constants, source, rank), _constant(base, constants, source, rank)
    if scale is None or shift is None or len(shape_of(source)) != rank:
        return None
    return source, Affine.of(value * scale, shift, rank)


RULES: dict[str, Rule] = {
    "batch_norm": _batch_norm,
    "_batch_norm_with_update": _batch_norm,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "instance_norm": _batch_norm,
    "mul": _mul,
    "multiply": _mul,
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "rsub": _rsub,
    "div": _div,
    "divide": _div,
    "true_divide": _div,
    "neg": _negate,
    "negative": _negate,
    "addcmul": _addcmul,
    "dropout": _dropout,
    "feature_dropout": _dropout,
    "alpha_dropout": _dropout,
    "feature_alpha_dropout": _dropout,
    "native_dropout": _dropout,
    "alias": _same,
    "clone": _same,
    "contiguous": _same,
    "detach": _same,
    "positive": _same,
    "lift_fresh": _same,
    "lift_fresh_copy": _same,
    "to": _same,
    "_to_copy": _same,
    "type_as": _same,
    "expand_as": _same,
    "expand": _same,
    "view": _same,
    "reshape": _same,
    "flatten": _same,
    "squeeze": _same,
    "cat": _single,
}

#: Operators that are identities only when nothing about the tensor changes.
_IF_UNCHANGED = frozenset({"expand", "expand_as", "view", "reshape", "flatten", "squeeze"})

#: Operators of the ledger: folding these is what a user asked for; the others pass without a word.
REPORTED = frozenset(name for name, rule in RULES.items() if rule not in (_same, _dropout, _single))


def _maker(node: fx.Node) -> fx.Node:
    """The batch norm behind its first result: the core ATen forms return ``(output, mean, rstd)``."""
    if node.target is operator.getitem and node.args[1] == 0 and name_of(node.args[0]) in _WITH_STATISTICS:
        return node.args[0]
    return node


_WITH_STATISTICS = frozenset({"native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_with_update"})


def pending_rule(node: fx.Node, constants: Constants) -> tuple[fx.Node, Affine] | None:
    """``(operand, outer)`` for an operator that emits nothing, else None."""
    maker = _maker(node)
    rule = RULES.get(name_of(maker))
    if rule is None or not is_float(node):
        return None
    shape = shape_of(node)
    found = rule(bound(maker), constants, len(shape))
    if found is None or not is_float(found[0]) or found[0] in constants:
        return None
    if name_of(node) in _IF_UNCHANGED and shape_of(found[0]) != shape:
        return None
    return found if shape_of(found[0]) == shape else None
