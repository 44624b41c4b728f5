"""A chain of layers as nested ``nn.Sequential``, with the user's names and order."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from foldexport.fold.layers import Step
from foldexport.fold.passes import FoldedGraph
from foldexport.fold.stored import Stored


def as_sequential(folded: FoldedGraph, steps: dict[Stored, Step], names: dict[Stored, str]) -> nn.Sequential | None:
    """The folded network as ``nn.Sequential`` when it is a chain of layers with one input and one output, else None."""
    if len(folded.inputs) != 1 or len(folded.outputs) != 1 or not folded.graph.out_spec.is_leaf():
        return None
    chain, previous = [], folded.inputs[0]
    for stored in folded.order:
        if stored is previous:
            continue
        if stored.inputs != [previous] or steps[stored].module is None:
            return None
        if steps[stored].before is not None:
            chain.append((f"{names[stored]}_pad", steps[stored].before))
        chain.append((names[stored], steps[stored].module))
        previous = stored
    if not chain or folded.outputs[0] is not previous:
        return None
    if len({name for name, _ in chain}) < len(chain):
        return None  # a layer called twice
    return _nested(chain) or nn.Sequential(OrderedDict((name.replace(".", "_"), layer) for name, layer in chain))


def _nested(chain: list[tuple[str, nn.Module]]) -> nn.Sequential | None:
    """Sequentials along the dots of the names; None if a folder would have to be entered twice."""
    entries: OrderedDict[str, list | nn.Module] = OrderedDict()
    last = None
    for name, layer in chain:
        head, _, rest = name.partition(".")
        if head in entries and (head != last or not rest or not isinstance(entries[head], list)):
            return None
        if rest:
            entries.setdefault(head, []).append((rest, layer))
        else:
            entries[head] = layer
        last = head
    built: OrderedDict[str, nn.Module] = OrderedDict()
    for head, entry in entries.items():
        part = _nested(entry) if isinstance(entry, list) else entry
        if part is None:
            return None
        built[head] = part
    return nn.Sequential(built)
