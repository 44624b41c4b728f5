"""What the tests of the fold ask of a `Folded`: operators, equality, float32 noise, reasons."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

import foldexport

# Reinterpretations of the same memory: they cost nothing in any runtime, and a mean over space may become
# an average pool with a flatten behind it.
FREE = frozenset({"flatten", "view", "reshape", "squeeze", "unsqueeze", "identity"})


def operators(counts: dict[str, int]) -> Counter[str]:
    """Operators by kind, without absent and `FREE` ones; a transposition is a permutation."""
    found = Counter({kind: number for kind, number in counts.items() if number and kind not in FREE})
    found["permute"] += found.pop("transpose", 0)
    return +found


def inputs(shapes: Sequence[tuple[int, ...]], batch: int, seed: int = 0, dtype: torch.dtype = torch.float64,
           ) -> tuple[Tensor, ...]:
    """One normal input per shape, the batch axis put in front."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return tuple(torch.randn((batch, *shape), generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def fold64(module: nn.Module, *shapes: tuple[int, ...]):
    """``module`` in float64, folded with its certificate from an example of batch two."""
    example = inputs(shapes, batch=2)
    folded = foldexport.fold(module.double(), example if len(example) > 1 else example[0])
    assert folded.certificate.ok
    return folded


def tensors(output) -> list[Tensor]:
    """The tensors of a (nested) output, dictionaries by insertion order."""
    if isinstance(output, Tensor):
        return [output]
    values: Iterable = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors(value)]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``max |found - wanted| / max |wanted|``; NaN where either holds one."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    peak = wanted.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float(((found - wanted).abs().max() / peak).detach())


def assert_same(folded, module: nn.Module, *shapes: tuple[int, ...], tolerance: float = 1e-10,
                dtype: torch.dtype = torch.float64) -> None:
    """The folded module computes what ``module`` computes, at batch one and at batch three."""
    for batch in (1, 3):
        example = inputs(shapes, batch, seed=batch, dtype=dtype)
        with torch.no_grad():
            found, wanted = tensors(folded.module(*example)), tensors(module(*example))
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted):
            assert relative_error(one, other) <= tolerance


def assert_kept(folded, name: str) -> None:
    """The ledger says why the module ``name``, or something inside it, was kept."""
    reasons = [entry.reason for entry in folded.ledger
               if entry.status == "kept" and (entry.module == name or entry.module.startswith(f"{name}."))]
    assert reasons, f"nothing of {name!r} is kept in the ledger: {[(e.module, e.status) for e in folded.ledger]}"
    assert all(reason.strip() for reason in reasons)


def noise_multiple(folded, module: nn.Module, example: Tensor) -> float:
    """Float32 error of the folded module in units of the training graph's own.

    ``rms((folded32 - train64) / peak) / max(rms((train32 - train64) / peak), 2^-24)`` over the batch of probes
    ``example``, the peak being that of ``train64``.
    """
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(example.double())
        own, ours = module(example).double(), folded.module(example).double()
    peak = exact.abs().max()
    return float(_rms((ours - exact) / peak) / max(_rms((own - exact) / peak), 2.0**-24))


def _rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())
