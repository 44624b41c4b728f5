"""What the probes leave unvisited: the far side of a clamp, and readers of channels that nothing brings to life.

Probes have values near 1. A ReLU6 that became a ReLU, or a wrong weight behind a channel that is 0 on all of them, gives what
the training graph gives there. So the local certificate, which compares operators one by one, is asked twice more, on

- inputs of a size that reaches the clamps: the normal probe times `FACTORS`;
- values that the network does not take: each channel that was 0 throughout gets the values of its tensor's loudest channel, moved
  on by one place. The training graph goes on from these, and a folded operator reads them as its references.

The second is an intervention in the training graph, which a folded operator sees through what it reads and in no other way.
An operator whose training values depend on an intervened one by another way (it makes that value itself, or was composed with what
made it) is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from foldexport.certify.local import Finding, findings_on
from foldexport.certify.lockstep import Lockstep, Schedule, is_inexact
from foldexport.interpret import Instead, evaluate

if TYPE_CHECKING:
    from foldexport.fold.records import Record
    from foldexport.probes import Probe

FACTORS = (64.0, -4096.0)
REVIVED = "silent channels revived"


def scaled(probe: Probe) -> Iterator[Probe]:
    """The probe times each of `FACTORS`, where it has floating inputs."""
    if any(is_inexact(value) for value in probe.inputs):
        for factor in FACTORS:
            inputs = tuple(value * factor if is_inexact(value) else value for value in probe.inputs)
            yield replace(probe, name=f"{probe.name} times {factor:g}", inputs=inputs)


def failures_on(schedule: Schedule, probe: Probe, watch: frozenset[str], usable: Callable[[dict[str, Any]], bool]) -> list[Finding]:
    """Operators that fail on a probe; none where the training graph's outputs are not ``usable`` there, or it refuses the input."""
    run = Lockstep(schedule, probe.inputs, watch)
    try:
        findings, _ = findings_on(run, probe, schedule)
    except Exception:  # asked of it as an extra, outside of what it is made for
        return []
    return [finding for finding in findings if not finding.error <= finding.bound] if usable(run.watched) else []


def failures_revived(
    schedule: Schedule, probe: Probe, watch: frozenset[str], usable: Callable[[dict[str, Any]], bool], peaks: dict[str, Tensor]
) -> tuple[list[Finding], list[str]]:
    """(operators that fail when silent channels are brought to life, the values that were changed).

    peaks: value -> ``[C]``, over all probes.
    """
    changed: list[str] = []
    held = _held(schedule)
    partly = {name: each for name, each in peaks.items() if len(each) > 1 and bool((each != 0).any())}
    dead = {name: (each == 0) & held(name, len(each)) for name, each in partly.items()}
    silent = {name: each for name, each in dead.items() if bool(each.any())}
    if not silent:
        return [], changed
    named = replace(probe, name=REVIVED)
    run = Lockstep(schedule, probe.inputs, watch, _reviving(silent, changed))
    try:
        findings, _ = findings_on(run, named, schedule)
    except Exception:  # values that the network never takes may be refused by any of its operators
        return [], []
    seen = _Seen(schedule, set(changed))
    wrong = [finding for finding in findings if not finding.error <= finding.bound]
    return [each for each in wrong if seen.whole(each)] if usable(run.watched) else [], changed


def _held(schedule: Schedule) -> Callable[[str, int], Tensor]:
    """(value, channels) -> ``[C]`` where every stored tensor of it can hold any value.

    A channel that is multiplied by 0 is 0 for all inputs. The fold knows it: no stored tensor has it (its scale is 0), no layer
    reads it.
    """
    records: dict[str, list[Record]] = {}
    for each in schedule.records.values():
        for record in each:
            records.setdefault(record.value, []).append(record)

    def held(name: str, channels: int) -> Tensor:
        every = torch.ones(channels, dtype=torch.bool)
        for record in records.get(name, ()):
            known = record.scale != 0 if record.usable is None else (record.scale != 0) & record.usable
            axes = known.numel() in (1, channels) and record.is_whole
            every &= known.reshape(-1) if axes else torch.zeros(channels, dtype=torch.bool)
        return every

    return held


def _reviving(silent: dict[str, Tensor], changed: list[str]) -> Instead:
    def instead(node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        if node.name not in silent:
            return None
        value = evaluate(node, args, kwargs)
        dead = silent[node.name]
        if not is_inexact(value) or value.dim() < 2 or value.shape[1] != len(dead):
            return value
        alive = value.abs().transpose(0, 1).flatten(1).amax(1).masked_fill(dead, 0.0)
        if not bool(alive.isfinite().all()) or not bool(alive.any()):
            return value
        changed.append(node.name)
        value = value.clone()
        value[:, dead] = value[:, int(alive.argmax())].roll(1, -1).unsqueeze(1)
        return value

    return instead


class _Seen:
    """Whether all that an intervention changes in a folded operator's values comes to it through what it reads."""

    def __init__(self, schedule: Schedule, changed: set[str]) -> None:
        self._schedule, self._changed = schedule, changed
        self._training = {node.name: node for node in schedule.graph.fx.nodes}
        self._folded = {node.name: node for node in schedule.program.module.graph.nodes}

    def whole(self, finding: Finding) -> bool:
        """Walks back from the training value, up to those that the operator reads; none on the way may have been changed."""
        operator = self._folded[finding.operator]
        if finding.value not in self._training or finding.value in self._changed:
            return False
        read, unsafe = self._read_by(operator)
        waiting, visited = list(self._training[finding.value].all_input_nodes), set()
        while waiting:
            node = waiting.pop()
            if node.name in unsafe:
                return False
            if node in visited or node.name in read:
                continue
            if node.name in self._changed:
                return False
            visited.add(node)
            waiting += node.all_input_nodes
        return True

    def _read_by(self, operator: fx.Node) -> tuple[set[str], set[str]]:
        """(training values that its inputs stand for, those that cannot be had from an input whose own were changed)."""
        read, unsafe = set(), set()
        for source in operator.all_input_nodes:
            records = self._schedule.records.get(source.name, [])
            names = [record.value for record in records]
            if len(set(names)) > 1 and self._changed & set(names):
                unsafe |= set(names)
            elif all(record.is_whole for record in records):
                read |= set(names)
        return read, unsafe
