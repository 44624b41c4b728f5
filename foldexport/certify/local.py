"""The local certificate: each folded operator on the training graph's own values, compared channel by channel.

What it reads is exact, so what it gives is its own doing: a mistake is seen where it is made and at full size, however
little of it would be left at the outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from foldexport.certify.lockstep import NUDGE, Lockstep, Schedule, Visit, is_identity, is_inexact
from foldexport.trace.views import packet_name

if TYPE_CHECKING:
    from foldexport.fold.records import Record
    from foldexport.probes import Probe

TOLERANCE = 1e-11  # of the channel's peak
CHANNEL_FLOOR = 1e-6  # of the tensor's peak: a channel below it is judged as if it reached it
CLOSE = 0.1  # of its bound: a channel that comes nearer is looked at again, so that `worst` is no rounding artefact
ROUNDING = 2.0**-44  # 512 units of float64 roundoff: what an operator's own sums may lose

_LAST_AXIS = frozenset({"linear", "layer_norm", "rms_norm", "addmm", "mm", "bmm", "baddbmm", "matmul"})


@dataclass(frozen=True)
class Finding:
    """The worst channel of one value at one folded operator.

    value: name of the training graph's node; value_module: the user's module that makes it there.
    operator: name of the folded node; module: the user's name of it.
    channel: None where the value has no channels or the whole value is concerned; note: why, when it is not a number.
    carried: the operator only hands an image of the value on, beside what it computes.
    """

    value: str
    value_module: str
    operator: str
    module: str
    channel: int | None
    error: float
    bound: float
    probe: str
    note: str = ""
    carried: bool = False

    @property
    def ratio(self) -> float:
        """Error in units of its bound; infinite when it is not a number."""
        if self.error <= self.bound:
            return self.error / self.bound if self.bound > 0 else 0.0
        return self.error / self.bound if self.bound > 0 and math.isfinite(self.error) else math.inf

    def __str__(self) -> str:
        verb = "carry" if self.carried else "give"
        what = f"'{self.module}' does not {verb} the training graph's '{self.value_module or self.value}'"
        where = "" if self.channel is None else f", channel {self.channel}"
        detail = self.note or f"error {self.error:.3g}, allowed {self.bound:.3g}"
        return f"{what} ({self.value}{where}): {detail}, on probe '{self.probe}'"


def findings_on(run: Lockstep, probe: Probe, schedule: Schedule) -> tuple[list[Finding], dict[str, Tensor]]:
    """(the worst channel of every record on one probe, in the order of evaluation; value -> ``[C]`` its peaks)."""
    training = {node.name: node for node in schedule.graph.fx.nodes}
    findings, scratch = [], Scratch()
    for visit in run:
        label = schedule.program.labels.get(visit.node.name) or visit.node.name
        if visit.refusal:
            where = visit.records[-1].value if visit.records else visit.node.name
            note = f"it cannot run on the training graph's values ({visit.refusal})"
            findings.append(Finding(where, "", visit.node.name, label, None, math.inf, 0.0, probe.name, note))
        for record in visit.records if visit.computed is not None else ():
            channel, error, bound, note = _compare(run, visit, record, training[record.value], scratch)
            module = training[record.value].meta.get("module", "")
            carried = record.image is not None
            findings.append(
                Finding(record.value, module, visit.node.name, label, channel, error, bound, probe.name, note, carried)
            )
        del visit  # its values must not outlive the next evaluation
    return findings, scratch.peaks


def _compare(run: Lockstep, visit: Visit, record: Record, training: fx.Node, scratch: Scratch) -> tuple:
    """(channel, error, bound, note) of one record's worst channel."""
    value, computed = visit.values.get(record.value), visit.computed
    if not isinstance(value, Tensor) or not isinstance(computed, Tensor):
        equal = type(value) is type(computed) and (isinstance(value, tuple | list) or value == computed)
        return None, 0.0 if equal else math.inf, 0.0, "" if equal else f"it gives {computed!r} for {value!r}"
    value, computed = record.seen(value), record.part(computed)
    if value.shape != computed.shape:
        note = f"it gives shape {list(computed.shape)}, wanted {list(value.shape)}"
        return None, math.inf, 0.0, note
    if not is_inexact(value):
        wrong = int((value != computed).sum()) if visit.exact else 0
        return None, float(wrong), 0.0, f"{wrong} of {value.numel()} entries differ" if wrong else ""
    if value.numel() == 0:
        return None, 0.0, 0.0, ""
    axis = channel_axis(record, value, training)
    errors, peaks = scratch.errors_and_peaks(record, computed, value, axis)
    bounds = TOLERANCE * torch.maximum(peaks, CHANNEL_FLOOR * peaks.max())
    for look in (recovery_rounding, operator_rounding):
        if not bool((errors <= CLOSE * bounds).all()):
            bounds = bounds + look(run, visit, record, axis)
    ratio = torch.where(errors <= bounds, errors / bounds.clamp_min(1e-300), math.inf)
    excess = torch.where(errors <= bounds, ratio, torch.where(errors.isnan(), math.inf, 1 + errors / peaks.max()))
    worst = int(excess.argmax())
    channel = int(record.image.index[worst]) if record.image is not None else worst if len(errors) > 1 else None
    return channel, float(errors[worst]), float(bounds[worst]), ""


