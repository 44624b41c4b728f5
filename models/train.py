"""Trains a zoo model and saves it in the layout its authors publish it in.

    python models/train.py --model diracnet --arch-arg depth=16 --arch-arg width=2 --data PATH --out models/diracnet16_cifar10.pth

SGD with Nesterov momentum, one epoch of warm-up, cosine schedule to zero, random crop and flip. After every epoch the
state goes to ``OUT.run/`` (``--run-dir``): ``--resume`` goes on from there and gives what an uninterrupted run gives. Beside
the checkpoint comes ``OUT.json``, the record of the run, of which card.py makes the model's card.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Split, batches, load_split, normalize
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from foldexport.arch import parse_arch_args
from foldexport.zoo.diracnet import diracnet
from foldexport.zoo.diracnet_files import PREPROCESSING
from foldexport.zoo.diracnet_layouts import to_published
from foldexport.zoo.nfresnet import nfresnet
from foldexport.zoo.preresnet import preresnet
from foldexport.zoo.reading import CIFAR
from foldexport.zoo.repvgg import repvgg


@dataclass(frozen=True)
class Recipe:
    """A model that can be trained here: its constructor in the zoo and what its checkpoint holds.

    All see CIFAR-10 images normalised with ``preprocessing``.
    """

    build: Callable[..., nn.Module]
    stored: Callable[[nn.Module], dict]
    preprocessing: dict

    @property
    def size(self) -> int:
        return self.preprocessing["input_size"][-1]


def _stored_diracnet(model: nn.Module) -> dict:
    params, stats = to_published(model.state_dict())
    return {"params": params, "stats": stats}


def _stored_plainly(model: nn.Module) -> dict:
    return {"state_dict": dict(model.state_dict())}


MODELS = {
    "diracnet": Recipe(diracnet, _stored_diracnet, PREPROCESSING["CIFAR"]),
    "nfresnet": Recipe(nfresnet, _stored_plainly, CIFAR),
    "preresnet": Recipe(preresnet, _stored_plainly, CIFAR),
    "repvgg": Recipe(repvgg, _stored_plainly, CIFAR),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="diracnet")
    parser.add_argument("--arch-arg", action="append", default=[], metavar="KEY=VALUE", help="of the model's constructor")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10, image folders or train.zip and test.zip")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="the peak learning rate")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="on tensors of two and more axes")
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="convolutions in bfloat16 (weights stay float32)")
    parser.add_argument("--run-dir", type=Path, default=None, help="state and log of the run (default: OUT.run)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the run directory")
    args = parser.parse_args(argv)
    args.run_dir = args.run_dir or args.out.with_suffix(".run")
    return args


def save_atomically(value: dict, path: Path) -> None:
    """Writes beside ``path`` and renames, so that an interruption leaves the previous file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(value, partial)
    os.replace(partial, path)


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.SGD:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, nesterov=True)


def learning_rate(step: int, steps_per_epoch: int, epochs: int, peak: float) -> float:
    """Linear to ``peak`` over the first epoch, then a half cosine to 0 at the last step."""
    if step < steps_per_epoch:
        return peak * (step + 1) / steps_per_epoch
    done = (step - steps_per_epoch) / max(1, steps_per_epoch * (epochs - 1))
    return peak * 0.5 * (1 + math.cos(math.pi * done))


