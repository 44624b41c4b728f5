"""Runs a written file in a process that has torch and safetensors and cannot import foldexport.

Arguments: the file, the number of threads, torch's precision of float32 products on the CPU, the device. Reads inputs from stdin
and writes outputs to stdout, each as eight bytes of length and an ``.npz`` of arrays "0", "1", …; an error comes back as the text
"error".
"""

import sys

sys.path.pop(0)  # this file's own folder: its neighbours are no modules of the network's


class Blocked:
    """Stands first among the finders of modules."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "foldexport":
            raise ImportError("the written file must not need foldexport")


sys.meta_path.insert(0, Blocked)

import importlib.util  # noqa: E402
import io  # noqa: E402
import os  # noqa: E402


def full_float32(torch):
    """No TF32 and no half-precision sums, as foldexport.device has it; here for the rest of the process."""
    import torch.backends.cudnn.rnn

    torch.backends.cudnn.allow_tf32 = False
    for each in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        each.fp32_precision = "ieee"
    products = torch.backends.cuda.matmul
    products.allow_fp16_reduced_precision_reduction = products.allow_bf16_reduced_precision_reduction = False


def main():
    file, threads, products, device = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the network prints goes elsewhere
    import numpy as np
    import torch

    torch.set_num_threads(int(threads))
    torch.set_float32_matmul_precision("highest" if device != "cpu" else products)
    if device != "cpu":
        full_float32(torch)

    def answer(**arrays):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        answers.write(len(buffer.getvalue()).to_bytes(8, "little") + buffer.getvalue())
        answers.flush()

    try:
        spec = importlib.util.spec_from_file_location("network", file)
        written = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(written)
        network = written.load().to(device)
    except Exception as error:
        answer(error=np.array(f"{type(error).__name__}: {error}"))
        return
    answer()
    while head := sys.stdin.buffer.read(8):
        # Cloned, so that they are aligned as tensors are: a matrix product may round differently elsewhere.
        with np.load(io.BytesIO(sys.stdin.buffer.read(int.from_bytes(head, "little"))), allow_pickle=False) as given:
            inputs = [torch.from_numpy(given[str(place)]).clone().to(device) for place in range(len(given.files))]
        try:
            with torch.no_grad():
                leaves = torch.utils._pytree.tree_leaves(network(*inputs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            answer(**{str(place): tensor.numpy(force=True) for place, tensor in enumerate(tensors)})
        except Exception as error:
            answer(error=np.array(f"{type(error).__name__}: {error}"))


main()
