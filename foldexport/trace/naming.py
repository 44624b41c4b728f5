"""What the parts of an exported program are called in the user's code: inputs, weights, modules, source lines."""

from __future__ import annotations

import inspect
import re

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from foldexport.trace.user_code import last_user_frame


def input_names(module: nn.Module, placeholders: list[str], keywords: tuple[str, ...] = ()) -> list[str]:
    """forward()'s own argument names; torch.export's for ``*args``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = len(placeholders) - len(keywords)
    own = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds][:first]
    return [*own, *placeholders[len(own) : first], *keywords]


def weights_of(program: ExportedProgram) -> tuple[dict[str, str], dict[str, Tensor]]:
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


def describe(graph_module: fx.GraphModule) -> None:
    """Gives every node its ``module``, ``module_type`` and ``source``, in nested graphs too."""
    cache: dict[str, str] = {}
    for part in graph_module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        for node in part.graph.nodes:
            node.meta["module"], node.meta["module_type"] = _module_of(node)
            trace_text = node.meta.get("stack_trace") or ""
            if trace_text not in cache:
                cache[trace_text] = last_user_frame(trace_text)
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
