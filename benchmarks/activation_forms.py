"""What became of the batch norms of a pre-activation network, and what each form of its activations costs.

    python benchmarks/activation_forms.py models/preresnet20_cifar10.pth [--rounds 300] [--json]

``relu(k·v + t)`` can be a plain ReLU (the shift absorbed upstream), a one-sided clamp (``max`` or ``min`` with a constant of
each channel), a two-sided clamp, or stay batch norm and ReLU. The forms alternate, round by round, under onnxruntime.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from interleaved import latencies_ms, ratio, sessions
from torch import fx, nn

import foldexport
from foldexport.fold.passes import fold_graph
from foldexport.fold.rebuild import rebuild
from foldexport.recognise import recognise

FORMS = {nn.ReLU: "plain ReLU", torch.maximum: "one-sided clamp", torch.minimum: "one-sided clamp", torch.clamp: "two-sided clamp"}


@dataclass(frozen=True)
class Activation:
    """An activation of the folded network: its form, and the channels whose shift went upstream, ``[C]``."""

    form: str
    absorbed: np.ndarray | None  # None: all


def activations(module: fx.GraphModule) -> list[Activation]:
    """In the order of the work."""
    found = []
    for node in module.graph.nodes:
        kind = type(module.get_submodule(node.target)) if node.op == "call_module" else node.target
        if kind is nn.ReLU:
            found.append(Activation(FORMS[kind], None))
        elif node.op == "call_function" and kind in FORMS:
            bounds = [getattr(module, arg.target).flatten() for arg in node.args[1:] if isinstance(arg, fx.Node)]
            found.append(Activation(FORMS[kind], np.any([np.asarray(bound.detach()) == 0 for bound in bounds], axis=0)))
    return found


def trunk_norms(network: nn.Module) -> list[tuple[int, nn.BatchNorm2d]]:
    """The batch norms that read the trunk, with their place among all: the first of every block, and the last."""
    norms = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    order = sorted(norms, key=lambda item: (item[0] == "bn", 0))  # the last one is registered behind the blocks, or first
    return [(i, module) for i, (name, module) in enumerate(order) if name.endswith(".bn1") or name == "bn"]


def largest_absorbed(network: nn.Module, found: list[Activation]) -> float:
    """The largest ``|β/γ|`` whose shift went into the layers that feed the trunk."""
    largest = 0.0
    for place, norm in trunk_norms(network):
        ratios = (norm.bias / norm.weight).abs().detach().numpy()
        absorbed = found[place].absorbed
        taken = ratios if absorbed is None else ratios[absorbed]
        largest = max(largest, float(taken.max(initial=0.0)))
    return largest


def forms(network: nn.Module, example: torch.Tensor) -> dict[str, nn.Module]:
    """The network in each form, float32."""
    folded = foldexport.fold(network, example)
    clamped = rebuild(fold_graph(folded.graph, max_sigma=0.0)).to(torch.float32)
    two_sided = copy.deepcopy(clamped)
    _both_bounds(two_sided)
    return {"chosen": folded.module, "nothing absorbed upstream": clamped, "every clamp two-sided": two_sided, "unfolded": network}


def _both_bounds(module: fx.GraphModule) -> None:
    """Every activation as a clamp of two bounds; the other one is the largest float, so that nothing changes."""
    top = torch.finfo(torch.float32).max
    for node in module.graph.nodes:
        is_relu = node.op == "call_module" and isinstance(module.get_submodule(node.target), nn.ReLU)
        if is_relu or (node.op == "call_function" and node.target in (torch.maximum, torch.minimum)):
            low, high = (-top, node.args[1]) if node.target is torch.minimum else (0.0 if is_relu else node.args[1], top)
            with module.graph.inserting_before(node):
                given = [_bound(module, node, value, name) for name, value in (("low", low), ("high", high))]
                node.replace_all_uses_with(module.graph.call_function(torch.clamp, (node.args[0], *given)))
            module.graph.erase_node(node)
    module.recompile()


def _bound(module: fx.GraphModule, node: fx.Node, value, name: str) -> fx.Node:
    if isinstance(value, fx.Node):
        return value
    key = f"{node.name}_{name}"
    module.register_buffer(key, torch.full((1, 1, 1, 1), value))
    return module.graph.get_attr(key)


def measure(checkpoint: Path, rounds: int, threads: int, batch: int) -> dict:
    """Counts of each form, the largest ratio absorbed, float32 errors, and latency ratios against the chosen form."""
    network = recognise(checkpoint)
    example = torch.randn(batch, *network.preprocessing["input_size"], generator=torch.Generator().manual_seed(0))
    folded = foldexport.fold(network.module, example[:2])
    found = activations(folded.module)
    built = forms(network.module, example[:2])
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{i}.onnx" for i, name in enumerate(built)}
        for name, module in built.items():
            torch.onnx.export(module.eval(), (example,), files[name], dynamo=True, verbose=False)
        taken = latencies_ms(sessions(files, threads), example.numpy(), rounds)
    multiple = folded.certificate.rounding.multiples["folded"]
    return {
        "checkpoint": checkpoint.name, "batch_norms": folded.counts_before["batch_norm"],
        "forms": dict(Counter(each.form for each in found)),
        "trunk_forms": dict(Counter(found[place].form for place, _ in trunk_norms(network.module))),
        "largest_absorbed": largest_absorbed(network.module, found),
        "error": multiple.error, "error_in_float32_noise": multiple.multiple,
        "latency_ms": {name: float(np.median(values)) for name, values in taken.items()},
        "ratio": {name: ratio(values, taken["chosen"]) for name, values in taken.items()},
        "rounds": rounds, "threads": threads, "batch": batch,
    }  # fmt: skip


def table(found: dict) -> str:
    """As Markdown."""
    counts = ", ".join(f"{number} {form}" for form, number in sorted(found["forms"].items()))
    trunk = ", ".join(f"{number} {form}" for form, number in sorted(found["trunk_forms"].items()))
    lines = [
        f"{found['batch_norms']} batch norms in front of ReLU became: {counts}. Of those that read the trunk: {trunk}.",
        f"Largest |β/γ| absorbed upstream: {found['largest_absorbed']:.2f} (limit 4). Largest float32 error of the folded network: "
        f"{found['error']:.1e} of peak, {found['error_in_float32_noise']:.1f} times the float32 noise of the unfolded one.",
        "",
        f"What each exact form costs under onnxruntime {ort.__version__}, {found['threads']} thread, batch {found['batch']}, "
        f"medians of {found['rounds']} rounds in which all forms take turns; the fold chooses the first:",
        "", "| form | median latency | ratio to the chosen form (95 % interval) |", "|---|---|---|",
    ]  # fmt: skip
    for name, latency in found["latency_ms"].items():
        value, low, high = found["ratio"][name]
        verdict = "" if name == "chosen" else f"{value:.3f} ({low:.3f} to {high:.3f})"
        if name != "chosen" and low <= 1 <= high:
            verdict += ", no measurable difference"
        lines.append(f"| {name} | {latency:.3f} ms | {verdict} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    found = measure(args.checkpoint, args.rounds, args.threads, args.batch)
    print(json.dumps(found, indent=2) if args.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