class Trainer:
    """One run: the model, its optimizer and its data."""

    def __init__(self, args: argparse.Namespace, train: Split, test: Split):
        self.args, self.train, self.test = args, train, test
        self.recipe = MODELS[args.model]
        torch.manual_seed(args.seed)
        built = self.recipe.build(num_classes=len(train.classes), **parse_arch_args(args.arch_arg))
        self.model = built.to(args.device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, args)
        self.steps_per_epoch = len(train.labels) // args.batch_size

    def logits(self, images: Tensor, bf16: bool) -> Tensor:
        x = normalize(images, self.recipe.preprocessing["mean"], self.recipe.preprocessing["std"])
        x = x.to(self.args.device, memory_format=torch.channels_last)
        kind = torch.device(self.args.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=bf16):
            return self.model(x).float()

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training images; the order and the crops depend on seed and epoch alone."""
        self.model.train()
        generator = torch.Generator().manual_seed(self.args.seed * 100_003 + epoch)
        loss_sum, correct, seen = 0.0, 0, 0
        bar = tqdm(
            batches(self.train, self.args.batch_size, generator),
            total=self.steps_per_epoch, desc=f"epoch {epoch + 1}/{self.args.epochs}", leave=False, disable=None,
        )  # fmt: skip
        for step, (images, labels) in enumerate(bar, epoch * self.steps_per_epoch):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, self.steps_per_epoch, self.args.epochs, self.args.lr)
            labels = labels.to(self.args.device)
            logits = self.logits(images, self.args.bf16)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.args.label_smoothing)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            loss_sum, seen = loss_sum + loss.item() * len(labels), seen + len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
            bar.set_postfix(loss=f"{loss_sum / seen:.3f}", accuracy=f"{correct / seen:.3f}")
        if not math.isfinite(loss_sum):
            raise SystemExit(f"the loss is {loss_sum} in epoch {epoch + 1}: lower --lr")
        return {"train_loss": loss_sum / seen, "train_accuracy": correct / seen}

    @torch.inference_mode()
    def test_accuracy(self, bf16: bool = False) -> float:
        self.model.eval()
        hits = [(self.logits(x, bf16).argmax(1).cpu() == y).sum().item() for x, y in batches(self.test, 250)]
        return sum(hits) / len(self.test.labels)

    def save(self, epochs_done: int) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "epochs_done": epochs_done}
        save_atomically(state, self.args.run_dir / "state.pth")

    def resume(self) -> int:
        path = self.args.run_dir / "state.pth"
        if not path.is_file():
            raise SystemExit(f"--resume: no {path}; start without it")
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["epochs_done"]


def record(args: argparse.Namespace, log: Path) -> dict:
    """How the checkpoint came about: the command with the paths taken out, the recipe in words, a line for every epoch."""
    given = [f"--arch-arg {shlex.quote(pair)}" for pair in args.arch_arg]
    given += [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in ("epochs", "lr", "seed")]
    return {
        "command": f"python models/train.py --model {args.model} {' '.join(given)}{' --bf16' * args.bf16} --data PATH --out X.pth",
        "recipe": (
            f"SGD with Nesterov momentum {args.momentum}, batch {args.batch_size}, peak learning rate {args.lr} with one epoch of "
            f"warm-up and a cosine schedule, weight decay {args.weight_decay:g} on weights only, crops from a reflected border of "
            f"4 pixels and flips, {'bfloat16 autocast' if args.bf16 else 'float32'}, seed {args.seed}"
        ),
        "torch": torch.__version__.partition("+")[0],
        "epochs": [{key: round(value, 5) for key, value in json.loads(line).items()} for line in log.read_text().splitlines()],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    size = MODELS[args.model].size
    run = Trainer(args, load_split(args.data, "train", size), load_split(args.data, "test", size))
    first = run.resume() if args.resume else 0
    args.run_dir.mkdir(parents=True, exist_ok=True)
    for epoch in range(first, args.epochs):
        started = time.perf_counter()
        line = {"epoch": epoch + 1, **run.train_epoch(epoch)}
        line["test_accuracy"] = run.test_accuracy(args.bf16)
        line["seconds"] = round(time.perf_counter() - started, 1)
        run.save(epoch + 1)
        with open(args.run_dir / "log.jsonl", "a" if epoch else "w") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), file=sys.stderr, flush=True)
    save_atomically(run.recipe.stored(run.model), args.out)
    args.out.with_suffix(".json").write_text(json.dumps(record(args, args.run_dir / "log.jsonl"), indent=1) + "\n")
    print(f"{args.out}: {run.test_accuracy():.2%} of {len(run.test.labels)} test images")


if __name__ == "__main__":
    main()
