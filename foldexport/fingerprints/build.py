"""A candidate of the table as a network with the weights of a file: its package is imported here, and nowhere else."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foldexport.checkpoint.select import strip_prefix
from foldexport.errors import CheckpointError, MissingDependencyError, UsageError
from foldexport.fingerprints.data import table
from foldexport.fingerprints.table import AUXILIARY_HEADS, Candidate, Function, counted, plain_keys
from foldexport.zoo.loading import SHOWN_KEYS, uniform_precision


def constructor(candidate: Candidate) -> Callable[..., nn.Module]:
    """The callable that ``spec`` names. Raises what its import raises, and AttributeError."""
    place, _, name = candidate.spec.partition(":")
    importlib.import_module(candidate.package)
    return getattr(importlib.import_module(place), name)


def installed(package: str) -> bool:
    """Whether a package can be found; imports nothing."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a parent that does not import; a module without a spec
        return False


def network(
    function: Function, order: Sequence[Candidate], tensors: Mapping[str, Tensor], arch_args: Mapping[str, Any], source: str
) -> tuple[nn.Module, Candidate, list[str]]:
    """The network with the file's weights, in eval mode, the candidate that it was built as, and notes.

    ``order``: the candidates of the function, likeliest first; the first one whose package imports is built. ``arch_args``
    overrule its arguments.

    Raises MissingDependencyError (no package of them is installed, or imports, or has the constructor), UsageError
    (``arch_args`` that the constructor does not take) and CheckpointError (what it builds has other keys or shapes).
    """
    candidate, build = _importable(order, source)
    arguments = {**function.arguments(candidate), **arch_args}
    module = _built(candidate, build, arguments, arch_args, source)
    state, notes = uniform_precision(tensors)
    if any(tensor.dtype == torch.float64 for tensor in state.values()):
        module = module.double()
    named = {new: state[old] for old, new in plain_keys(state).items()}
    notes += _resize_auxiliary_heads(module, named)
    _load(module, named, f"{source}, as {candidate}", candidate)
    return module.eval(), candidate, notes


def _importable(order: Sequence[Candidate], source: str) -> tuple[Candidate, Callable[..., nn.Module]]:
    """The first candidate whose package is there and has its constructor."""
    present = [each for each in order if installed(each.package)]
    if not present:
        packages = list(dict.fromkeys(each.package for each in order))
        absent = f"neither {' nor '.join(packages)} is" if packages[1:] else f"{packages[0]} is not"
        commands = " or ".join(f"'foldexport[{package}]'" for package in packages)
        raise MissingDependencyError(
            f"{source}: its keys and shapes are those of {order[0]}, and {absent} installed.\nInstall it: pip install {commands}."
        )
    failures = []
    for candidate in present:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return candidate, constructor(candidate)
        except Exception as error:  # the package's own code, which may raise anything
            failures.append((candidate, error))
    raise MissingDependencyError(_not_importable(*failures[0], source))


def _not_importable(candidate: Candidate, error: Exception, source: str) -> str:
    package, reason = candidate.package, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    here = f"{package} {_version(package)}"
    if isinstance(error, AttributeError) and candidate.name in str(error):
        return (
            f"{source}: its keys and shapes are those of {candidate}, which {here} does not have.\n"
            f"Install a version that has it: pip install '{package}=={table().versions[package]}'."
        )
    return (
        f"{source}: its keys and shapes are those of {candidate}, and {here} is installed but does not import ({reason}).\n"
        f"torch here is {torch.__version__}: install the torchvision that was built for it, from where that torch came from."
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(of no known version)"


def _built(
    candidate: Candidate, build: Callable[..., nn.Module], arguments: dict[str, Any], asked: Mapping[str, Any], source: str
) -> nn.Module:
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = build(**arguments)
    except Exception as error:  # the package's own code, which may raise anything
        reason = f"{type(error).__name__}: {error}"
        if asked:
            raise UsageError(f"--arch {candidate.spec} ({given}): {reason}.") from error
        raise MissingDependencyError(
            f"{source}: {candidate} of {candidate.package} {_version(candidate.package)} is not built with {given} ({reason}).\n"
            f"Install the version that foldexport knows: pip install '{candidate.package}=={table().versions[candidate.package]}'."
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"--arch {candidate.spec}: returned a {type(module).__name__}; wanted a torch.nn.Module.")
    return module


def _resize_auxiliary_heads(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Gives auxiliary heads the classes of the file, where only the other head was changed; a note of it."""
    notes = []
    for path, layer in list(module.named_modules()):
        head, weight = path.partition(".")[0], state.get(f"{path}.weight")
        if head not in AUXILIARY_HEADS or not isinstance(layer, nn.Linear | nn.Conv2d) or weight is None:
            continue
        rows = weight.shape[0]
        if weight.shape[1:] != layer.weight.shape[1:] or rows == layer.weight.shape[0]:
            continue
        layer.weight = nn.Parameter(layer.weight.new_zeros(weight.shape))
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.new_zeros(rows))
        if isinstance(layer, nn.Linear):
            layer.out_features = rows
        else:
            layer.out_channels = rows
        notes.append(f"`{path}` has {rows} classes of its own")
    return notes


def _load(module: nn.Module, state: Mapping[str, Tensor], title: str, candidate: Candidate) -> None:
    """Every weight into its place; raises CheckpointError that lists what has none, or another shape."""
    wanted = module.state_dict()
    prefix = strip_prefix(wanted)[1]  # a prefix that reading took for a wrapper's
    state = {prefix + key: tensor for key, tensor in state.items()}
    missing = [key for key in wanted if counted(key) and key not in state]
    surplus = [key for key in state if counted(key) and key not in wanted]
    reshaped = [
        f"{key} is {list(state[key].shape)}, wanted {list(wanted[key].shape)}"
        for key in state
        if key in wanted and counted(key) and state[key].shape != wanted[key].shape
    ]
    misfits = [
        f"{len(keys)} {what} ({', '.join(keys[:SHOWN_KEYS])}{f' and {len(keys) - SHOWN_KEYS} more' if keys[SHOWN_KEYS:] else ''})"
        for what, keys in (("missing", missing), ("surplus", surplus), ("of another shape", reshaped))
        if keys
    ]
    if misfits:
        raise CheckpointError(
            f"{title}: what {candidate.package} {_version(candidate.package)} builds differs: {'; '.join(misfits)}.\n"
            f"foldexport knows {candidate.package} {table().versions[candidate.package]}: install that, or pass --arch with a "
            "callable that builds the network."
        )
    # Counters may be absent or of another shape; evaluation does not read them. Some modules ask for the version of their
    # state dict, which files without it cannot say.
    found = OrderedDict({key: state[key] if counted(key) else tensor for key, tensor in wanted.items()})
    found._metadata = wanted._metadata  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.load_state_dict(found, strict=True)
