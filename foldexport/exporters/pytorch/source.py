"""A folded module as the text of a Python file and the tensors that lie beside it."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Sequence

from torch import Tensor, fx, nn

from foldexport.errors import UsageError
from foldexport.exporters.pytorch import MARK
from foldexport.exporters.pytorch.forward import Body, body_of
from foldexport.exporters.pytorch.layers import constructor

WIDTH = 110  # of a line
HEADER = '''"""Folded network: {summary}.

{mark}. Needs torch and safetensors only. The weights lie beside it: its name with ".safetensors" added.

    network = load()  # in eval mode; call network.train() to go on training
    output = network({arguments})  # {shapes}
"""

{imports}


'''
FOOTER = '''

def load(path=None):
    """The network in eval mode, with the weights at ``path``: by default those beside this file."""
    network = {build}()
    network.load_state_dict(load_file(path or __file__ + ".safetensors"))
    return network.eval()
'''


def written(module: nn.Module, example: tuple, axes: Sequence[dict[int, str]]) -> tuple[str, dict[str, Tensor]]:
    """The file's text and its tensors, by the names of the file's own modules.

    axes: of every input, those that are free. Raises :class:`UsageError` for a network that plain PyTorch calls do not say.
    """
    if is_chain(module):
        definition, tensors, names = _chain(module), _tensors(module, ""), ["x"]
    else:
        body = body_of(_graph(module))
        definition, tensors, names = _class(body), body.tensors, body.inputs
    build = "build" if definition.startswith("def") else "Network"
    shapes = [[axis.get(place, size) for place, size in enumerate(value.shape)] for value, axis in zip(example, axes)]
    text = HEADER.format(
        mark=MARK, summary=_summary(definition, tensors), arguments=", ".join(names), imports=_imports(definition),
        shapes=", ".join(f"{name}: [{', '.join(map(str, shape))}]" for name, shape in zip(names, shapes)),
    )  # fmt: skip
    text += definition + FOOTER.format(build=build)
    ast.parse(text)
    return text, tensors


def is_chain(module: nn.Module) -> bool:
    """Whether it is ``nn.Sequential`` all the way down to layers of torch.nn."""
    return type(module) is nn.Sequential and all(
        is_chain(child) or (getattr(nn, type(child).__name__, None) is type(child) and not list(child.children()))
        for child in module
    )


def _tensors(layer: nn.Module, prefix: str) -> dict[str, Tensor]:
    """What ``state_dict`` holds, each with memory of its own."""
    return {prefix + name: value.detach().clone().contiguous() for name, value in layer.state_dict().items()}


def _graph(module: nn.Module) -> fx.GraphModule:
    """The module as a graph of layers: itself, or for one that was not folded what a trace finds."""
    if isinstance(module, fx.GraphModule):
        return module
    try:
        return fx.symbolic_trace(module)
    except Exception as error:  # the tracer passes on whatever the module's own forward raised
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            "pytorch: this network is not folded, and as it is it cannot be written as plain source "
            f"({lines[0].partition('. ')[0]}); leave --no-fold out, or use onnx."
        ) from error


def _chain(module: nn.Sequential) -> str:
    return f"def build():\n    return {_sequential(module, '', 4)}\n"


def _sequential(module: nn.Sequential, path: str, indent: int) -> str:
    """On one line where it fits; numbered layers by position, named ones by name."""
    names = list(module._modules)
    numbered = names == [str(place) for place in range(len(names))]
    keyed = all(name.isidentifier() for name in names)
    inner = indent + 4
    parts = []
    for name, child in module._modules.items():
        where = f"{path}.{name}".lstrip(".")
        text = _sequential(child, where, inner) if isinstance(child, nn.Sequential) else constructor(child, where)
        parts.append(text if numbered else f"{name}={text}" if keyed else f'("{name}", {text})')
    opening, closing = ("", "") if numbered else ("OrderedDict(", ")") if keyed else ("OrderedDict([", "])")
    line = f"nn.Sequential({opening}{', '.join(parts)}{closing})"
    if indent + len(line) < WIDTH and "\n" not in line and len(parts) <= 3 and indent > 4:
        return line
    lines = "".join(f"{' ' * inner}{part},\n" for part in parts)
    return f"nn.Sequential({opening}\n{lines}{' ' * indent}{closing})"


def _class(body: Body) -> str:
    def block(lines: Sequence[str]) -> str:
        return "".join(f"        {part}\n" for line in lines for part in _wrapped(line))

    signature = ", ".join(["self", *body.inputs])
    layers = f"    def __init__(self):\n        super().__init__()\n{block(body.layers)}\n"
    return f"class Network(nn.Module):\n{layers}    def forward({signature}):\n{block(body.lines)}"


def _wrapped(line: str) -> list[str]:
    """A long line in several: within the brackets that it opens, Python allows a break at any space."""
    if len(line) <= WIDTH or "(" not in line:
        return [line]
    parts = textwrap.wrap(line, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    try:
        ast.parse("def f(self):\n" + "".join(f"    {part}\n" for part in parts))
    except SyntaxError:  # a break outside of every bracket
        return [line]
    return parts


def _imports(definition: str) -> str:
    """Those that the text uses, in the usual order."""
    wanted = [("OrderedDict(", "from collections import OrderedDict\n"), ("torch.", "import torch"),
              ("F.", "import torch.nn.functional as F")]  # fmt: skip
    first, *others = [line if mark in definition else "" for mark, line in wanted]
    lines = [*(line for line in others if line), "from safetensors.torch import load_file", "from torch import nn"]
    return (first and first + "\n") + "\n".join(sorted(lines, key=lambda line: (line.startswith("from"), line)))


def _summary(definition: str, tensors: dict[str, Tensor]) -> str:
    """Counts of layers with weights, in words."""
    found = []
    for name, mark in (("convolution", "nn.Conv"), ("linear layer", "nn.Linear("), ("batch norm", "nn.BatchNorm")):
        count = definition.count(mark)
        if count:
            found.append(f"{count} {name}{'s' if count > 1 else ''}")
    floats = [each for each in tensors.values() if each.is_floating_point() or each.is_complex()]
    types = sorted({str(each.dtype).removeprefix("torch.") for each in floats})
    found.append(f"{sum(each.numel() for each in floats):,} weights{' in ' + ' and '.join(types) if types else ''}")
    return ", ".join(found)
