"""A checkpoint file → the network in it, in eval mode, and how it was recognised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from foldexport import checkpoint, fingerprints, preprocessing, zoo
from foldexport.arch import load_arch, load_weights
from foldexport.checkpoint import Checkpoint
from foldexport.checkpoint.tensors import HALF_TYPES
from foldexport.errors import CheckpointError


@dataclass(eq=False)
class Network:
    """A network with a checkpoint's weights, in eval mode.

    name, description: "DiracNet", "DiracNet v2, CIFAR, depth 16, …".   reason: what gave it away.
    input_shapes: of its inputs, batch first; empty where nothing says.   preprocessing: under timm's field names.
    notes: what was taken, changed or filled in, in the order of the work.   source: facts of the file, for the record.
    """

    module: nn.Module
    name: str
    description: str
    reason: str
    input_shapes: tuple[tuple[int, ...], ...] = ()
    num_classes: int | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)


def recognise(
    path: str | Path,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    use_ema: bool | None = None,
) -> Network:
    """The network that the file holds: recognised by keys and shapes, or built by ``arch``.

    arch: a name of the zoo, ``package.module:callable`` or ``path/file.py:callable``; arch_args: its arguments.

    Raises CheckpointError (the file cannot be read safely, is not recognised, does not fit, is damaged) and UsageError
    (an ``arch`` that cannot be used).
    """
    read = checkpoint.read(path, trust_pickle=trust_pickle, use_ema=use_ema)
    network = _built(read, arch, dict(arch_args or {})) if arch and ":" in arch else _known(read, arch, dict(arch_args or {}))
    network.notes[:0] = read.notes
    network.source = _facts(read)
    network.preprocessing = dict(network.preprocessing)
    if (names := preprocessing.names_in(read.metadata)) and len(names) == (network.num_classes or len(names)):
        network.preprocessing["label_names"] = names
    return network


def _known(read: Checkpoint, arch: str | None, arch_args: dict[str, Any]) -> Network:
    """The network that the file itself holds, or one of the zoo, or of the table of published networks.

    The zoo goes first, but where the file says that it is a network of the table that the zoo would take for another.
    """
    match = None if arch else fingerprints.match(read)
    holds_itself = read.module is not None and not arch
    if match is not None and holds_itself:  # what it computes needs no guess
        return _held(read, match)
    if match is not None and match.before_zoo:
        return _network(match.identified(arch_args))
    try:
        found = zoo.identify(read.tensors, read.metadata, arch=arch, arch_args=arch_args, source=str(read.path))
    except CheckpointError as refusal:
        if holds_itself:
            return _held(read)
        if match is not None and not match.of_zoo:
            return _network(match.identified(arch_args))
        of_zoo = match is not None or arch or any(family.recognises(read.tensors) for family in zoo.FAMILIES)
        if not of_zoo and read.tensors and (message := fingerprints.unlike(read)):
            raise CheckpointError(message) from refusal
        raise
    if match is not None:
        match.inform(found)
    return _network(found)


def _network(found: zoo.Identified) -> Network:
    shapes = (tuple(found.input_shape),) if found.input_shape else ()
    return Network(
        found.module, found.name, found.description, found.reason, shapes, found.num_classes, found.preprocessing,
        list(found.notes),
    )  # fmt: skip


def _held(read: Checkpoint, match: fingerprints.Match | None = None) -> Network:
    """The network that was pickled whole, or exported, into the file; ``match``: what the table knows of its inputs."""
    kind = getattr(read.module, "original_name", type(read.module).__name__)  # TorchScript's name of the class
    checkpoint.check_finite(read.tensors, read.path)
    checkpoint.check_running_var(read.tensors, read.path)
    module, notes = _evaluating(read.module)
    preprocessing, shape, told = ({}, (), []) if match is None else match.common_inputs()
    shapes = ((shape,) if shape else ()) or _stated_shapes(read)
    return Network(
        module, kind, f"{kind}, as the file holds it", f"the {read.format} holds the network itself", shapes,
        preprocessing.get("num_classes"), preprocessing, notes + told,
    )  # fmt: skip


def _built(read: Checkpoint, arch: str, arch_args: dict[str, Any]) -> Network:
    """The network of the user's own code, or of a package, with the weights of the file."""
    module = load_arch(arch, arch_args)
    notes = load_weights(module, read.tensors, read.path)
    checkpoint.check_finite(read.tensors, read.path)
    checkpoint.check_running_var(read.tensors, read.path)
    module, more = _evaluating(module)
    kind = type(module).__name__
    given = ", ".join(f"{key}={value!r}" for key, value in arch_args.items())
    preprocessing, shape, told = fingerprints.told_inputs(read, arch, arch_args)
    shapes = ((shape,) if shape else ()) or _stated_shapes(read)
    return Network(
        module, kind, f"{kind}({given})", f"asked for: --arch {arch}", shapes,
        preprocessing=preprocessing or _stated(read), notes=notes + more + told,
    )  # fmt: skip


def _stated(read: Checkpoint) -> dict[str, Any]:
    """What a timm file says about its inputs."""
    config = read.metadata.get("pretrained_cfg")
    wanted = zoo.PREPROCESSING_FIELDS
    return {key: config[key] for key in wanted if config.get(key)} if isinstance(config, Mapping) else {}


def _stated_shapes(read: Checkpoint) -> tuple[tuple[int, ...], ...]:
    size = _stated(read).get("input_size")
    return ((1, *size),) if size else ()


def _evaluating(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """The module in eval mode and at float32 or float64, and notes of what had to be changed."""
    notes = []
    training = sum(getattr(child, "training", False) for child in module.modules())  # frozen TorchScript has no mode
    if training:
        notes.append(f"called .eval(): {type(module).__name__} came in train mode")
        _eval(module)
    halves = [parameter for parameter in module.parameters() if parameter.dtype in HALF_TYPES]
    if halves:
        kind = str(halves[0].dtype).removeprefix("torch.")
        notes.append(f"widened the network from {kind} to float32")
        module = module.float()
    return module, notes


def _eval(module: nn.Module) -> None:
    try:
        module.eval()
    except NotImplementedError:  # modules of exported programs have one mode, and refuse to be asked
        for child in module.modules():
            child.training = False


def _facts(read: Checkpoint) -> dict[str, Any]:
    return {
        "file": read.path.name,
        "sha256": read.sha256,
        "size_bytes": read.path.stat().st_size,
        "format": read.format,
        "taken": read.taken,
        "prefix": read.prefix,
        "ema": read.ema,
        "tensors": len(read.tensors),
    }
