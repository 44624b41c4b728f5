"""A folded network in a half type: measured, rescaled, proved, and rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from foldexport import probes as drawn
from foldexport.certify.rounding import REFUSE, Rounding, rounding
from foldexport.errors import EquivalenceError, PrecisionError, UsageError
from foldexport.interpret import outputs
from foldexport.precision import room
from foldexport.precision.emulate import folded_run, own_run
from foldexport.precision.groups import groups_of
from foldexport.precision.half import PlainHalf, in_half
from foldexport.precision.homogeneous import CLAMPS, SUMS, VIEWS, name_of
from foldexport.precision.kept import kept_as_asked
from foldexport.precision.ranges import Misfit, Size, Sizes, exponents, measure, misfits
from foldexport.precision.readback import MULTIPLIERS, Delivered, require_delivered
from foldexport.precision.scales import factors, prove, rescaled
from foldexport.precision.types import NumberType

if TYPE_CHECKING:
    from foldexport.fold.rebuild import Program
    from foldexport.trace import Graph


SMALL_SHARE = 0.5  # of the weights in the type, below which it is said
#: What reads a small value and makes the same, or its root.
HANDING_ON = VIEWS | {"clone", "contiguous", "detach", "alias", "dropout", "to", "abs", "neg", "sqrt", "rsqrt", "reciprocal"}


@dataclass(eq=False)
class RangeReport:
    """What the type would not have held, and what was done about it.

    before: tensors of the folded network that overflow or vanish in the type as they are, by the user's layer.
    rescaled: groups of values that were given another scale; exponents: the smallest and the largest power of two.
    compared: values of the rescaled program that have the same bits as before, but for the exponent.
    single: layers that stay in float32, and why; asked: the names that the user gave for that. layers: convolutions and linear
    layers, all and in the half type. measured_on: what ranges were measured on; headroom: by what factor its values may grow before
    one overflows.
    """

    precision: str
    before: list[dict[str, Any]] = field(default_factory=list)
    rescaled: int = 0
    exponents: tuple[int, int] = (0, 0)
    compared: int = 0
    single: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    layers: tuple[int, int] = (0, 0)
    largest: tuple[float, float] = (0.0, 0.0)
    measured_on: list[str] = field(default_factory=list)
    headroom: float | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "precision": self.precision, "misfits_before": self.before, "groups_rescaled": self.rescaled,
            "exponents": list(self.exponents), "values_proved": self.compared, "float32_layers": self.single,
            "kept_as_asked": self.asked,
            "layers": self.layers[0], "layers_in_type": self.layers[1], "largest_weight": self.largest[0],
            "largest_activation": self.largest[1], "measured_on": self.measured_on, "headroom": self.headroom, "notes": self.notes,
        }  # fmt: skip


@dataclass(eq=False)
class Prepared:
    """What is exported, and by what it is judged.

    module: floating inputs and outputs in float32, layers in the type. rounding: the training graph's own error in that type,
    and the module's in its multiples. low: the training graph in that type, ``inputs → outputs``.
    """

    module: nn.Module
    kind: NumberType
    rounding: Rounding
    low: Callable[[tuple], list[Any]]
    report: RangeReport

    half_io: bool = False

    @property
    def levels(self) -> list[float]:
        return self.rounding.levels

    @property
    def unit(self) -> dict[str, Any]:
        """What the reference needs to know: whose noise the unit is, how it was measured, what artifacts are fed."""
        return {"unit": self.kind.name, "low": self.low, "dtype": self.kind.dtype if self.half_io else torch.float32}

    def given(self, example: tuple) -> tuple:
        """The example as the module takes it."""
        dtype = self.kind.dtype if self.half_io else torch.float32
        return tuple(each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in example)

    def require_delivered(self, exporter: Any, path: str | Path) -> Delivered:
        """What the file is really in. Raises PrecisionError where that is not what was asked."""
        return require_delivered(exporter, path, self.module, self.kind.dtype)

    def to_dict(self) -> dict[str, Any]:
        return {**self.report.to_dict(), "rounding": self.rounding.to_dict()}


@torch.no_grad()
def prepare(
    graph: Graph,
    program: Program | None,
    kind: NumberType,
    *,
    module: nn.Module | None = None,
    inputs: Sequence[tuple] = (),
    data: Sequence[Any] = (),
    seed: int = 0,
    half_io: bool = False,
    rescale: bool = True,
    keep: Sequence[str] = (),
    known_range: bool = False,
) -> Prepared:
    """Bring a folded network into ``kind``.

    program: the folded network in float64; without one, ``module`` is taken as it is. inputs: on which ranges are measured, in
    float64; drawn where there are none. data: the user's own, one array per input. rescale: use the freedom
    of scale (foldexport.precision.groups). keep: names of modules that stay in float32 whatever they hold, with all below them.
    known_range: something says how images are normalised, so that normal numbers are like them; else pixels from 0 to 255 are
    measured too, and held where that keeps no further layer in float32.

    Raises UsageError for a name in ``keep`` that the folded network does not have, PrecisionError where nothing of the network
    fits, EquivalenceError where the result is further from the training graph than eight times that graph's own error in the type.
    """
    noise = drawn.noise_probes(graph, seed=seed)
    low = own_run(graph, kind)
    if program is None:
        return _plain(graph, module, kind, noise, low, half_io)
    asked = kept_as_asked(graph, program, keep)
    inputs = [*(inputs or _finite(graph, seed)), *(probe.inputs for probe in noise[:1]), *_users(graph, data)]
    sizes = measure(program.module, inputs)
    fit = _fit(program.module, inputs, sizes, kind, rescale=rescale)
    measured, beyond = ["your data"] if len(data) else ["normal numbers"], ""
    if not len(data) and not known_range and (pixels := room.pixels(graph, seed)) is not None:
        wide = measure(program.module, [pixels])
        if room.overflows(wide, kind):
            other = _fit(program.module, [*inputs, pixels], room.joined(sizes, wide), kind, rescale=rescale)
            if other.single.keys() <= fit.single.keys():
                fit = other
            else:
                name = next(name for name in other.single if name not in fit.single)
                beyond = program.labels.get(name) or name
        measured += [] if beyond else ["pixels from 0 to 255"]
    report, changed, scaled, single = fit.report, fit.changed, fit.sizes, fit.single
    report.measured_on, report.headroom = measured, room.headroom(scaled, single, kind)
    if beyond:
        report.notes.append(
            f"ranges were measured on normal numbers only: on pixels from 0 to 255 '{beyond}' overflows; pass --data with samples "
            "like those that it will see"
        )
    _describe(report, program, changed, scaled, fit.before, single, asked, kind)
    if asked and report.layers[0] and not report.layers[1]:
        raise UsageError(f"--keep-fp32 {','.join(keep)}: no layer is left for {kind.name}; name fewer, or ask for fp32.")
    if report.layers[0] and not report.layers[1]:
        first = next(iter(report.single.items()))
        raise PrecisionError(f"{kind.name}: no layer of the network fits ({first[0]}: {first[1]}); ask for bf16 or fp32.")
    single32 = single.keys() | asked.keys()
    run = folded_run(changed, scaled.shapes, kind, single32)
    found = rounding(graph, {"folded": run}, noise, kind.dtype, low=low)
    _require(found, kind)
    return Prepared(in_half(changed, scaled.shapes, kind, single32, half_io=half_io), kind, found, low, report, half_io)


@dataclass(eq=False)
class _Fit:
    """A network brought into a type: what was done, what fits no more before and after, and what stays in float32."""

    changed: fx.GraphModule
    sizes: Sizes
    before: list[Misfit]
    single: dict[str, Misfit]
    report: RangeReport


def _fit(module: fx.GraphModule, inputs: Sequence[tuple], sizes: Sizes, kind: NumberType, *, rescale: bool) -> _Fit:
    before = misfits(module, sizes, inputs, kind)
    changed, scaled, report = module, sizes, RangeReport(kind.name)
    if rescale:
        changed, scaled = _rescale(module, sizes, inputs[0], kind, report)
    after = misfits(changed, scaled, inputs, kind) if report.rescaled else before
    return _Fit(changed, scaled, before, _single(changed, after, scaled.shapes), report)


def _finite(graph: Graph, seed: int) -> list[tuple]:
    """The certificate's probes, for a network that has no certificate: those on which the training graph is finite."""
    found = []
    for probe in drawn.make(graph, seed=seed):
        if not probe.optional:
            values = [each for each in outputs(graph, probe.inputs) if isinstance(each, torch.Tensor) and each.is_floating_point()]
            if all(bool(each.isfinite().all()) for each in values):
                found.append(probe.inputs)
    return found


