"""A program of Core ML computed with PyTorch in float64, operator by operator, by the definitions of MIL's operators.

It starts from the bytes of the package, so that what coremltools wrote is what is computed: kernels, strides, pads, order. It says
nothing of Core ML's own arithmetic. Definitions: coremltools' reference "MIL Ops", iOS 15 and iOS 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foldexport.exporters.coreml import package

Inputs = dict[str, Any]


class Unknown(ValueError):
    """An operator, or a setting of one, that is not computed here."""


def program(path: Path, spec: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of the program for float64 inputs, in the package's order. Raises :class:`Unknown`."""
    file = path / package.WEIGHTS
    content = file.read_bytes() if file.is_file() else b""
    values: dict[str, Any] = dict(zip((each.name for each in spec.description.input), inputs, strict=True))
    for operation in package.block(spec).operations:
        name = operation.outputs[0].name
        if operation.type == "const":
            values[name] = _exact(package.value(operation.attributes["val"], content))
            continue
        if operation.type not in OPERATORS:
            raise Unknown(f"{operation.type} is not known here")
        given = {key: _argument(held, values, content) for key, held in operation.inputs.items()}
        made = OPERATORS[operation.type](given)
        made = made if isinstance(made, list | tuple) else [made]
        values.update((output.name, each) for output, each in zip(operation.outputs, made, strict=True))
    return [values[each.name] for each in spec.description.output]


def _argument(held: Any, values: dict[str, Any], content: bytes) -> Any:
    found = [values[each.name] if each.name else _exact(package.value(each.value, content)) for each in held.arguments]
    return found[0] if len(found) == 1 else found


def _exact(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    tensor = torch.from_numpy(np.array(value))
    return tensor.double() if tensor.is_floating_point() else tensor


def _list(value: Any, default: Sequence[int] = ()) -> list[int]:
    if value is None:
        return list(default)
    return [int(each) for each in (value if isinstance(value, list) else value.reshape(-1).tolist())]


def _number(value: Any, default: Any = None) -> Any:
    return default if value is None else value.item() if isinstance(value, Tensor) else value


def _padded(x: Tensor, given: Inputs, kernel: Sequence[int], fill: float) -> Tensor:
    """``pad``: before and after each spatial axis."""
    kind = given.get("pad_type", "valid")
    if kind not in ("valid", "custom"):
        raise Unknown(f"pad_type {kind} is not known here")
    pads = _list(given.get("pad")) if kind == "custom" else []
    if not any(pads):
        return x
    pairs = [pads[at : at + 2] for at in range(0, len(pads), 2)]
    return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=fill)


def _conv(given: Inputs) -> Tensor:
    weight, rank = given["weight"], given["weight"].dim() - 2
    ones = [1] * rank
    x = _padded(given["x"], given, weight.shape[2:], 0.0)
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    strides, dilations = _list(given.get("strides"), ones), _list(given.get("dilations"), ones)
    return function(x, weight, given.get("bias"), strides, 0, dilations, _number(given.get("groups"), 1))


def _conv_transpose(given: Inputs) -> Tensor:
    """The full transposed convolution, cropped by ``pad``; ``output_shape`` adds what a stride leaves open at the end."""
    x, weight, rank = given["x"], given["weight"], given["weight"].dim() - 2
    ones = [1] * rank
    strides, dilations = _list(given.get("strides"), ones), _list(given.get("dilations"), ones)
    pads = _list(given.get("pad"), [0] * 2 * rank) if given.get("pad_type", "valid") == "custom" else [0] * 2 * rank
    shape = _list(given.get("output_shape"))[2:]
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    made = function(x, weight, given.get("bias"), strides, 0, 0, _number(given.get("groups"), 1), dilations)
    for axis in range(rank):
        at, size = 2 + axis, made.shape[2 + axis]
        end = pads[2 * axis] + shape[axis] if shape else size - pads[2 * axis + 1]
        if end > size:  # places that no tap reaches hold the bias
            bias = given.get("bias")
            rest = made.new_zeros([end - size if each == at else length for each, length in enumerate(made.shape)])
            made = torch.cat([made, rest if bias is None else rest + bias.reshape(-1, *ones)], at)
        made = made.narrow(at, pads[2 * axis], end - pads[2 * axis])
    return made


