"""Training graphs that checkpoints are recognised as, by their keys and shapes alone.

A new family is a file that declares a `Family`, and a line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foldexport.checkpoint.tensors import check_finite, check_running_var
from foldexport.errors import CheckpointError, UsageError
from foldexport.zoo import (
    acnet_files,
    dbb_files,
    diracnet_files,
    mobileone_files,
    nfresnet_files,
    preresnet_files,
    repvgg_files,
    resnet_files,
    vgg_files,
    wideresnet_files,
)
from foldexport.zoo.acnet import acnet
from foldexport.zoo.dbb import dbb
from foldexport.zoo.dirac import DiracConv1d, DiracConv2d, DiracConv3d, NCReLU
from foldexport.zoo.diracnet import DiracNet, diracnet
from foldexport.zoo.family import Family, Identified
from foldexport.zoo.loading import SHOWN_KEYS, uniform_precision
from foldexport.zoo.mobileone import mobileone
from foldexport.zoo.nfresnet import nfresnet
from foldexport.zoo.preresnet import preresnet
from foldexport.zoo.repvgg import repvgg
from foldexport.zoo.resnet import resnet
from foldexport.zoo.vgg import vgg
from foldexport.zoo.wideresnet import wideresnet

__all__ = [
    "FAMILIES", "DiracConv1d", "DiracConv2d", "DiracConv3d", "DiracNet", "Family", "Identified", "NCReLU",
    "acnet", "arch_names", "dbb", "diracnet", "identify", "mobileone", "nfresnet", "preresnet", "repvgg", "resnet", "vgg",
    "wideresnet",
]  # fmt: skip

# All are asked; where several recognise a checkpoint, it is of the one whose network has exactly its keys and shapes.
FAMILIES: tuple[Family, ...] = (
    diracnet_files.FAMILY,
    resnet_files.FAMILY,
    wideresnet_files.FAMILY,
    preresnet_files.FAMILY,
    nfresnet_files.FAMILY,
    vgg_files.FAMILY,
    repvgg_files.FAMILY,
    mobileone_files.FAMILY,
    acnet_files.FAMILY,
    dbb_files.FAMILY,
)  # fmt: skip

PREPROCESSING_FIELDS = ("input_size", "interpolation", "mean", "std", "crop_pct", "label_names")


def arch_names() -> tuple[str, ...]:
    """The names that ``--arch`` takes for networks of the zoo."""
    return tuple(family.arch for family in FAMILIES)


def identify(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    source: str = "checkpoint",
) -> Identified:
    """The network that a flat state dict is of, with its weights, in eval mode.

    ``metadata`` is what lay beside the weights; a timm ``pretrained_cfg`` in it overrules the family's preprocessing.
    ``arch``: a name of `arch_names`, where only that family is asked and ``arch_args`` overrule what it reads from the
    shapes. ``source`` names the file in errors. Half-precision weights are widened to float32; a float64 checkpoint
    gives a float64 network.

    Raises CheckpointError: no family has such keys; keys missing, surplus or of another shape; values that are not
    finite; a negative running variance. Raises UsageError for an unknown ``arch`` or ``arch_args``.
    """
    if not tensors:
        raise CheckpointError(f"{source}: holds no tensors.")
    families = [_named(arch)] if arch else _recognising(tensors, source)
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    plain, notes = uniform_precision(plain)
    identified = _only(families, plain, dict(arch_args or {}), source)
    check_finite(plain, source)
    check_running_var(plain, source)
    identified.notes[:0] = notes
    _take_preprocessing(identified, (metadata or {}).get("pretrained_cfg"))
    return identified


def _take_preprocessing(identified: Identified, config: Any) -> None:
    if not isinstance(config, Mapping):
        return
    stated = {name: config[name] for name in PREPROCESSING_FIELDS if config.get(name)}
    identified.preprocessing |= stated
    if "input_size" in stated:
        identified.input_shape = (1, *stated["input_size"])
    if stated:
        identified.notes.append(f"preprocessing taken from the file's pretrained_cfg: {', '.join(stated)}")


def _named(arch: str) -> Family:
    found = next((family for family in FAMILIES if family.arch == arch), None)
    if found is None:
        raise UsageError(
            f"--arch {arch}: the zoo has {', '.join(arch_names())}; for a network of your own, package.module:callable."
        )
    return found


def _only(families: Sequence[Family], tensors: dict[str, Tensor], arch_args: dict[str, Any], source: str) -> Identified:
    """What the one family makes of the tensors that can; where none can, the first one's report of what does not fit."""
    found, refusals = [], []
    for family in families:
        try:
            found.append((family, family.load(tensors, arch_args, source)))
        except CheckpointError as refusal:
            refusals.append(refusal)
    if not found:
        raise refusals[0]
    if len(found) > 1:
        listed = "; ".join(f"--arch {family.arch} ({identified.description})" for family, identified in found)
        raise CheckpointError(f"{source}: its keys and shapes are those of {len(found)} networks.\nSay which: {listed}.")
    return found[0][1]


def _recognising(tensors: Mapping[str, Tensor], source: str) -> list[Family]:
    """Every family that the checkpoint may be of."""
    found = [family for family in FAMILIES if family.recognises(tensors)]
    if found:
        return found
    keys = list(tensors)
    seen = ", ".join(keys[:SHOWN_KEYS]) + (f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else "")
    nearest = max(FAMILIES, key=lambda family: family.fitting(keys))
    fit = nearest.fitting(keys)
    near = f"nearest: {nearest.name}, {fit} of {len(keys)} keys fit" if fit else "none comes near"
    raise CheckpointError(
        f"{source}: no known architecture has its keys {seen} ({near}).\n"
        "Pass --arch package.module:callable or --arch path/file.py:callable that builds the network."
    )