def _users(graph: Graph, data: Sequence[Any]) -> list[tuple]:
    """The user's own samples, all of them."""
    from foldexport.verify.reference import chunks

    return chunks(graph, data) if len(data) else []


def _rescale(
    module: fx.GraphModule, sizes: Sizes, inputs: tuple, kind: NumberType, report: RangeReport
) -> tuple[fx.GraphModule, Sizes]:
    groups = groups_of(module, sizes.shapes)
    chosen = exponents(module, groups, sizes, kind)
    if not chosen:
        return module, sizes
    scales = {root: 2.0**exponent for root, exponent in chosen.items()}
    changed = rescaled(module, groups, scales)
    report.compared = prove(module, changed, groups, scales, inputs)
    report.rescaled, report.exponents = len(chosen), (min(chosen.values()), max(chosen.values()))
    scaled = Sizes(shapes=sizes.shapes)
    for node in groups.slots:
        size = sizes.activations.get(node.name)
        if size is not None:
            factor = float(factors(groups, node, scales)[0])
            scaled.activations[node.name] = Size(size.peak * factor, size.rms * factor)
    return changed, scaled


def _single(module: fx.GraphModule, found: Sequence[Misfit], real) -> dict[str, Misfit]:
    """Which operators stay in float32: those that hold or make what does not fit, and those that read it.

    A view hands it on, and so does a root of what is small; then the operator behind stays too.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    single: dict[str, Misfit] = {}
    for misfit in found:
        node = nodes[misfit.node]
        if node.op in ("call_module", "call_function"):
            single.setdefault(node.name, misfit)
        if misfit.what in ("activation", "constant"):
            makers = [node]
            if node.op == "get_attr":  # what it is added to, or bounds, is as small
                makers += [each for each in node.users if name_of(each.target) in SUMS | CLAMPS]
            for user in _readers(makers):
                if user.op in ("call_module", "call_function") and (user.name in real or user.users):
                    single.setdefault(user.name, misfit)
    return single


def _readers(makers: Sequence[fx.Node]) -> list[fx.Node]:
    """Who reads a value, directly or through operators that hand it on, with those."""
    found: dict[fx.Node, None] = {}
    waiting = list(makers)
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found[user] = None
                if user.op == "call_function" and name_of(user.target) in HANDING_ON:
                    waiting.append(user)
    return list(found)


def _describe(
    report: RangeReport, program: Program, changed: fx.GraphModule, sizes: Sizes, before: list[Misfit],
    single: dict[str, Misfit], asked: dict[str, str], kind: NumberType,
) -> None:  # fmt: skip

    def label(name: str) -> str:
        return program.labels.get(name) or name

    report.before = [
        {"layer": label(each.node), "what": each.what, "problem": each.problem, "found": each.found} for each in before
    ]
    for name, misfit in single.items():
        of = "" if label(misfit.node) == label(name) else f" of '{label(misfit.node)}'"
        reaches = f"reaches {misfit.found:.3g} of {kind.largest:.3g}"
        how = reaches if misfit.problem == "overflows" else f"loses {misfit.found:.0f} roundoffs"
        report.single.setdefault(label(name), f"{misfit.what}{of} {misfit.problem} ({how})")
    for name, given in asked.items():
        report.single.setdefault(label(name), f"as asked (--keep-fp32 {given})")
    report.asked = list(dict.fromkeys(asked.values()))
    multiply = [
        node for node in changed.graph.nodes
        if node.op == "call_module" and isinstance(changed.get_submodule(node.target), MULTIPLIERS)
    ]  # fmt: skip
    report.layers = (len(multiply), sum(node.name not in single and node.name not in asked for node in multiply))
    sizes_of = {
        node.target: sum(each.numel() for each in changed.get_submodule(node.target).parameters()) for node in multiply
    }  # fmt: skip
    wide = {node.target for node in multiply if node.name in single or node.name in asked}
    share = 1.0 - sum(sizes_of[each] for each in wide) / max(1, sum(sizes_of.values()))
    if report.layers[1] and share < SMALL_SHARE:
        report.notes.append(
            f"only {share:.0%} of the weights are in {kind.label}, {report.layers[1]} of {report.layers[0]} layers: the others are "
            f"in float32, so the file is hardly smaller or faster{'' if kind.name == 'bf16' else '; bf16 has the range of float32'}"
        )
    weights = [float(each.abs().nan_to_num(0.0, 0.0, 0.0).max()) for each in changed.parameters() if each.numel()]
    report.largest = (max(weights, default=0.0), max((size.peak for size in sizes.activations.values()), default=0.0))


def _require(found: Rounding, kind: NumberType) -> None:
    multiple = found.multiples["folded"].multiple
    if multiple is not None and not multiple <= REFUSE:
        raise EquivalenceError(
            f"{kind.name}: the folded network's error is {multiple:.1f} times the training graph's own {kind.name} noise "
            f"({REFUSE:g} allowed); keep layers in float32 (--keep-fp32 NAME), or ask for fp32 or, where it is about range, bf16."
        )


def _plain(graph: Graph, module: nn.Module, kind: NumberType, noise, low, half_io: bool) -> Prepared:
    """A network that is not folded, in the type as it stands."""
    held = PlainHalf(module, kind.dtype, kind.dtype if half_io else torch.float32, len(graph.input_names)).eval()

    def run(inputs: tuple) -> list[Any]:
        given = [each.float() if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in inputs]
        return torch.utils._pytree.tree_leaves(held(*given))

    try:
        found = rounding(graph, {"folded": run}, noise, kind.dtype, low=low)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise PrecisionError(f"{kind.name}: the unfolded network does not run in it ({reason}); leave out --no-fold.") from error
    multiple = found.multiples["folded"].multiple
    if multiple is not None and not multiple <= REFUSE:
        raise PrecisionError(
            f"{kind.name}: the unfolded network itself is off by {found.multiples['folded'].error:.2g} of its peak in it "
            "(it overflows or vanishes): leave out --no-fold, or ask for bf16."
        )
    layers = sum(isinstance(each, MULTIPLIERS) for each in held.modules())
    return Prepared(held, kind, found, low, RangeReport(kind.name, layers=(layers, layers)), half_io)
