"""Measures networks that coverage.py names, one line of JSON in, one out."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import foldexport
from foldexport import costs
from foldexport.errors import EquivalenceError, FoldexportError
from tests.statistics import randomise


def build(entry: dict) -> torch.nn.Module:
    """The network with random weights; the packages are imported where they are needed."""
    if entry["source"] == "timm":
        import timm

        return timm.create_model(entry["model"], pretrained=False)
    import torchvision

    extra = {"aux_logits": False, "init_weights": False} if entry["model"] in ("inception_v3", "googlenet") else {}
    return torchvision.models.get_model(entry["model"], weights=None, **extra)


def randomised(entry: dict) -> tuple[torch.nn.Module, tuple[int, ...]]:
    """The network with random statistics, and the first of its input sizes that it takes."""
    network = build(entry)
    *smaller, own = [tuple(shape) for shape in entry["shapes"]]
    for shape in smaller:
        try:
            return randomise(network, seed=0, example=torch.randn(2, *shape)), shape
        except (RuntimeError, AssertionError, ValueError):  # windows that do not divide it, pools larger than it
            network = build(entry)
    return randomise(network, seed=0, example=torch.randn(2, *own)), own


def measure(entry: dict, proof: bool) -> dict:
    """Fold one network; what it raises is its outcome."""
    torch.manual_seed(0)
    began = time.perf_counter()
    network, shape = randomised(entry)
    built = time.perf_counter()
    try:
        folded = foldexport.fold(network, torch.randn(2, *shape), certify=proof)
    except EquivalenceError as error:
        return {"outcome": "not equal", "detail": str(error)}
    except FoldexportError as error:
        return {"outcome": "refused", "detail": str(error)}
    except Exception as error:  # a crash is what this script looks for
        return {"outcome": "crash", "detail": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    before = costs.of_graph(folded.graph, network, folded.counts_before)
    after = costs.of_module(folded.module, folded.example, folded.counts_after)
    kept = Counter((one.rule, one.reason) for one in folded.ledger if one.status == "kept")
    found = {
        "outcome": "folded", "detail": "", "shape": list(shape),
        "before": before.to_dict(), "after": after.to_dict(),
        "kept": [[rule, reason, count] for (rule, reason), count in kept.most_common(12)],
        "seconds": {"build": built - began, "fold": time.perf_counter() - built, **folded.seconds},
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip
    if folded.certificate is not None:
        certificate = folded.certificate
        found |= {"error": certificate.end_to_end.error, "noise": certificate.noise32, "multiple": certificate.folded32,
                  "informative": certificate.end_to_end.informative}  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-proof", action="store_true")
    args = parser.parse_args()
    from tests.torchvision_schemas import declare_missing

    declare_missing()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        entry = json.loads(line)
        try:
            found = measure(entry, not args.no_proof)
        except Exception as error:  # the network could not be built or initialised
            found = {"outcome": "not built", "detail": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
