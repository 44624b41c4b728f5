"""Counts what each peer leaves of one network: a line of JSON in, one out. folded_share.py runs it in a process of its own.

Every graph is counted by :mod:`affine_count`. What a peer cannot do is its entry: {"reason": …}.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import affine_count
import onnx
import peers
import torch
from coverage_worker import randomised
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import foldexport
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions

PEERS = ("torch.fx fuse", "torch.onnx + onnxsim", "OpenVINO")
NOISE = 8.0  # times the network's own float32 noise
CLOSE = 1e-3  # of peak, in float32: far above rounding, far below what a lost batch norm changes


def build(entry: dict) -> tuple[nn.Module, tuple[int, ...]]:
    """The network with random weights and statistics; residual scalars that start at 0 or near it are drawn as well.

    Attention is written out, as PyTorch's fused form hides its factor from everyone.
    """
    if entry["source"] == "timm":
        from timm.layers import set_fused_attn

        set_fused_attn(False)
    torch.manual_seed(0)
    if entry["source"] == "zoo":
        from zoo_networks import entries

        from tests.statistics import randomise

        found = entries()[entry["family"]][entry["model"]]
        network, shape = randomise(found.build(), seed=0, example=torch.randn(4, *found.shape)), found.shape
    else:
        network, shape = randomised(entry)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("gamma", "scale", "layer_scale", "alpha", "skipinit_gain")) or parameter.dim() == 0:
                parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 1.0))
    return network, shape


def measure(entry: dict) -> dict:
    """``{"before": counts, "ours": counts, peer: counts or reason, "seconds": …}``."""
    network, shape = build(entry)
    example = torch.randn(2, *shape)
    found: dict = {"shape": list(shape), "seconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        program = peers.onnx_program(network, example, optimise=False)
        onnx.save(program.model_proto, plain)
        found["before"] = affine_count.of_onnx(program.model_proto)
        _try(found, "ours", lambda: ours(network, example, folder))
        _try(found, PEERS[0], lambda: after_fx(network, example, found["before"]))
        _try(found, PEERS[1], lambda: after_onnx(program))
        _try(found, PEERS[2], lambda: affine_count.of_openvino(peers.openvino_model(plain)))
    return found


def _try(found: dict, name: str, work: Callable[[], dict]) -> None:
    began = time.perf_counter()
    try:
        found[name] = work()
    except Exception as error:  # that a peer fails is a result
        found[name] = {"reason": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    found["seconds"][name] = round(time.perf_counter() - began, 2)


def ours(network: nn.Module, example: Tensor, folder: str) -> dict:
    """Of the ONNX file that a user gets, run once and compared; coverage.py has the certificates of these networks."""
    folded = foldexport.fold(copy.deepcopy(network), example, certify=False)
    path = Path(folder) / "ours.onnx"
    exporter = OnnxExporter()
    exporter.export(folded.module, (example,), path, ExportOptions(opset=peers.OPSET, dynamic=()))
    with torch.no_grad():
        wanted, single = copy.deepcopy(network).double()(example.double()), network(example)
    wanted, single = (each if isinstance(each, tuple | list) else [each] for each in (wanted, single))
    for one, own, given in zip(wanted, single, exporter.load(path)(example.numpy()), strict=True):
        noise = float((one - own).abs().max())  # with random weights some networks turn roundoff into percents
        if not float((one - torch.from_numpy(given)).abs().max()) <= CLOSE * float(one.abs().max()) + NOISE * noise:
            raise ValueError("the folded network computes something else")
    return affine_count.of_onnx(onnx.load(path))


def after_fx(network: nn.Module, example: Tensor, before: dict) -> dict:
    """What was there, less the batch norms that are gone from the traced graph; nothing but those is folded by it."""
    from torch.fx import symbolic_trace

    fused = peers.fx_fused(network)
    with torch.no_grad():
        wanted, given = network(example), fused(example)
    if isinstance(wanted, Tensor) and not float((wanted - given).abs().max()) <= CLOSE * float(wanted.abs().max()):
        raise ValueError("the fused network computes something else")
    gone = _norms(symbolic_trace(network)) - _norms(fused)
    return {**before, "norms": before["norms"] - gone}


def _norms(module: torch.fx.GraphModule) -> int:
    modules = dict(module.named_modules())
    called = [modules.get(node.target) for node in module.graph.nodes if node.op == "call_module"]
    direct = [node for node in module.graph.nodes if node.target is nn.functional.batch_norm]
    return sum(isinstance(each, _BatchNorm) for each in called) + len(direct)


def after_onnx(program: torch.onnx.ONNXProgram) -> dict:
    """torch.onnx's own optimiser, as it runs by default, then onnxsim."""
    program.optimize()
    return affine_count.of_onnx(peers.simplified(program.model_proto))


def main() -> None:
    from tests.torchvision_schemas import declare_missing

    declare_missing()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        try:
            found = measure(json.loads(line))
        except Exception as error:  # the network could not be built or exported at all
            found = {"reason": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
