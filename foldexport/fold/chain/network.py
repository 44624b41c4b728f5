"""The folded graph while skip connections are taken out of it: who reads what, and what every tensor stores."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from foldexport.fold.affine import Affine
from foldexport.fold.chain.intervals import Intervals
from foldexport.fold.passes import FoldedGraph, reachable, sorted_by_use
from foldexport.fold.records import Image, Record
from foldexport.fold.stored import Stored, rebase
from foldexport.interpret import steps


@dataclass(frozen=True, eq=False)
class Claim:
    """What a stored tensor holds of a value of the training graph: ``v = affine(s)``, or a part of it (see `Record`)."""

    node: fx.Node
    affine: Affine
    usable: Tensor | None = None
    channels: Tensor | None = None
    image: Image | None = None

    def moved(self, change: Affine) -> Claim:
        """The claim on ``s' = p ⊙ s + q``."""
        affine, usable = rebase(self.affine, change)
        if self.usable is not None:
            usable = self.usable if usable is None else self.usable & usable
        return dataclasses.replace(self, affine=affine, usable=usable)

    def on(self, channels: Tensor) -> Claim:
        """The claim on a wider tensor that holds s in these channels."""
        return dataclasses.replace(self, channels=channels)


class Network:
    """A folded graph that can be rewritten.

    spread: root mean squares of channels on one normal probe, measured when first asked for.
    """

    def __init__(self, folded: FoldedGraph) -> None:
        self.folded = folded
        self.intervals = Intervals()
        self.outputs = list(folded.outputs)
        self.claims: dict[Stored, list[Claim]] = {}
        for node, stored, affine, usable in folded.values:
            self.claims.setdefault(stored, []).append(Claim(node, affine, usable))
        self._order, self._given = list(folded.order), frozenset(folded.order)
        self._readers: dict[Stored, list[Stored]] = {}
        self._names = Counter(stored.name for stored in folded.order)
        self._moments: dict[fx.Node, tuple[Tensor, Tensor]] | None = None
        for stored in folded.order:
            self._register(stored)

    # ── looking ────────────────────────────────────────────────────────────────────────────────────────────────────

    def readers(self, stored: Stored) -> list[Stored]:
        """The tensors whose makers read ``stored``, as often as they read it."""
        return self._readers.get(stored, [])

    def reads(self, stored: Stored) -> int:
        """How often ``stored`` is read, by outputs too."""
        return len(self.readers(stored)) + sum(output is stored for output in self.outputs)

    def reader(self, stored: Stored) -> Stored | None:
        """The one tensor whose maker reads ``stored`` if nothing else does."""
        return self.readers(stored)[0] if self.reads(stored) == 1 and self.readers(stored) else None

    def whole(self, stored: Stored) -> list[Claim]:
        """The claims on all of a tensor that vary along its channels alone."""
        return [claim for claim in self.claims.get(stored, ()) if claim.channels is None and claim.affine.varies_only_on(1)]

    def rms(
        self, stored: Stored, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0, index: Tensor | None = None
    ) -> Tensor:
        """``[K]``: root mean square of ``scale ⊙ s[:, index] + shift`` on a normal probe; |shift| where no value tells of s."""
        index = torch.arange(stored.shape[1]) if index is None else index
        scale, shift = (torch.as_tensor(part, dtype=torch.float64).expand(index.numel()) for part in (scale, shift))
        found = shift.abs()
        for claim in self.whole(stored):
            mean, square = self._measured().get(claim.node, (None, None))
            if mean is None or mean.numel() != stored.shape[1]:
                continue
            a, t = (part[index] for part in claim.affine.vector(1, stored.shape[1]))
            known = a != 0
            m = scale / torch.where(known, a, 1.0)
            n = shift - m * t
            moved = (m * m * square[index] + 2 * m * n * mean[index] + n * n).clamp_min(0.0).sqrt()
            found = torch.where(known, moved, found)
        return found

    def _measured(self) -> dict[fx.Node, tuple[Tensor, Tensor]]:
        """Mean and mean square of every channel of every value, on one probe."""
        if self._moments is None:
            graph, generator = self.folded.graph, torch.Generator().manual_seed(0)
            inputs = tuple(
                torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) if x.is_floating_point() else x
                for x in graph.example
            )
            self._moments = {}
            for node, value in steps(graph, inputs, torch.float32):
                if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
                    axes = [axis for axis in range(value.dim()) if axis != 1]
                    wide = value.double()
                    self._moments[node] = wide.mean(axes), wide.square().mean(axes)
        return self._moments

    # ── rewriting ──────────────────────────────────────────────────────────────────────────────────────────────────

    def emit(self, like: Stored, kind: str, operand: Stored, claims: list[Claim], *, shape=None, **attrs) -> Stored:
        """A new tensor in the place and under the name of ``like``, read by nobody yet."""
        first = like.name.partition("_wide")[0]
        self._names[first] += 1
        name = f"{first}_wide" if self._names[first] == 2 else f"{first}_wide_{self._names[first] - 2}"
        stored = Stored(name, kind, [operand], tuple(shape or like.shape), like.dynamic, attrs,
                        module=like.module, op=like.op, node=like.node)  # fmt: skip
        self.claims[stored] = claims
        self._order.append(stored)
        self._register(stored)
        return stored

    def again(self, like: Stored, operand: Stored, claims: list[Claim]) -> Stored:
        """The operator of ``like`` on another tensor of the same shape."""
        return self.emit(like, like.kind, operand, claims, **like.attrs)

    def is_new(self, stored: Stored) -> bool:
        """Whether a tensor was emitted here."""
        return stored not in self._given

    def mark(self) -> int:
        """Where `undo` goes back to."""
        return len(self._order)

    def undo(self, mark: int) -> None:
        """Forget what was emitted since."""
        for stored in self._order[mark:]:
            for operand in stored.inputs:
                self._readers[operand].remove(stored)
            del self.claims[stored]
        del self._order[mark:]

    def replace(self, old: Stored, new: Stored) -> None:
        """Everything that reads ``old`` reads ``new``; what only served ``old`` goes."""
        for reader in dict.fromkeys(self.readers(old)):
            reader.inputs = [new if operand is old else operand for operand in reader.inputs]
        self._readers.setdefault(new, []).extend(self._readers.pop(old, []))
        self.outputs = [new if output is old else output for output in self.outputs]
        self._sweep(old)

    def _register(self, stored: Stored) -> None:
        for operand in stored.inputs:
            self._readers.setdefault(operand, []).append(stored)

    def _sweep(self, stored: Stored) -> None:
        unread = [stored]
        while unread:
            current = unread.pop()
            for operand in current.inputs:
                self._readers[operand].remove(current)
                if not self.reads(operand) and operand.kind != "input":
                    unread.append(operand)

    def result(self) -> FoldedGraph:
        """The rewritten graph."""
        alive = reachable([output for output in self.outputs if isinstance(output, Stored)])
        order = sorted_by_use([stored for stored in self._order if stored in alive or stored.kind == "input"])
        values, parts = [], []
        for stored in order:
            for claim in self.claims.get(stored, ()):
                if claim.channels is None:
                    values.append((claim.node, stored, claim.affine, claim.usable))
                else:
                    affine = claim.affine
                    record = Record(claim.node.name, affine.scale, affine.shift, claim.usable, claim.channels, claim.image)
                    parts.append((stored, record))
        return dataclasses.replace(self.folded, order=order, outputs=self.outputs, values=values, parts=parts)
