"""Example inputs for tracing, and whether a network takes other sizes than its example."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldexport.errors import UsageError
from foldexport.exporters.options import ExportOptions

ONE_FILE_BYTES = 2**31 - 2**25  # the limit of protobuf and FlatBuffers, less room for the graph
SECOND_SIZE = {"batch": 1, "height": 32, "width": 64}  # added to an axis; unequal, and multiples of the usual strides


def traceable(example: tuple, options: ExportOptions) -> tuple:
    """The example with a batch of at least two where the batch is to be free.

    Tracers take a length of one for a constant.
    """
    if "batch" not in options.dynamic:
        return example
    return tuple(_doubled(value) if _has_batch(value) and value.shape[0] == 1 else value for value in example)


def require_free_axes(module: nn.Module, example: tuple, options: ExportOptions) -> None:
    """Raise :class:`UsageError` when the network refuses another height or width that was asked to be free.

    A graph can carry free axes and yet work at one size only (a flatten before a linear layer): the network is asked.
    """
    asked = [axis for axis in ("height", "width") if axis in options.dynamic]
    for axis in asked:
        other = tuple(_resized(value, axis, options) for value in example)
        if all(a is b for a, b in zip(other, example, strict=True)):
            raise UsageError(f"--dynamic {axis}: no input of this network has a {axis}; ask for --dynamic batch.")
        try:
            with torch.no_grad():
                module(*other)
        except Exception as error:  # whatever the user's own forward raises on a size that it does not take
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            sizes = ", ".join("x".join(map(str, value.shape)) for value in other if isinstance(value, Tensor))
            message = f"--dynamic {axis}: the network refuses an input of {sizes} ({reason}): ask for --dynamic batch."
            raise UsageError(message) from error


def require_one_file(name: str, module: nn.Module) -> None:
    """Raise :class:`UsageError` where the weights do not fit into the one file that a format has."""
    tensors = {id(each): each for each in (*module.parameters(), *module.buffers())}
    size = sum(each.numel() * each.element_size() for each in tensors.values())
    if size > ONE_FILE_BYTES:
        raise UsageError(f"{name}: it is one file of at most 2 GB, and the weights are {size / 2**30:.1f} GiB: export to onnx.")


def _has_batch(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _doubled(value: Tensor) -> Tensor:
    return torch.cat([value, value])


def _resized(value: object, name: str, options: ExportOptions) -> object:
    """The value with zeros added at the end of the named axis; itself where it has no such axis."""
    if not isinstance(value, Tensor):
        return value
    for axis, each in options.dynamic_axes(value.shape).items():
        if each == name:
            more = list(value.shape)
            more[axis] = SECOND_SIZE[name]
            return torch.cat([value, value.new_zeros(more)], axis)
    return value
