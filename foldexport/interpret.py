"""The training graph, executed node by node in one float type.

The float rule: in a run at ``dtype`` every float tensor is of that type. Parameters and inputs are cast when they are
read, and a cast to any float type (``to``, ``type_as``, a ``dtype`` argument) is a cast to ``dtype``; integers and
booleans are left as they are. So a float64 run is the exact reference even of a network that rounds on its way.
With ``None`` for dtype every tensor has the type that the network gives it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from foldexport import bands
from foldexport.device import IEEE, full_float32, reduced_on_cpu
from foldexport.errors import ModelError, UsageError
from foldexport.trace import Graph
from foldexport.trace.views import bound, packet_name

aten = torch.ops.aten

_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64, torch.float16: torch.complex32}
Instead = Callable[[fx.Node, Sequence[Any], dict[str, Any]], Any]
# What torch says where an operator does not take a dtype or device.
_NO_KERNEL = ("not implemented for", "not supported", "Could not run")
_UNINITIALISED = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})


# ---- values


def steps(
    graph: Graph,
    inputs: Tensor | Sequence[Tensor],
    dtype: torch.dtype | None = torch.float64,
    *,
    device: str | torch.device = "cpu",
    instead: Instead | None = None,
) -> Iterator[tuple[fx.Node, Any]]:
    """Yields (node, value) for every node but the output, in graph order; values are freed after their last use.

    inputs: the graph's inputs, at any batch that it allows. Two tensors of the generator may share memory: write to
    none of them. A value that the caller keeps stays alive. instead: called with an operator's node, args and kwargs,
    gives its value, or None for the usual one.

    Raises UsageError where an operator has no kernel for dtype, or inputs do not fit.
    """
    given = _placed(graph, inputs, dtype, device)
    last = last_users(graph.fx)
    values: dict[fx.Node, Any] = {}
    for node in graph.fx.nodes:
        if node.op == "output":
            return
        if node.op == "placeholder":
            value = next(given)
        elif node.op == "get_attr":
            value = cast(graph.tensors[node.target], dtype, device)
        else:
            value = _called(node, values, dtype, device, instead)
        values[node] = value
        yield node, value
        del value
        for done in last.get(node, ()):
            del values[done]


def _called(node: fx.Node, values: dict[fx.Node, Any], dtype: torch.dtype | None, device: str | torch.device,
            instead: Instead | None) -> Any:  # fmt: skip
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    value = instead(node, args, kwargs) if instead is not None else None
    return evaluate(node, args, kwargs, dtype, device) if value is None else value


def outputs(
    graph: Graph,
    inputs: Tensor | Sequence[Tensor],
    dtype: torch.dtype | None = torch.float64,
    *,
    device: str | torch.device = "cpu",
    instead: Instead | None = None,
) -> list[Any]:
    """The graph's outputs as a flat list; ``tree_unflatten(…, graph.out_spec)`` of it is what forward returns."""
    result = graph.fx.output_node().args[0]
    wanted: dict[fx.Node, Any] = {}
    map_arg(result, lambda node: wanted.setdefault(node))
    for node, value in steps(graph, inputs, dtype, device=device, instead=instead):
        if node in wanted:
            wanted[node] = value
    return list(map_arg(result, wanted.__getitem__))


def cast(tensor: Tensor, dtype: torch.dtype | None, device: str | torch.device = "cpu") -> Tensor:
    """tensor as a run at dtype reads it: float (complex) tensors in dtype (its complex type), others unchanged."""
    return tensor.detach().to(device=device, dtype=_float_rule(tensor.dtype, dtype))


