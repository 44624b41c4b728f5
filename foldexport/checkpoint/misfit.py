"""Why weights do not fit a network, in words: other classes, input channels, width, depth, names, kinds of layers.

Every explanation compares the checkpoint's names and shapes with the network's, and says nothing where it does not hold
for all of what differs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.parameter import is_lazy

Shapes = Mapping[str, tuple[int, ...]]
Rule = tuple[tuple[str, ...], tuple[str, ...]]

MAX_RULES = 4
TRIED_NAMES = 6  # of the network's names, as what one of the checkpoint's is called there


@dataclass(frozen=True)
class Misfit:
    """What differs. named, expected: shapes by name, of the checkpoint and of the network, in their own order."""

    named: Shapes
    expected: Shapes
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    reshaped: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many names do not fit."""
        return len(self.missing) + len(self.surplus) + len(self.reshaped)


def weights(keys: Iterable[str]) -> set[str]:
    """The names that must fit: all but the counters of batch norms."""
    return {key for key in keys if key.rsplit(".", 1)[-1] != "num_batches_tracked"}


def misfit(named: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Misfit:
    """What differs between a checkpoint's tensors and a network's."""
    have, want = ({key: () if is_lazy(t) else tuple(t.shape) for key, t in each.items()} for each in (named, expected))
    must, given = weights(want), weights(have)
    missing = tuple(key for key in want if key in must and key not in have)
    surplus = tuple(key for key in have if key in given and key not in want)
    reshaped = tuple(k for k in want if k in have and not is_lazy(expected[k]) and not _alike(have[k], want[k]))
    return Misfit(have, want, missing, surplus, reshaped)


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Scalars of PyTorch 0.3 have shape [1], later ones []."""
    return one == other or {one, other} == {(), (1,)}


def explanations(found: Misfit) -> list[str]:
    """Sentences that each explain everything that differs, or part of it; empty where none does."""
    told = [outputs(found), inputs(found), width(found), transposed(found), depth(found), kinds(found), renaming(found)]
    return [sentence for sentence in told if sentence]


# ---- shapes


def changed_sizes(found: Misfit) -> list[tuple[int, int]]:
    """(the network's, the checkpoint's) sizes that differ, commonest first."""
    pairs = Counter(
        (mine, theirs)
        for key in found.reshaped
        if len(found.named[key]) == len(found.expected[key])
        for theirs, mine in zip(found.named[key], found.expected[key])
        if theirs != mine
    )
    return [pair for pair, _ in pairs.most_common()]


def outputs(found: Misfit) -> str:
    """Layers whose outputs alone differ, all by the same number, are classifiers for another number of classes."""
    keys = found.reshaped
    if found.missing or found.surplus or not keys or any(not found.named[key] for key in keys):
        return ""
    counts = {found.named[key][0] for key in keys}
    only_outputs = all(found.named[key][1:] == found.expected[key][1:] for key in keys)
    layers = list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
    if not only_outputs or len(counts) != 1 or len(layers) > 3:
        return ""
    return f"The checkpoint has {counts.pop()} outputs in {' and '.join(layers)}"


def inputs(found: Misfit) -> str:
    """One layer that reads another number of channels, the rest alike."""
    if found.missing or found.surplus or len(found.reshaped) != 1:
        return ""
    (key,) = found.reshaped
    theirs, mine = found.named[key], found.expected[key]
    if len(theirs) < 2 or len(theirs) != len(mine) or theirs[:1] + theirs[2:] != mine[:1] + mine[2:]:
        return ""
    return f"The checkpoint reads {theirs[1]} input channels in {key.rpartition('.')[0]}, the network {mine[1]}"


def width(found: Misfit) -> str:
    """Most sizes that differ do so by one factor."""
    if found.missing or found.surplus or len(found.reshaped) < 4:
        return ""
    factors = Counter(theirs / mine for mine, theirs in changed_sizes(found) if mine and theirs)
    factor, times = factors.most_common(1)[0] if factors else (1.0, 0)
    if times * 2 <= sum(factors.values()):
        return ""
    return f"The checkpoint's layers are {factor:.4g} times as wide"


def transposed(found: Misfit) -> str:
    """Matrices and kernels with their axes the other way round, as other frameworks store them."""
    turned = [key for key in found.reshaped if found.named[key] == found.expected[key][::-1]]
    kernels = [k for k in found.reshaped if len(found.named[k]) == 4 and _permuted(found.named[k]) == found.expected[k]]
    axes = kernels or turned
    if not axes or len({*turned, *kernels}) != len(found.reshaped):
        return ""
    return f"The checkpoint's weights have their axes in another framework's order, as in {axes[0]}"


def _permuted(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[kH, kW, Cin, Cout] as [Cout, Cin, kH, kW]."""
    return (shape[3], shape[2], shape[0], shape[1])


# ---- names


def numbered(keys: Iterable[str]) -> dict[str, int]:
    """How many numbered parts each sequence of parts has: {"layer1": 3} for "layer1.0.…" to "layer1.2.…", in order."""
    counts: dict[str, set[str]] = {}
    for key in keys:
        parts = key.split(".")
        for at, part in enumerate(parts[:-1]):
            if part.isdigit():
                counts.setdefault(".".join(parts[:at]), set()).add(part)
    return {name: len(numbers) for name, numbers in counts.items()}


def stages(keys: Iterable[str]) -> dict[str, int]:
    """How many parts have one name and a number: {"layer": 4} for "layer1.…" to "layer4.…"."""
    found = (re.fullmatch(r"(.*[A-Za-z_])(\d+)", key.split(".")[0]) for key in keys if "." in key)
    pairs = {match.groups() for match in found if match}
    return dict(Counter(name for name, _ in sorted(pairs)))


def changed_depths(found: Misfit) -> list[tuple[str, int, int]]:
    """(sequence, the network's, the checkpoint's number of parts) where they differ."""
    mine, theirs = ({**numbered(keys), **stages(keys)} for keys in (found.expected, found.named))
    return [(name, mine[name], theirs[name]) for name in mine if name in theirs and mine[name] != theirs[name]]


def depth(found: Misfit) -> str:
    """Whole numbered parts that only one of the two has."""
    changes = [change for change in changed_depths(found) if change[0]]
    odd = [*found.missing, *found.surplus]
    if not changes or not odd or found.missing and found.surplus:
        return ""
    if not all(any(key.startswith(f"{name}.") or re.match(rf"{re.escape(name)}\d", key) for name, _, _ in changes) for key in odd):
        return ""
    told = [f"{theirs} parts in {name}, the network {mine}" for name, mine, theirs in changes[:MAX_RULES]]
    return f"The checkpoint has {'; '.join(told)}"


def kinds(found: Misfit) -> str:
    """One kind of tensor in all layers that only one of the two has: biases, statistics of batch norms."""
    for keys, who, other in (
        (found.missing, "The network has", "the checkpoint none"),
        (found.surplus, "The checkpoint has", "the network none"),
    ):
        leaves = {key.rpartition(".")[2] for key in keys}
        rest = found.surplus if keys is found.missing else found.missing
        if len(keys) > 1 and not rest and not found.reshaped and leaves == {"bias"}:
            return f"{who} a bias in {len(keys)} layers more, {other}"
    return ""


def renaming(found: Misfit) -> str:
    """A few replacements in the checkpoint's names under which all names and shapes fit."""
    rules = renaming_rules(found)
    if not rules:
        return ""
    told = [f"`{'.'.join(old)}` were `{'.'.join(new)}`" for old, new in rules]
    return f"Every name would fit if in the checkpoint's {' and '.join(told)}"


def renaming_rules(found: Misfit) -> list[Rule]:
    """Replacements of parts of names that turn all surplus names into the missing ones, shapes alike; [] without such."""
    if found.reshaped or not found.missing or len(found.missing) != len(found.surplus):
        return []
    left, wanted = list(found.surplus), dict.fromkeys(found.missing)
    rules: list[Rule] = []
    while left and len(rules) < MAX_RULES:
        rule, hits = _best_rule(left, wanted, found)
        if not hits:
            return []
        rules.append(rule)
        left = [key for key in left if key not in hits]
        for new in hits.values():
            del wanted[new]
    return [] if left else rules


def _best_rule(left: list[str], wanted: Mapping[str, None], found: Misfit) -> tuple[Rule, dict[str, str]]:
    """The replacement, read off the first name, that fits the most: (rule, {old name: new name})."""
    alike = [key for key in wanted if found.expected[key] == found.named[left[0]]]
    best: tuple[Rule, dict[str, str]] = (((), ()), {})
    for name in alike[:TRIED_NAMES]:
        rule = _difference(left[0].split("."), name.split("."))
        hits = {key: new for key in left if (new := _replaced(key, rule)) in wanted and found.expected[new] == found.named[key]}
        if len(hits) > len(best[1]) and len(set(hits.values())) == len(hits):
            best = (rule, hits)
    return best


def _difference(one: list[str], other: list[str]) -> Rule:
    """The parts that differ, between what both begin and end with."""
    start = 0
    while start < min(len(one), len(other)) - 1 and one[start] == other[start]:
        start += 1
    end = 0
    while end < min(len(one), len(other)) - start - 1 and one[-1 - end] == other[-1 - end]:
        end += 1
    return tuple(one[start : len(one) - end]), tuple(other[start : len(other) - end])


def _replaced(key: str, rule: Rule) -> str:
    """key with the first occurrence of the rule's old parts replaced."""
    parts, (old, new) = key.split("."), rule
    for at in range(len(parts) - len(old) + 1):
        if tuple(parts[at : at + len(old)]) == old:
            return ".".join([*parts[:at], *new, *parts[at + len(old) :]])
    return key
