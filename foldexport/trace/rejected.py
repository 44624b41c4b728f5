"""Why the plain network cannot run on its inputs: the wrong shape, or a mistake that has nothing to do with tracing."""

from __future__ import annotations

import ast
import re

from torch import Tensor, nn

from foldexport.errors import UsageError
from foldexport.trace.calling import Inputs, parameters_of
from foldexport.trace.explain import first_line, headline, whose
from foldexport.trace.user_code import Place, enclosing, names_of, place_of

_CHANNELS = re.compile(r"expected input\[([\d, ]+)\] to have (\d+) channels, but got (\d+) channels")
_MISTAKES = (AttributeError, NameError, ImportError, NotImplementedError, KeyError)


class OtherType(UsageError):
    """An input of integers for a network of floats. found, wanted: the types, "uint8" and "float32"."""

    def __init__(self, message: str, found: str, wanted: str) -> None:
        super().__init__(message)
        self.found, self.wanted = found, wanted


def rejected(module: nn.Module, inputs: Inputs, error: Exception) -> UsageError:
    """The error for a network whose forward raises ``error`` on inputs."""
    place = place_of(error, names_of(module))
    shapes = ", ".join("x".join(map(str, i.shape)) or "scalar" for i in inputs)
    text, name = first_line(error), type(module).__name__
    if re.search(r"CUDA|NVIDIA|cuda|No HIP GPUs|MPS", text):
        return _fails(name, place, "no GPU", f"{text}. Move tensors to the weights: x.to(self.weight.device), not .cuda()")
    keys = _keys_of_input(place, error)
    if keys:
        wanted = ", ".join(f'"{key}": {key}' for key in keys)
        names = ", ".join(keys)
        return _fails(
            name, place, "a dict is wanted",
            f"forward() takes a dict with the keys {names}, and here inputs are tensors, one after the other. "
            f"Name a network with --arch that calls it: forward(self, {names}): return self.network({{{wanted}}})",
        )  # fmt: skip
    if isinstance(error, NotImplementedError) and "forward" in text:
        return _fails(name, place, "no forward", f"{name} has no forward(). Name the class that has one with --arch")
    if isinstance(error, _MISTAKES):
        return _fails(name, place, type(error).__name__, f"{text}. The network does not run as it stands, traced or not")
    if re.search(r"(Input|same) (d?type|tensor)|expected scalar type|have the same dtype", text):
        kinds = ", ".join(_type(i) for i in inputs)
        weights = [each for each in module.parameters() if each.is_floating_point()]
        if weights and not any(i.is_floating_point() for i in inputs):
            wanted = _type(weights[0])
            said = f"{text}. The input is {kinds}; the network takes {wanted}: give it that, or cast it in forward"
            return OtherType(str(_fails(name, place, "types differ", said)), kinds, wanted)
        return _fails(name, place, "types differ", f"{text}. The input is {kinds}: cast it in forward, x.to(self.weight.dtype)")
    channels = _channels(text, inputs)
    if channels:
        said = f"{channels} at {place}" if place is not None else channels
        return UsageError(f"the network rejects input shape {shapes}: {said}; give it such inputs by --input-shape or --data")
    takes = f"; forward takes {parameters_of(module)}, one --input-shape for each" if _is_about_arguments(error, place) else ""
    where = f" at {place}" + (f" (`{place.code}`)" if place.code else "") if place is not None else ""
    said = text if str(error).strip() else f"{type(error).__name__}"
    return UsageError(f"the network rejects input shape {shapes}: {said}{where}{takes}; pass --input-shape")


def _channels(text: str, inputs: Inputs) -> str:
    """ "it takes 3 channels, this input has 1", where PyTorch's message says so of an input itself."""
    found = _CHANNELS.search(text)
    shape = [int(size) for size in found[1].split(",")] if found else []
    if found is None or not any(list(each.shape) == shape for each in inputs):
        return ""
    return f"it takes {found[2]} channels, this input has {found[3]}"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _fails(name: str, place: Place | None, what: str, why: str) -> UsageError:
    return UsageError(f"{headline(f'{name} does not run', place, what)}\n{whose(place)}{why}.")


def _is_about_arguments(error: Exception, place: Place | None) -> bool:
    return isinstance(error, TypeError) and "argument" in str(error) and place is None


def _keys_of_input(place: Place | None, error: Exception) -> list[str]:
    """The names by which forward indexes its argument, where it does and an index failed."""
    if place is None or not isinstance(error, IndexError | TypeError | KeyError):
        return []
    function = enclosing(place, ast.FunctionDef)
    if function is None or function.name != "forward":
        return []
    arguments = {each.arg for each in function.args.args[1:]}
    found = [
        node for node in ast.walk(function)
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", None) in arguments
        and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
    ]  # fmt: skip
    found.sort(key=lambda node: (node.lineno, node.col_offset))
    return list(dict.fromkeys(node.slice.value for node in found))