def evaluate(
    node: fx.Node,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    dtype: torch.dtype | None = torch.float64,
    device: str | torch.device = "cpu",
) -> Any:
    """The value of one ``call_function`` node on args and kwargs (tensors of dtype), under the float rule.

    Raises UsageError where the operator has no kernel for dtype on device.
    """
    args, kwargs = map_aggregate((tuple(args), dict(kwargs)), lambda a: _ruled(a, dtype, device))
    # Values are strided as the operators here leave them, which need not be as they were when traced.
    target = aten.reshape.default if node.target is aten.view.default else node.target
    try:
        with _exact(dtype, torch.device(device).type):
            banded = bands.convolution(target, args, kwargs)
            return target(*args, **kwargs) if banded is None else banded
    except (RuntimeError, NotImplementedError) as error:
        if not any(text in str(error) for text in _NO_KERNEL):
            raise
        kind = str(dtype or "its own dtype").removeprefix("torch.")
        raise UsageError(
            f"{described(node)} has no {kind} kernel on {device}, so the network cannot run in {kind}"
        ) from error


def _float_rule(found: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return found
    if found.is_floating_point:
        return dtype
    return _COMPLEX.get(dtype, found) if found.is_complex else found


def _ruled(argument: Any, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    if isinstance(argument, torch.dtype):
        return _float_rule(argument, dtype)
    return torch.device(device) if isinstance(argument, torch.device) else argument


def _placed(graph: Graph, inputs: Any, dtype: torch.dtype | None, device: str | torch.device) -> Iterator[Tensor]:
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if len(given) != len(graph.input_names):
        names = ", ".join(graph.input_names)
        raise UsageError(f"the network takes {len(graph.input_names)} inputs ({names}), not {len(given)}")
    return (cast(tensor, dtype, device) for tensor in given)


def last_users(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the nodes whose last use it is (a node that is not used is its own last)."""
    position = {node: at for at, node in enumerate(graph.nodes)}
    last: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        last.setdefault(max(node.users, key=position.__getitem__, default=node), []).append(node)
    return last


@contextlib.contextmanager
def _exact(dtype: torch.dtype | None, device: str) -> Iterator[None]:
    """No gradients, no TF32 or bfloat16 inside float32 products, deterministic kernels; dtype as the default type."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default)
    try:
        with torch.no_grad(), contextlib.ExitStack() as switched:
            if device == "cuda" or reduced_on_cpu():
                switched.enter_context(full_float32())
            if device == "cuda":
                switched.enter_context(torch.backends.cudnn.flags(
                    enabled=True, benchmark=False, deterministic=True, allow_tf32=False, fp32_precision=IEEE
                ))  # fmt: skip
            yield
    finally:
        torch.set_default_dtype(default)


# ---- what a node depends on


def constant_nodes(graph: Graph) -> set[fx.Node]:
    """The nodes that depend on parameters, buffers and numbers only: no input, nothing random or uninitialised."""
    constant: set[fx.Node] = set()
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif node.op == "call_function" and not is_random(node) and packet_name(node.target) not in _UNINITIALISED:
            if all(argument in constant for argument in node.all_input_nodes):
                constant.add(node)
    return constant


def is_random(node: fx.Node) -> bool:
    """Whether two runs of node may differ: dropout that is on, rrelu in training, samplers."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    args = bound(node)
    training = args.get("train", args.get("training"))
    if training is False:
        return False
    probability = args.get("p", args.get("dropout_p", args.get("dropout")))
    if "train" in args or "dropout_p" in args:
        return probability != 0
    return True


def random_nodes(graph: Graph) -> list[fx.Node]:
    """The nodes whose values differ from run to run, in graph order; their meta has the module and the source line."""
    return [node for node in graph.fx.nodes if node.op == "call_function" and is_random(node)]


def refuse_random(graph: Graph) -> None:
    """Raises ModelError, naming modules and source lines, if the network is not a deterministic function."""
    found = random_nodes(graph)
    if found:
        names = "; ".join(described(node) for node in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ModelError(
            f"the network is random in eval mode: {names}{more}. "
            "Switch it off there (F.dropout: training=self.training)"
        )


def described(node: fx.Node) -> str:
    """``'dropout' in module 'head' (net.py:12 in forward)``."""
    module, source = node.meta.get("module"), node.meta.get("source")
    where = f" in module '{module}'" if module else ""
    return f"'{packet_name(node.target)}'{where}" + (f" ({source})" if source else "")
