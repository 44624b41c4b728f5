"""Skip connections across a nonlinearity taken out, exactly: residual networks become plain chains (``--chain``).

Reserve and merge (RMNet, Meng et al. 2021, arXiv 2111.00687): the first convolution of a block also carries the block's
input, its last one adds it back. It costs multiply-adds, so it is done only when asked for.
"""

from __future__ import annotations

from foldexport.fold.chain.linear import Refused, named, only_operand
from foldexport.fold.chain.network import Network
from foldexport.fold.chain.regions import Region, find
from foldexport.fold.chain.tidy import tidy
from foldexport.fold.chain.widen import Turned, turn
from foldexport.fold.ledger import SKIP_CONNECTION, Ledger
from foldexport.fold.passes import FoldedGraph
from foldexport.fold.stored import Stored
from foldexport.fold.wishes import MAX_SIGMA


def chain_graph(folded: FoldedGraph, max_sigma: float = MAX_SIGMA) -> FoldedGraph:
    """The folded graph with every skip connection that can be turned inside its convolutions; the ledger tells each.

    max_sigma: how many RMS of a trunk a shift may measure that one half of it carries (`entry`).
    """
    network, turned = Network(folded), 0
    for total in [stored for stored in folded.order if stored.kind == "add"]:
        if any(operand.kind == "constant" for operand in total.inputs):
            continue
        mark = network.mark()
        try:
            region = find(network, total)
            found = turn(network, region, max_sigma)
        except (Refused, ValueError) as refusal:  # the algebra says in a ValueError why a merge would not be exact
            network.undo(mark)
            folded.ledger.kept(_key(total), named(total), SKIP_CONNECTION, str(refusal))
            continue
        network.replace(total, found.stored)
        _tell(folded.ledger, region, found)
        turned += 1
    for stored in folded.order:
        if stored.kind == "cat" and network.reads(stored) and only_operand(stored) is None:
            reason = "a concatenation keeps its operands side by side: only sums are turned"
            folded.ledger.kept(_key(stored), named(stored), SKIP_CONNECTION, reason)
    if turned:
        tidy(network)
    folded.ledger.arrange({node: place for place, node in enumerate(folded.graph.fx.nodes)})
    return network.result()


def _key(stored: Stored) -> tuple:
    return ("chain", stored.name, stored.node)


def _tell(ledger: Ledger, region: Region, found: Turned) -> None:
    """Where a skip connection went, and what is carried beside the branch."""
    entry = ledger.note(_key(region.total), named(region.total), SKIP_CONNECTION)
    names = [stage.label for stage in region.stages if stage.conv is not None]
    names += [named(region.last_made)] if region.last_made is not None else []
    names = list(dict.fromkeys(names)) or [named(found.stored)]
    entry.into = ", ".join(names if len(names) < 5 else [*names[:2], *names[-2:]])
    if region.stages:
        how = "as relu(x) and relu(-x)" if found.halves else "as it is"
        entry.reason = f"`{named(found.origin)}` is carried beside it in {found.channels} channels, {how}"