def channel_axis(record: Record, value: Tensor, training: fx.Node) -> int | None:
    """The axis that the record varies on if it is one; else 1, or the last for operators on the last axis."""
    varying = {
        axis - tensor.dim() + value.dim()
        for tensor in (record.scale, record.shift)
        for axis, size in enumerate(tensor.shape)
        if size > 1
    } - {0}
    if len(varying) == 1:
        return varying.pop()
    if value.dim() < 2:
        return None
    return value.dim() - 1 if packet_name(training.target) in _LAST_AXIS else 1


def recovery_rounding(run: Lockstep, visit: Visit, record: Record, axis: int | None) -> Tensor:
    """``[C]`` or ``[1]``: what float64 loses in ``scale·s + shift``, ``ROUNDING · (max_c |scale·s| + max_c |shift|)``.

    Where γ = 1e-8 follows a convolution, the convolution's own value is ``(s − shift)·1e8`` and keeps only half the
    digits of s. A wrong record or bias is wrong by a part of these terms, not by their last digits.
    """
    computed = record.part(visit.computed)
    scale, shift = (_along(part.abs(), computed.dim(), axis) for part in (record.scale, record.shift))
    if record.image is not None:
        shift = shift + 2 * _along(record.image.offsets(computed.dim()), computed.dim(), axis)
    total = ROUNDING * (scale * channel_peaks(computed, axis) + shift)
    return torch.where(total.isfinite(), total, 0.0)


def operator_rounding(run: Lockstep, visit: Visit, record: Record, axis: int | None) -> Tensor:
    """``[C]``: what float64 loses inside the operator, ``ROUNDING / NUDGE · max_c |scale·(s' − s)|``.

    s' is its result when each input moves by ±NUDGE of the size at which that was rounded,
    ``|s_in| + |shift_in / scale_in|``: the operator's own condition, measured. A sum whose terms cancel (a dead
    channel that carries a pending shift, the normalisation of a constant) is no better known than its terms.
    """
    moved = (run.nudged(visit, seed) for seed in (1, 2))
    condition = sum(channel_peaks(record.scale * record.part(each - visit.computed), axis) for each in moved)
    total = ROUNDING / NUDGE * condition
    return torch.where(total.isfinite(), total, 0.0)


def _along(part: Tensor, rank: int, axis: int | None) -> Tensor:
    """``[C]`` or ``[1]``: the largest entry of a record's part for each channel."""
    aligned = part.reshape((1,) * (rank - part.dim()) + tuple(part.shape))
    others = tuple(place for place in range(rank) if place != axis)
    return (aligned.amax(others) if others else aligned).reshape(-1)


def channel_peaks(values: Tensor, axis: int | None) -> Tensor:
    """``[C]``: largest magnitude along every other axis; ``[1]`` without an axis. NaN wherever one occurs."""
    values = values.abs() if values.is_complex() else values
    if axis is None:
        return torch.maximum(values.amax(), -values.amin()).reshape(1)
    inner = tuple(range(axis + 1, values.dim()))
    high, low = (values.amax(inner), values.amin(inner)) if inner else (values, values)
    outer = tuple(range(axis))
    return torch.maximum(high.amax(outer), -low.amin(outer)) if outer else torch.maximum(high, -low)


class Scratch:
    """One buffer for all differences, fresh memory being slower than the arithmetic; and the peaks of what was seen."""

    def __init__(self) -> None:
        self.peaks: dict[str, Tensor] = {}
        self._buffer = torch.empty(0, dtype=torch.float64)

    def errors_and_peaks(self, record: Record, computed: Tensor, value: Tensor, axis: int | None) -> tuple:
        """``max_c |scale·s + shift − v|`` and ``max_c |v|``; equal infinities and NaNs differ by nothing."""
        error = self._difference(record, computed, value)
        errors, peaks = channel_peaks(error, axis), channel_peaks(value, axis)
        if record.image is None:
            self.peaks[record.value] = peaks
        if bool(errors.isfinite().all()) and bool(peaks.isfinite().all()):
            return errors, peaks
        recovered = record.scale * computed + record.shift
        same = (recovered == value) | (recovered.isnan() & value.isnan())
        same = same if record.usable is None else same | ~record.usable
        errors = channel_peaks(torch.where(same, 0.0, recovered - value), axis)
        return errors, channel_peaks(torch.where(value.isfinite(), value, 0.0), axis)

    def _difference(self, record: Record, computed: Tensor, value: Tensor) -> Tensor:
        if value.dtype != torch.float64 or computed.dtype != torch.float64:
            error = record.scale * computed + record.shift - value
        else:
            if self._buffer.numel() < value.numel():
                self._buffer = torch.empty(value.numel(), dtype=torch.float64)
            error = self._buffer[: value.numel()].view(value.shape)
            if is_identity(record):
                return torch.sub(computed, value, out=error)
            torch.mul(computed, record.scale, out=error).add_(record.shift).sub_(value)
        return error if record.usable is None else error.masked_fill_(~record.usable, 0.0)
