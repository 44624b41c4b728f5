"""nn.Module and example input → Graph of functional ATen operators.

``torch.export`` traces at a batch of two or more (a batch of one specialises) with a symbolic batch where the network
allows, else at the example's own batch (exporting.py has the ways that are tried). What follows is ours: parameters get
their names from the user's module (naming.py), in-place operators become functional (functional.py), and every node knows
the module and source line it comes from. The user's module is left as it was (kept.py).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from foldexport.errors import FoldexportError, ModelError, TraceError, UsageError
from foldexport.normalise import Raw, named_as_before
from foldexport.trace.calling import (
    ByKeyword,
    Inputs,
    answer_hidden_methods,
    keywords_of,
    refuse_hidden_methods,
    run,
    unwrapped,
)
from foldexport.trace.explain import FIRST_LINE, first_line, untraceable
from foldexport.trace.exporting import Exported, Failed, export, is_too_deep, quiet
from foldexport.trace.floors import by_positive_numbers
from foldexport.trace.forward import Untraceable
from foldexport.trace.functional import functionalize
from foldexport.trace.kept import kept
from foldexport.trace.naming import describe, input_names, weights_of
from foldexport.trace.rejected import rejected
from foldexport.trace.repeatable import refuse_changing, same_values
from foldexport.trace.scripted import unscript_parts, unscripted
from foldexport.trace.views import NotFunctional, bound, packet_name

__all__ = ["Graph", "bound", "packet_name", "trace"]

_MAX_NAMES = 5
_DEEP_LIMIT = 50_000  # of Python frames, in the thread that traces networks nested deeper than the usual thousand
_DEEP_STACK = 1 << 29  # bytes


@dataclass(eq=False)
class Graph:
    """A network as functional ATen operators.

    fx holds placeholders (the user's inputs, in order), ``get_attr`` nodes (targets are keys of ``tensors``),
    ``call_function`` nodes and one output, whose argument is a flat list (``out_spec`` unflattens it). A node's meta:
    ``val`` (FakeTensor, SymInt or a tuple), ``module`` (the user's path, '' at top level), ``module_type``,
    ``source`` ("file.py:123 in forward", or '').

    module: what was traced and takes the graph's inputs in their order: the user's network without ``nn.DataParallel``
    and the like, in Python where it is TorchScript. notes: what tracing fixed or left out, and where. raw: the pixels that it
    takes, where it begins with their normalisation.
    """

    fx: fx.Graph
    tensors: dict[str, Tensor]
    input_names: list[str]
    out_spec: pytree.TreeSpec
    example: tuple[Tensor, ...]
    dynamic: dict[str, bool]
    module: nn.Module | None = None
    notes: list[str] = field(default_factory=list)
    raw: Raw | None = None


def trace(
    module: nn.Module, example: Tensor | tuple[Tensor, ...], *, dynamic: bool = True, free: Collection[str] = ()
) -> Graph:
    """Traces module, in eval mode, on example; the module is not changed.

    example: the inputs of ``forward``, by position; those that it takes by keyword come last. dynamic: ask for a symbolic
    batch axis; free: "height", "width" where those are to be symbolic too, so that sizes which the network reads are operators of
    the graph and no numbers. ``Graph.dynamic`` says which of them the network allowed.

    Raises ModelError (train mode, another result at each call), UsageError (example is no tensor, either is on a GPU, or the
    network does not run on it) and TraceError (it cannot be traced), with the user's names and source line.
    """
    inputs = _checked(example)
    network = unwrapped(module)
    if isinstance(network, torch.jit.ScriptModule):
        network = _in_python(network, inputs)
    refuse_hidden_methods(network)
    _refuse_train_mode(network)
    _refuse_lazy(network)
    _refuse_gpu(network, inputs)
    try:
        return _traced(network, inputs, dynamic, free)
    except Exception as error:
        if not is_too_deep(error) or isinstance(error, FoldexportError):
            raise
    _refuse_too_deep(network, inputs)
    return _in_thread(lambda: _traced(network, inputs, dynamic, free))


def _traced(module: nn.Module, inputs: Inputs, dynamic: bool, free: Collection[str]) -> Graph:
    keywords = keywords_of(module, len(inputs))
    space = [axis for axis in free if axis in ("height", "width")]
    with kept(module) as drawn:
        answer_hidden_methods(module)
        unscript_parts(module)
        exported = export(module, inputs, keywords, dynamic, lambda: _plain(module, inputs, keywords), space)
        if isinstance(exported, Failed):
            raise untraceable(module, exported) from exported.errors[0][1]
        graph = _graph(module, exported, keywords)
    refuse_changing(module, inputs, keywords, exported.changed, drawn)
    return graph


def _graph(module: nn.Module, exported: Exported, keywords: tuple[str, ...]) -> Graph:
    program = exported.program
    try:
        graph, tensors = _functional_graph(module, program, keywords)
    except NotFunctional as first:
        graph, tensors = _decomposed_graph(module, program, keywords, first)
    names = [node.target for node in graph.find_nodes(op="placeholder")]
    called = ByKeyword(module, keywords) if keywords else module
    found = Graph(
        graph, tensors, names, program.call_spec.out_spec, exported.used, {}, called, exported.notes
    )
    found.dynamic.update({"batch": "batch" in exported.symbolic} | dict.fromkeys(exported.symbolic, True))
    return named_as_before(found, module)


# ---- what the network and its example must be


def _checked(example: Any) -> Inputs:
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


def _refuse_lazy(module: nn.Module) -> None:
    found = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if found:
        names = ", ".join(f"'{name}'" for name in found[:_MAX_NAMES])
        raise ModelError(
            f"{type(module).__name__} has lazy layers whose weights have no shape yet: {names}.\n"
            "Load its checkpoint, or call it once on an input."
        )


def _refuse_gpu(module: nn.Module, inputs: Inputs) -> None:
    """Raises UsageError for tensors on another device: the fold, its probes and its proof are float64 on the CPU."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors |= {f"input {place}": value for place, value in enumerate(inputs)}
    there = next((name for name, tensor in tensors.items() if tensor.device.type not in ("cpu", "meta")), None)
    if there is not None:
        raise UsageError(
            f"'{there}' is on {tensors[there].device}: a fold is made and proved on the CPU. Call .cpu() on the network and its "
            'inputs; foldexport.export(…, device="cuda") then runs both networks and the file on the GPU'
        )


def _in_python(source: torch.jit.ScriptModule, inputs: Inputs) -> nn.Module:
    """A TorchScript module as a Python module, checked against it on inputs.

    Raises UsageError where it does not run, TraceError where the two differ.
    """
    try:
        with quiet():
            wanted = source(*(i.clone() for i in inputs))
    except Exception as error:  # whatever TorchScript raises
        raise rejected(source, inputs, error) from error
    network, why = unscripted(source), "run operator by operator, its TorchScript gives another result"
    try:
        with quiet():
            if same_values(pytree.tree_leaves(network(*(i.clone() for i in inputs))), pytree.tree_leaves(wanted)):
                return network
    except Exception as error:  # an operator of TorchScript's own
        why = error.why if isinstance(error, Untraceable) else first_line(error)
    raise TraceError(f"cannot trace {source.original_name}: {why}.\nGive the Python module it was made from.")


def _refuse_too_deep(module: nn.Module, inputs: Inputs) -> None:
    """Raises ModelError where the plain network meets Python's recursion limit too: tracing only needs more of it."""
    try:
        _plain(module, inputs, keywords_of(module, len(inputs)))
    except Exception as error:
        if not is_too_deep(error):
            raise
        raise ModelError(
            f"{type(module).__name__} does not run: its calls are nested deeper than Python's limit of {sys.getrecursionlimit()}.\n"
            "Call sys.setrecursionlimit with a larger number where it is built, or put its layers in one nn.Sequential."
        ) from error


def _plain(module: nn.Module, inputs: Inputs, keywords: tuple[str, ...]) -> Any:
    """What the plain network gives; raises UsageError where it cannot run either."""
    try:
        with kept(module), quiet():
            return run(module, inputs, keywords)[0]
    except Exception as error:  # whatever the user's forward raises
        if is_too_deep(error):
            raise
        raise rejected(module, inputs, error) from error


def _in_thread(work: Callable[[], Any]) -> Any:
    """What work gives, run in a thread with room for deeper calls than the main thread has."""
    results: list[Any] = []
    errors: list[Exception] = []

    def target() -> None:
        try:
            results.append(work())
        except Exception as error:  # raised again in the caller's thread
            errors.append(error)

    limit, size = sys.getrecursionlimit(), threading.stack_size(_DEEP_STACK)
    try:
        sys.setrecursionlimit(max(limit, _DEEP_LIMIT))
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    finally:
        sys.setrecursionlimit(limit)
        threading.stack_size(size)
    if errors:
        raise errors[0]
    return results[0]


# ---- the exported program as a Graph


def _functional_graph(
    module: nn.Module, program: ExportedProgram, keywords: tuple[str, ...]
) -> tuple[fx.Graph, dict[str, Tensor]]:
    describe(program.graph_module)
    signature = program.graph_signature
    users = [spec.arg.name for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
    names = dict(zip(users, input_names(module, users, keywords)))
    results = {at for at, spec in enumerate(signature.output_specs) if spec.kind == OutputKind.USER_OUTPUT}
    constants, tensors = weights_of(program)
    graph = functionalize(program.graph_module, names, constants, results)
    by_positive_numbers(graph)
    used = {node.target for node in graph.find_nodes(op="get_attr")}
    return graph, {name: tensor for name, tensor in tensors.items() if name in used}


def _decomposed_graph(
    module: nn.Module, program: ExportedProgram, keywords: tuple[str, ...], first: NotFunctional
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The last resort, where functional.py has no form: PyTorch's own functionalization, slow on deep networks."""
    refusal = f"cannot trace {type(module).__name__}: {first}"
    refusal = refusal if len(refusal) <= FIRST_LINE else refusal.replace("; ", "\n", 1)

    def decomposed() -> tuple[fx.Graph, dict[str, Tensor]]:
        with quiet():
            return _functional_graph(module, program.run_decompositions({}), keywords)

    try:
        # In a thread of its own: a failure under torch.func leaves the levels it entered behind, which are a thread's.
        graph, tensors = _in_thread(decomposed)
    except Exception as error:  # NotFunctional again, or whatever PyTorch's functionalization raises
        raise TraceError(refusal) from error
    if any(_has_fixed_sizes(node) for node in graph.nodes):
        raise TraceError(refusal)
    return graph, tensors


def _has_fixed_sizes(node: fx.Node) -> bool:
    """Whether node is what functionalization writes for a view without inverse: with the traced batch as a number."""
    name = packet_name(node.target) if node.op == "call_function" else ""
    return name.startswith("as_strided") or name.endswith("_backward")
