"""nn.Module and example input → Graph of functional ATen operators.

``torch.export`` traces at a batch of two or more (a batch of one specialises) with a symbolic batch where the network
allows, else at the example's own batch. What follows is ours: parameters get their names from the user's module,
in-place operators become functional (functional.py), and every node knows the module and source line it comes from.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import linecache
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from foldexport.errors import ModelError, TraceError, UsageError
from foldexport.trace.functional import functionalize
from foldexport.trace.views import NotFunctional, bound, packet_name

__all__ = ["Graph", "bound", "packet_name", "trace"]

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep
_OWN_DIR = os.path.dirname(os.path.dirname(__file__)) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_MAX_NAMES = 5


@dataclass(eq=False)
class Graph:
    """A network as functional ATen operators.

    fx holds placeholders (the user's inputs, in order), ``get_attr`` nodes (targets are keys of ``tensors``),
    ``call_function`` nodes and one output, whose argument is a flat list (``out_spec`` unflattens it). A node's meta:
    ``val`` (FakeTensor, SymInt or a tuple), ``module`` (the user's path, '' at top level), ``module_type``,
    ``source`` ("file.py:123 in forward", or '').
    """

    fx: fx.Graph
    tensors: dict[str, Tensor]
    input_names: list[str]
    out_spec: pytree.TreeSpec
    example: tuple[Tensor, ...]
    dynamic: dict[str, bool]


def trace(module: nn.Module, example: Tensor | tuple[Tensor, ...], *, dynamic: bool = True) -> Graph:
    """Traces module, in eval mode, on example; the module is not changed.

    example: the positional inputs of ``forward``. dynamic: ask for a symbolic batch axis; ``Graph.dynamic`` says
    whether the network allowed it.

    Raises ModelError (train mode), UsageError (example is no tensor, or its shape is rejected by the network) and
    TraceError (``torch.export`` cannot trace it), with the user's names and source line.
    """
    inputs = _checked(example)
    _refuse_train_mode(module)
    program, used, batched = _export(module, inputs, dynamic)
    try:
        graph, tensors = _functional_graph(module, program)
    except NotFunctional as first:
        graph, tensors = _decomposed_graph(module, program, first)
    names = [node.target for node in graph.find_nodes(op="placeholder")]
    return Graph(graph, tensors, names, program.call_spec.out_spec, used, {"batch": batched})


# ---- what the network and its example must be


def _checked(example: Any) -> tuple[Tensor, ...]:
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, (tuple, list)) or not inputs or not all(isinstance(i, Tensor) for i in inputs):
        found = type(example).__name__
        raise UsageError(f"the example input is {found}: give a tensor, or a tuple of the tensors that forward() takes")
    return tuple(i.detach() for i in inputs)


def _refuse_train_mode(module: nn.Module) -> None:
    modules = dict(module.named_modules())
    left = [name for name, child in modules.items() if child.training]
    if not left:
        return
    leaves = [name for name in left if not any(modules[name].children())] or left
    kinds = [type(modules[name]).__name__ for name in leaves[:_MAX_NAMES]]
    names = ", ".join(f"'{name}' ({kind})" if name else kind for name, kind in zip(leaves, kinds))
    more = f" and {len(leaves) - _MAX_NAMES} more" if len(leaves) > _MAX_NAMES else ""
    raise ModelError(
        f"{len(left)} of {len(modules)} modules are in train mode: {names}{more}. A fold needs eval mode: call .eval()"
    )


# ---- torch.export


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, log lines or graph printouts of torch.export: what matters is in its exception."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _export(
    module: nn.Module, inputs: tuple[Tensor, ...], dynamic: bool
) -> tuple[ExportedProgram, tuple[Tensor, ...], bool]:
    """The exported program, the inputs it was traced at, and whether its batch is symbolic.

    A network that fixes its batch (``x.view(4, -1)``, ``if len(x) > 4``) breaks the promise of ``Dim("batch")``, which
    torch.export reports; ``Dim.AUTO`` would narrow the axis silently.
    """
    attempts = [(*_batched(inputs, share), True) for share in (True, False)] if dynamic else []
    attempts = [a for at, a in enumerate(attempts) if any(a[1]) and a[1] not in [b[1] for b in attempts[:at]]]
    attempts.append((inputs, None, False))
    errors = []
    for strict in (False, True):
        for used, shapes, batched in attempts:
            try:
                with _quiet():
                    program = torch.export.export(module, used, dynamic_shapes=shapes, strict=strict)
                return program, used, batched
            except Exception as error:  # torch.export raises whatever the network, dynamo or sympy raised
                errors.append(error)
        if not strict:
            _refuse_shape(module, inputs)
    raise _untraceable(module, errors[len(attempts) - 1])


def _batched(
    inputs: tuple[Tensor, ...], share: bool
) -> tuple[tuple[Tensor, ...], tuple[dict[int, Dim], ...]]:
    """The inputs at a batch of two or more, and per input its dynamic axes: axis 0 of the first input, and, if share,
    of every input whose axis 0 is as long."""
    batch = inputs[0].shape[0] if inputs[0].ndim else 0
    has_batch = [batch > 0 and i.ndim > 0 and i.shape[0] == batch and (share or i is inputs[0]) for i in inputs]
    used = tuple(torch.cat([i, i]) if batch == 1 and has else i for i, has in zip(inputs, has_batch))
    axis = Dim("batch", min=1)
    return used, tuple({0: axis} if has else {} for has in has_batch)


def _refuse_shape(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raises UsageError if the plain network cannot run on inputs either (on copies of them and of its buffers)."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with _quiet():
            torch.func.functional_call(module, buffers, tuple(i.clone() for i in inputs))
    except Exception as error:  # whatever the user's forward raises
        shapes = ", ".join("x".join(map(str, i.shape)) or "scalar" for i in inputs)
        raise UsageError(
            f"the network rejects input shape {shapes}: {_first_line(error)}{_where(error)}; pass --input-shape"
        ) from error


def _untraceable(module: nn.Module, error: BaseException) -> TraceError:
    text = str(error)
    hint = "rewrite that line with tensor operators only, or trace the part of the network without it"
    if "data-dependent" in text.lower():
        hint = "a branch or size depends on the input's values: use torch.where, or a fixed size"
    name = type(module).__name__
    return TraceError(f"torch.export cannot trace {name}{_where(error)}: {_first_line(error)}\n{hint}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."


def _where(error: BaseException) -> str:
    """`` at net.py:12 in forward (`if x.sum() > 0:`)``: the last frame that is neither torch's nor ours."""
    frames = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(error.__traceback__)]
    frames += [(file, int(line), name) for file, line, name in _FRAME.findall(str(error))]
    users = [frame for frame in frames if _is_users(frame[0])]
    if not users:
        return ""
    file, line, name = users[-1]
    code = linecache.getline(file, line or 0).strip()
    return f" at {os.path.basename(file)}:{line} in {name}" + (f" (`{code}`)" if code else "")


def _is_users(file: str) -> bool:
    return not file.startswith((_TORCH_DIR, _OWN_DIR, "<", "torch/"))


# ---- the exported program as a Graph


def _functional_graph(module: nn.Module, program: ExportedProgram) -> tuple[fx.Graph, dict[str, Tensor]]:
    _describe(program.graph_module)
    signature = program.graph_signature
    users = [spec.arg.name for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
    names = dict(zip(users, _input_names(module, users)))
    results = {at for at, spec in enumerate(signature.output_specs) if spec.kind == OutputKind.USER_OUTPUT}
    constants, tensors = _constants(program)
    graph = functionalize(program.graph_module, names, constants, results)
    used = {node.target for node in graph.find_nodes(op="get_attr")}
    return graph, {name: tensor for name, tensor in tensors.items() if name in used}


def _decomposed_graph(
    module: nn.Module, program: ExportedProgram, first: NotFunctional
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The last resort, where functional.py has no form: PyTorch's own functionalization, slow on deep networks."""
    refusal = f"cannot trace {type(module).__name__}: {first}"
    try:
        with _quiet():
            graph, tensors = _functional_graph(module, program.run_decompositions({}))
    except Exception as error:  # NotFunctional again, or whatever PyTorch's functionalization raises
        raise TraceError(refusal) from error
    if any(_has_fixed_sizes(node) for node in graph.nodes):
        raise TraceError(refusal)
    return graph, tensors


def _has_fixed_sizes(node: fx.Node) -> bool:
    """Whether node is what functionalization writes for a view without inverse: with the traced batch as a number."""
    name = packet_name(node.target) if node.op == "call_function" else ""
    return name.startswith("as_strided") or name.endswith("_backward")


def _input_names(module: nn.Module, placeholders: list[str]) -> list[str]:
    """forward()'s own argument names; torch.export's for ``*args``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]
    return own[: len(placeholders)] + placeholders[len(own) :]


def _constants(program: ExportedProgram) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Placeholder name -> the user's tensor name (the first of tied ones), and name -> tensor."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    names: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind not in kinds:
            continue
        store = program.state_dict if spec.target in program.state_dict else program.constants
        tensor = store[spec.target]
        name = first.setdefault(id(tensor), spec.target)
        names[spec.arg.name] = name
        tensors[name] = tensor.detach()
    for name, tensor in program.graph_module.named_buffers():
        names.setdefault(name, name)
        tensors.setdefault(name, tensor.detach())
    return names, tensors


def _describe(graph_module: fx.GraphModule) -> None:
    """Gives every node its ``module``, ``module_type`` and ``source``, in nested graphs too."""
    cache: dict[str, str] = {}
    for part in graph_module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        for node in part.graph.nodes:
            node.meta["module"], node.meta["module_type"] = _module_of(node)
            trace_text = node.meta.get("stack_trace") or ""
            if trace_text not in cache:
                cache[trace_text] = _source_of(trace_text)
            node.meta["source"] = cache[trace_text]


def _module_of(node: fx.Node) -> tuple[str, str]:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack or "_empty_nn_module_stack" in str(stack[-1][0]):
        return "", ""
    path, kind = stack[-1]
    path = re.sub(r"@\d+", "", path).removeprefix("L['self']").lstrip(".")
    # features[:3] is a Sequential of its own, whose children keep their keys
    path = re.sub(r"\.?slice\([^)]*\)", "", path).lstrip(".")
    kind = kind if isinstance(kind, str) else kind.__name__
    return path, kind.rpartition(".")[2]


def _source_of(stack_trace: str) -> str:
    users = [frame for frame in _FRAME.findall(stack_trace) if _is_users(frame[0])]
    if not users:
        return ""
    file, line, name = users[-1]
    return f"{os.path.basename(file)}:{line} in {name}"
