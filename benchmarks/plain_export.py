"""What a user would write without foldexport: load a checkpoint, torch.onnx.export, onnxsim, save. Proves nothing.

    python plain_export.py CHECKPOINT NETWORK 1x3x224x224 OUTPUT
"""

from __future__ import annotations

import sys

import networks
import onnx
import onnxsim
import torch


def main(checkpoint: str, network: str, shape: str, output: str) -> None:
    module = getattr(networks, network)()
    module.load_state_dict(torch.load(checkpoint, weights_only=True))
    module.eval()
    example = torch.randn([int(size) for size in shape.split("x")])
    program = torch.onnx.export(module, (example,), dynamo=True, verbose=False)
    simpler, _ = onnxsim.simplify(program.model_proto)
    onnx.save(simpler, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