def _pool(given: Inputs, average: bool) -> Tensor:
    kernel = _list(given["kernel_sizes"])
    strides, rank = _list(given.get("strides"), [1] * len(kernel)), len(kernel)
    if _number(given.get("ceil_mode"), False):
        raise Unknown("pooling with ceil_mode is not known here")
    x = given["x"]
    if not average:
        return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1](_padded(x, given, kernel, -torch.inf), kernel, strides)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    found = pool(_padded(x, given, kernel, 0.0), kernel, strides)
    if _number(given.get("exclude_padding_from_average"), False):
        found = found / pool(_padded(torch.ones_like(x), given, kernel, 0.0), kernel, strides)
    return found


def _linear(given: Inputs) -> Tensor:
    return F.linear(given["x"], given["weight"], given.get("bias"))


def _matmul(given: Inputs) -> Tensor:
    x, y = given["x"], given["y"]
    x = x.transpose(-1, -2) if _number(given.get("transpose_x"), False) else x
    return x @ (y.transpose(-1, -2) if _number(given.get("transpose_y"), False) else y)


def _reduce(given: Inputs, function: Callable) -> Tensor:
    axes = _list(given.get("axes")) or list(range(given["x"].dim()))
    return function(given["x"], axes, keepdim=_number(given.get("keep_dims"), False))


def _reshape(given: Inputs) -> Tensor:
    shape = _list(given["shape"])
    return given["x"].reshape([given["x"].shape[at] if size == 0 else size for at, size in enumerate(shape)])


def _pad(given: Inputs) -> Tensor:
    pads, mode = _list(given["pad"]), given.get("mode", "constant")
    pairs = [pads[at : at + 2] for at in range(0, len(pads), 2)]
    flat = [size for pair in reversed(pairs) for size in pair]
    if mode == "constant":
        return F.pad(given["x"], flat, value=float(_number(given.get("constant_val"), 0.0)))
    return F.pad(given["x"], flat, mode={"reflect": "reflect", "replicate": "replicate"}[mode])


def _slice(given: Inputs) -> Tensor:
    x, starts, ends = given["x"], _list(given["begin"]), _list(given["end"])
    steps = _list(given.get("stride"), [1] * x.dim())
    masks = {key: _list(given.get(key), [0] * x.dim()) for key in ("begin_mask", "end_mask", "squeeze_mask")}
    if any(step < 0 for step in steps):
        raise Unknown("slices from the end are not known here")
    index: list[Any] = []
    for axis, (start, end, step) in enumerate(zip(starts, ends, steps, strict=True)):
        if masks["squeeze_mask"][axis]:
            index.append(start)
        else:
            index.append(slice(None if masks["begin_mask"][axis] else start, None if masks["end_mask"][axis] else end, step))
    return x[tuple(index)]


def _split(given: Inputs) -> list[Tensor]:
    x, axis = given["x"], _number(given["axis"])
    if given.get("split_sizes") is not None:
        return list(x.split(_list(given["split_sizes"]), axis))
    return list(x.chunk(_number(given["num_splits"]), axis))


def _upsample(given: Inputs, mode: str) -> Tensor:
    prefix = "upscale_factor" if any(key.startswith("upscale") for key in given) else "scale_factor"
    names = (f"{prefix}_height", f"{prefix}_width")
    size = [int(length * _number(given.get(name), 1)) for length, name in zip(given["x"].shape[-2:], names, strict=True)]
    if mode == "nearest":
        return F.interpolate(given["x"], size, mode="nearest")
    return F.interpolate(given["x"], size, mode="bilinear", align_corners=bool(_number(given.get("align_corners"), True)))


def _concat(given: Inputs) -> Tensor:
    values = given["values"] if isinstance(given["values"], list) else [given["values"]]
    if _number(given.get("interleave"), False):
        raise Unknown("interleaved concatenation is not known here")
    return torch.cat([each.reshape(-1) if each.dim() == 0 else each for each in values], _number(given["axis"]))


def _cast(given: Inputs) -> Tensor:
    kind = given["dtype"]
    if kind in ("fp16", "fp32", "fp64"):
        return given["x"].double()
    return given["x"].to({"int32": torch.int32, "bool": torch.bool}.get(kind, torch.int64))


