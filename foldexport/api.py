"""The library: load, fold, export. Each is one call; the command line composes the same calls."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foldexport.certify import Certificate
from foldexport.certify import certify as prove
from foldexport.certify.alone import refuse_other_way
from foldexport.certify.rounding import HOPELESS
from foldexport.errors import EquivalenceError, ModelError
from foldexport.exporting import export, in_precision
from foldexport.extremes import Extremes, extremes
from foldexport.fold.chain import chain_graph
from foldexport.fold.constants import Constants
from foldexport.fold.layers import KIND_OF
from foldexport.fold.ledger import Ledger
from foldexport.fold.passes import FoldedGraph, fold_graph
from foldexport.fold.pending import name_of
from foldexport.fold.rebuild import Program, Rebuilt, rebuild
from foldexport.fold.wishes import MAX_SIGMA
from foldexport.interpret import random_nodes
from foldexport.probes import further_noise_probes, make, noise_probes
from foldexport.trace import Graph, trace
from foldexport.trace.outputs import output_names

__all__ = ["Folded", "export", "fold", "in_precision", "load"]

RETRY_ABOVE = 8.0  # multiples of the network's own float32 noise above which the fold is tried with fewer absorptions
#: Views of the same memory.
FREE = frozenset({"flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten", "expand", "identity"})
#: Operators of the training graph that are not counted: they move or name values, or read sizes.
UNCOUNTED = frozenset({"dropout", "feature_dropout", "alias", "clone", "contiguous", "detach", "to", "_to_copy", "sym_size", ""})


@dataclass(eq=False)
class Folded:
    """A folded network and the proof that it is the network it came from.

    module: plain ``nn.Module`` in eval mode, of the user's own type: ``nn.Sequential`` where it is a chain.
    ledger: what was folded and what was kept, and why. certificate: the proof, None when it was not asked for.
    extremes: the largest weight and activation of the folded network, None without a certificate.
    source, graph, example: the training graph's module, its trace (at a batch of two or more), and the user's inputs.
    counts_before, counts_after: operators by kind. seconds: per stage. refold: makes the folded network in float64 once more,
    what half types are rounded from; a copy that always lay in memory would cost twice the network.
    """

    module: nn.Module
    ledger: Ledger
    certificate: Certificate | None
    source: nn.Module
    graph: Graph
    example: tuple[Tensor, ...]
    input_names: list[str]
    output_names: list[str]
    counts_before: dict[str, int]
    counts_after: dict[str, int]
    extremes: Extremes | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    refold: Callable[[], Program] | None = field(default=None, repr=False)


def fold(
    module: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    certify: bool = True,
    data: list | None = None,
    seed: int = 0,
    free: Sequence[str] = (),
    chain: bool = False,
    progress=None,
) -> Folded:
    """Fold an eval-mode network and prove that nothing changed.

    module: any ``nn.Module`` that ``torch.export`` can trace; it is not changed. example: its inputs, of any batch size.
    data: further inputs to prove it on. free: "height", "width" where other sizes than the example's must work: the proof at
    a second size is then part of the certificate, not an extra. chain: take skip connections out as well, at the cost of
    multiply-adds (foldexport.fold.chain); the ledger says which stay, and why. progress: called with the name of each step
    as it begins.

    Raises ModelError (train mode, random operators, weights that are not finite), UsageError and TraceError (the network
    does not take the example, or cannot be traced), EquivalenceError (the proof failed).
    """
    tell = progress or (lambda step: None)
    seconds: dict[str, float] = {}
    tell("trace")
    with _timed(seconds, "trace"):
        space = [axis for axis in free if axis in ("height", "width")]
        graph = trace(module, example, free=space)
        graph.dynamic.update(dict.fromkeys(space, True))
        check_deterministic(graph)
        check_finite(graph)
    dtype = weights_dtype(graph)
    before = count_operators(graph)
    for max_sigma in (MAX_SIGMA, 0.0):
        tell("fold")
        with _timed(seconds, "fold"), torch.no_grad():
            folded, rebuilt = _fold_as_asked(graph, max_sigma, before, chain)
        certificate = largest = None
        if certify:
            with _timed(seconds, "certify"):
                probes = make(graph, seed=seed, data=data)
                noise = noise_probes(graph, seed=seed, first=probes[0])
                certificate = prove(
                    graph, rebuilt.program, probes, noise_probes=noise, further_noise=further_noise_probes(graph, seed=seed),
                    module=graph.module, progress=progress,
                )  # fmt: skip
            if certificate.trace:
                refuse_other_way(graph, probes, certificate.noise32 or 0.0)
            certificate.require()
            largest = extremes(rebuilt.program, certificate.largest)
            if max_sigma and certificate.folded32 is not None and certificate.folded32 > RETRY_ABOVE:
                continue
        break
    if certificate is not None and dtype == torch.float32:
        _require_digits(certificate)
    with _timed(seconds, "round"):
        result = rebuilt.to(dtype)
    return Folded(
        module=result, ledger=folded.ledger, certificate=certificate, source=module, graph=graph,
        example=(example,) if isinstance(example, Tensor) else tuple(example),
        input_names=list(graph.input_names), output_names=_output_names(folded),
        counts_before=before, counts_after=rebuilt.counts, extremes=largest, seconds=seconds,
        refold=partial(_program, graph, max_sigma, before, chain),
    )  # fmt: skip


def load(
    path: str | Path,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    use_ema: bool | None = None,
) -> nn.Module:
    """The network that a checkpoint holds, in eval mode, recognised by its keys and shapes or built by ``arch``.

    arch: a name of the zoo, ``package.module:callable`` or ``path/file.py:callable``; arch_args: its arguments.
    trust_pickle: open pickles with code in them, which then runs. use_ema: take the averaged weights (True), never
    (False), or only where there are no others.

    Raises CheckpointError (unreadable, not recognised, does not fit, damaged) and UsageError (``arch`` cannot be used).
    """
    from foldexport.recognise import recognise

    return recognise(path, arch=arch, arch_args=arch_args, trust_pickle=trust_pickle, use_ema=use_ema).module


def _require_digits(certificate: Certificate) -> None:
    """Raise EquivalenceError where the folded network, exact in float64, overflows or loses its digits in float32."""
    if certificate.folded32 is None or certificate.folded32 <= HOPELESS:
        return
    found = certificate.rounding.warnings()[0]
    raise EquivalenceError(
        f"exact in float64, but not in float32: {found}. Fold it in float64 (model.double()), or export it unfolded (--no-fold)"
    )


def _fold_as_asked(graph: Graph, max_sigma: float, before: dict[str, int], chain: bool) -> tuple[FoldedGraph, Rebuilt]:
    folded, rebuilt = _fold_without_growth(graph, max_sigma, before)
    if chain:
        folded = chain_graph(folded, max_sigma)
        rebuilt = rebuild(folded)
    return folded, rebuilt


def _program(graph: Graph, max_sigma: float, before: dict[str, int], chain: bool) -> Program:
    with torch.no_grad():
        return _fold_as_asked(graph, max_sigma, before, chain)[1].program


def _fold_without_growth(graph: Graph, max_sigma: float, before: dict[str, int]) -> tuple[FoldedGraph, Rebuilt]:
    """Fold; where restored operators came out more than those folded, the affines behind them stay where they stand."""
    folded = fold_graph(graph, max_sigma)
    rebuilt = rebuild(folded)
    if costing(rebuilt.counts) > costing(before) and folded.undone:
        folded = fold_graph(graph, max_sigma, folded.undone)
        rebuilt = rebuild(folded)
    if costing(rebuilt.counts) > costing(before):
        folded = fold_graph(graph, max_sigma, frozenset(graph.fx.nodes))
        rebuilt = rebuild(folded)
    return folded, rebuilt


def costing(counts: Mapping[str, int]) -> int:
    """How many operators do work: views of the same memory do not."""
    return sum(number for kind, number in counts.items() if kind not in FREE)


class _timed:
    """Adds the seconds of a block to ``seconds[stage]``."""

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds, self._stage = seconds, stage

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + time.perf_counter() - self._began


def check_deterministic(graph: Graph) -> None:
    """Raises ModelError, naming modules, where a random operator is left on."""
    found = random_nodes(graph)
    if not found:
        return
    names = ", ".join(f"`{node.meta.get('module') or node.name}` ({name_of(node)})" for node in list(found)[:5])
    advice = "Draw only where self.training is true, or pass the numbers as an input"
    if all("dropout" in name_of(node) for node in found):
        advice = "Pass `training=self.training` to F.dropout, or remove it"
    raise ModelError(f"the network is random in eval mode: {names}. {advice}")


def check_finite(graph: Graph) -> None:
    """Raises ModelError where a weight is not finite, or a running variance negative: no fold of it can be proved."""
    for name, tensor in graph.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise ModelError(f"`{name}` holds {count} values that are NaN or infinite: the checkpoint is damaged")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            channel = int((tensor < 0).nonzero()[0, 0])
            raise ModelError(f"`{name}` is negative in channel {channel}: the checkpoint is damaged")


def weights_dtype(graph: Graph) -> torch.dtype:
    """The floating-point type of the user's module: that of most of its weights; without any, that of its inputs."""
    found: Counter[torch.dtype] = Counter()
    for tensor in graph.tensors.values():
        if tensor.is_floating_point():
            found[tensor.dtype] += tensor.numel()
    if not found:
        found.update(x.dtype for x in graph.example if x.is_floating_point())
    return found.most_common(1)[0][0] if found else torch.float32


def count_operators(graph: Graph) -> dict[str, int]:
    """Operators of the training graph by kind, those on constants left out."""
    constants = Constants(graph)
    counts: Counter[str] = Counter()
    for node in graph.fx.nodes:
        name = name_of(node)
        if node.op == "call_function" and node not in constants and name not in UNCOUNTED:
            counts[KIND_OF.get(name, name)] += 1
    return dict(counts)


def _output_names(folded: FoldedGraph) -> list[str]:
    own = output_names(folded.graph)
    if own is not None and len(own) == len(folded.outputs):
        return list(own)
    return ["output"] if len(folded.outputs) == 1 else [f"output_{i}" for i in range(len(folded.outputs))]