def _layer_norm(given: Inputs) -> Tensor:
    x, axes = given["x"], _list(given["axes"])
    shape = [x.shape[axis] for axis in axes]
    return F.layer_norm(x, shape, given.get("gamma"), given.get("beta"), _number(given.get("epsilon"), 1e-5))


def _batch_norm(given: Inputs) -> Tensor:
    statistics = given["mean"], given["variance"], given.get("gamma"), given.get("beta")
    return F.batch_norm(given["x"], *statistics, eps=_number(given["epsilon"]))


def _gelu(given: Inputs) -> Tensor:
    mode = given.get("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        raise Unknown("gelu by sigmoid is not known here")
    return F.gelu(given["x"], approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def _prelu(given: Inputs) -> Tensor:
    return F.prelu(given["x"], given["alpha"])


def _clip(given: Inputs) -> Tensor:
    return given["x"].clamp(_number(given["alpha"]), _number(given["beta"]))


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda given: function(given["x"])


def _binary(function: Callable[[Any, Any], Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda given: function(torch.as_tensor(given["x"]), torch.as_tensor(given["y"]))


OPERATORS: dict[str, Callable[[Inputs], Any]] = {
    "conv": _conv, "conv_transpose": _conv_transpose, "linear": _linear, "matmul": _matmul, "layer_norm": _layer_norm,
    "batch_norm": _batch_norm, "concat": _concat, "reshape": _reshape, "pad": _pad, "slice_by_index": _slice, "split": _split,
    "cast": _cast, "gelu": _gelu, "prelu": _prelu, "clip": _clip,
    "max_pool": lambda given: _pool(given, False), "avg_pool": lambda given: _pool(given, True),
    "upsample_bilinear": lambda given: _upsample(given, "bilinear"),
    "upsample_nearest_neighbor": lambda given: _upsample(given, "nearest"),
    "reduce_mean": lambda given: _reduce(given, torch.mean), "reduce_sum": lambda given: _reduce(given, torch.sum),
    "reduce_max": lambda given: _reduce(given, torch.amax), "reduce_min": lambda given: _reduce(given, torch.amin),
    "add": _binary(torch.add), "sub": _binary(torch.sub), "mul": _binary(torch.mul), "real_div": _binary(torch.div),
    "maximum": _binary(torch.maximum), "minimum": _binary(torch.minimum), "pow": _binary(torch.pow),
    "relu": _unary(torch.relu), "relu6": _unary(F.relu6), "sigmoid": _unary(torch.sigmoid), "silu": _unary(F.silu),
    "tanh": _unary(torch.tanh), "exp": _unary(torch.exp), "sqrt": _unary(torch.sqrt), "square": _unary(torch.square),
    "abs": _unary(torch.abs), "erf": _unary(torch.erf), "softplus": _unary(F.softplus), "identity": _unary(torch.clone),
    "softmax": lambda given: torch.softmax(given["x"], _number(given.get("axis"), -1)),
    "leaky_relu": lambda given: F.leaky_relu(given["x"], _number(given.get("alpha"), 0.01)),
    "elu": lambda given: F.elu(given["x"], _number(given.get("alpha"), 1.0)),
    "sigmoid_hard": lambda given: (_number(given["alpha"], 0.2) * given["x"] + _number(given["beta"], 0.5)).clamp(0, 1),
    "transpose": lambda given: given["x"].permute(_list(given["perm"])),
    "expand_dims": lambda given: _unsqueezed(given["x"], _list(given["axes"])),
    "squeeze": lambda given: given["x"].squeeze(_list(given["axes"])) if given.get("axes") is not None else given["x"].squeeze(),
    "tile": lambda given: given["x"].repeat(_list(given["reps"])),
    "shape": lambda given: torch.tensor(given["x"].shape, dtype=torch.int32),
    "gather": lambda given: given["x"].index_select(_number(given.get("axis"), 0), given["indices"].reshape(-1).long()).reshape(
        *given["indices"].shape),
    "pixel_shuffle": lambda given: F.pixel_shuffle(given["x"], _number(given["upscale_factor"])),
}  # fmt: skip


def _unsqueezed(x: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x
