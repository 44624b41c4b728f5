#!/usr/bin/env python3
"""Does this machine compute what was proven? Run it where the bundle lies:

    python verify.py            needs numpy and the runtime of one of the files: onnxruntime, openvino, torch, ...

Every file must have the SHA-256 that SHA256SUMS gives it. Then each artifact whose runtime is installed here is run on the inputs
in golden.npz, and its outputs are compared with those of the training graph in float64, in units of the training graph's own
float32 noise n32 (the RMS of its float32 error, relative to the largest output; of fp16, bf16 or int8 where the files are in that):

    e = (output - golden) / max|golden|        multiple = max( RMS(e) / n32,  max|e| / (n32 * max(1, sqrt(2 ln N))) )

A multiple of 1 rounds like the training graph; above 8 the artifact fails. A run that reads above 4 is read again in the noise that
was measured for it at the export ("units" in the manifest), and is not counted where that is above 64 times n32. Clear winners
among the classes must be the same.

Exit codes: 0 at least one artifact ran here, and all that ran agree; 4 a file was changed or is missing, or an artifact computes
something else; 5 none of the artifacts could be run here; 2 this folder is no bundle.

Written by foldexport; for Python 3.9 and later, foldexport itself is not needed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":  # an artifact may be called torch.py, and nothing is to be written beside it
    sys.path = [each for each in sys.path if Path(each).resolve() != Path(__file__).resolve().parent]
    sys.dont_write_bytecode = True
try:
    import numpy as np
except ImportError:
    print("nothing can be run here: numpy is not installed: pip install numpy", file=sys.stderr)
    sys.exit(5)

ALLOWED = 8.0  # multiples of the noise
LOOK_AGAIN, LEFT_OUT = 4.0, 64.0  # multiples of the noise; see above
NOISE_FLOOR = 2.0**-24  # half a unit in the last place of float32
TIE = 8.0  # multiples of the noise within which two classes may change places
RTX = ("tensorrt_rtx_bindings", "tensorrt_rtx")  # one library: of the wheels, and of the source distribution over them
DISCRETE = 1e-4  # share of the integers of an output (a map of classes) that near-ties may change
AGREES, DIFFERS, NOT_RUN = "ok", "FAILED", "not run"
NO_BUNDLE, WRONG, NOTHING_RAN = 2, 4, 5


class NotHere(Exception):
    """Why an artifact cannot be run on this machine."""


# ---- one small function per runtime: (file, its entry in the manifest) -> "runtime version", and arrays -> [arrays]


def onnxruntime(path, entry):
    import onnxruntime

    if entry["precision"] == "bf16":
        raise NotHere("onnxruntime's CPU has no bfloat16 convolution")
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return f"onnxruntime {onnxruntime.__version__}", lambda *arrays: session.run(None, dict(zip(names, arrays)))


def openvino(path, entry):
    sys.modules.setdefault("openvino_telemetry", None)  # importing openvino would send an event; without this package it does not
    import openvino

    core = openvino.Core()  # float32 as it is written: some processors would take bfloat16 instead
    model = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(*arrays):
        found = model(list(arrays))
        return [found[output] for output in model.outputs]

    return f"openvino {openvino.__version__.partition('-')[0]}", run


def torchscript(path, entry):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f"torch {torch.__version__}", of_torch(torch.jit.load(str(path), map_location="cpu"))


def torch_export(path, entry):
    import torch

    return f"torch {torch.__version__}", of_torch(torch.export.load(str(path)).module())


def torch_source(path, entry):
    import torch

    spec = importlib.util.spec_from_file_location("artifact", str(path))
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    return f"torch {torch.__version__}", of_torch(source.load())


def torch_compiled(path, entry):
    import torch

    return f"torch {torch.__version__}", of_torch(torch._inductor.aoti_load_package(str(path)))


def executorch(path, entry):
    import torch
    from executorch.runtime import Runtime

    content = path.read_bytes()
    program = Runtime.get().load_program(content)
    method = program.load_method("forward")
    sizes = method.metadata.input_tensor_meta(0).sizes()

    def run(*arrays):
        assert content and program  # which a method borrows
        return [value.numpy().copy() for value in method.execute([torch.from_numpy(array) for array in arrays])]

    return f"executorch {version('executorch')}", whole_or_in_parts(run, sizes[0])


def litert(path, entry):
    from ai_edge_litert.interpreter import Interpreter

    network = Interpreter(model_path=str(path))
    inputs, outputs = network.get_input_details(), network.get_output_details()

    def run(*arrays):
        for each, array in zip(inputs, arrays):
            network.resize_tensor_input(each["index"], array.shape)
        network.allocate_tensors()
        for each, array in zip(inputs, arrays):
            network.set_tensor(each["index"], array)
        network.invoke()
        return [network.get_tensor(each["index"]) for each in outputs]

    batch = int(inputs[0]["shape"][0])  # "fixed": why the file computes something else, without a word, where it is resized
    fitted = in_parts(run, batch, batch) if entry["notes"].get("fixed") else whole_or_in_parts(run, batch)
    return f"LiteRT {version('ai-edge-litert')}", fitted


def ncnn(path, entry):
    import ncnn

    network = ncnn.Net()
    half = entry["precision"] != "fp32"  # else ncnn rounds activations to halves where the processor can
    network.opt.use_fp16_packed = network.opt.use_fp16_storage = network.opt.use_fp16_arithmetic = half
    network.opt.use_winograd_convolution = False  # as proven: it rounds several times more
    if network.load_param(str(path)) or network.load_model(str(path)[: -len("param")] + "bin"):
        raise ValueError("ncnn refuses the files")
    outputs = sorted(set(re.findall(r"\bout\d+\b", path.read_text(encoding="utf-8"))), key=lambda name: int(name[3:]))

    def sample(*arrays):
        extractor = network.create_extractor()
        for place, array in enumerate(arrays):
            extractor.input(f"in{place}", ncnn.Mat(np.ascontiguousarray(array[0], np.float32)).clone())
        return [np.array(extractor.extract(name)[1])[None] for name in outputs]

    return f"ncnn {ncnn.__version__}", in_parts(sample, 1, 1)


def tensorrt(path, entry):
    import torch

    if not torch.cuda.is_available():
        raise NotHere("no GPU that PyTorch can use")
    names = RTX if entry["notes"]["flavour"] == "rtx" else ("tensorrt",)
    trt = __import__(next(filter(importlib.util.find_spec, names), names[0]))
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise NotHere(f"TensorRT {trt.__version__} does not take the engine: build one for this GPU")
    context = engine.create_execution_context()
    ends = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
    inputs = [name for name in ends if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    kinds = {"FLOAT": torch.float32, "HALF": torch.float16, "INT32": torch.int32, "INT64": torch.int64, "BOOL": torch.bool}

    def run(*arrays):
        buffers = {name: torch.from_numpy(array).cuda() for name, array in zip(inputs, arrays)}
        for name, value in buffers.items():
            context.set_input_shape(name, tuple(value.shape))
        for name in ends[len(inputs) :]:
            shape, kind = tuple(context.get_tensor_shape(name)), kinds[engine.get_tensor_dtype(name).name]
            buffers[name] = torch.empty(shape, dtype=kind, device="cuda")
        for name, value in buffers.items():
            context.set_tensor_address(name, value.data_ptr())
        torch.cuda.synchronize()
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise ValueError("the engine stopped")
        torch.cuda.synchronize()
        return [buffers[name].cpu().numpy() for name in ends[len(inputs) :]]

    low, _, high = engine.get_tensor_profile_shape(inputs[0], 0)
    return f"{trt.__name__} {trt.__version__}", in_parts(run, low[0], high[0])


#: Format -> how it is run: (the modules that must be there, what to install, the function); the first that is there is taken.
RUNNERS = {
    "onnx": (("onnxruntime", "onnxruntime", onnxruntime), ("openvino", "openvino", openvino)),
    "onnxruntime-web": (("onnxruntime", "onnxruntime", onnxruntime),),  # another build of it
    "ort": (("onnxruntime", "onnxruntime", onnxruntime),),
    "openvino": (("openvino", "openvino", openvino),),
    "torchscript": (("torch", "torch", torchscript),),
    "pt2": (("torch", "torch", torch_export),),
    "aotinductor": (("torch", "torch", torch_compiled),),
    "executorch": (("executorch", "executorch", executorch),),
    "litert": (("ai_edge_litert", "ai-edge-litert", litert),),
    "ncnn": (("ncnn", "ncnn", ncnn),),
    "pytorch": (("torch safetensors", "torch safetensors", torch_source),),
    "tensorrt": (*((f"torch {name}", "torch tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs", tensorrt) for name in RTX),
                 ("torch tensorrt", "torch tensorrt", tensorrt)),
}  # fmt: skip


def of_torch(network):
    """A network of PyTorch's as a function of arrays; nested outputs in their order."""
    import torch

    def leaves(value):
        if isinstance(value, torch.Tensor):
            return [value.cpu().numpy()]
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return [leaf for each in values for leaf in leaves(each)]

    def run(*arrays):
        with torch.no_grad():
            return leaves(network(*(torch.from_numpy(array) for array in arrays)))

    return run


def in_parts(run, lowest, highest):
    """Any batch through a file that takes ``lowest`` to ``highest`` samples at once; the last part is filled up and cut."""

    def call(*arrays):
        parts, count = [], len(arrays[0])
        for start in range(0, count, highest):
            taken = min(highest, count - start)
            rows = np.minimum(np.arange(max(taken, lowest)), taken - 1) + start
            outputs = run(*(np.ascontiguousarray(array[rows]) for array in arrays))
            parts.append([output[: len(output) // len(rows) * taken] for output in outputs])
        return [np.concatenate(each) for each in zip(*parts)]

    return call


def whole_or_in_parts(run, batch):
    """Any batch, where the file takes it, else in parts of the batch that it was written for."""

    def call(*arrays):
        try:
            return run(*arrays)
        except Exception:  # every runtime has exceptions of its own
            if len(arrays[0]) == batch:
                raise
            return in_parts(run, batch, batch)(*arrays)

    return call


# ---- what is compared


def changed(folder):
    """The files that SHA256SUMS names and that are not as they were, each with what is wrong."""
    found = {}
    for line in (folder / "SHA256SUMS").read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file():
            found[name] = "is missing"
        elif sha256(path) != digest:
            found[name] = "was changed: its SHA-256 is not the one in SHA256SUMS"
    return found


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def compare(run, golden, tolerance, units=None):
    """(largest error of peak, largest multiple, "top-1 4/4", what is wrong) of an artifact on every golden run.

    units: run -> its noise per output, where that is more than the usual.
    """
    largest, multiple, wrong, agree, clear, counted = 0.0, 0.0, [], 0, 0, 0
    shares = golden["discrete"] if "discrete" in golden else [DISCRETE] * len(golden["n32"])
    differing, total = [0] * len(shares), [0] * len(shares)
    step, usual = int(golden["step"]), np.maximum(golden["n32"], NOISE_FLOOR)
    for number in range(int(golden["runs"])):
        inputs = numbered(golden, f"run{number}_input")
        outputs, wanted = run(*inputs), numbered(golden, f"run{number}_output")
        shapes, peaks = numbered(golden, f"run{number}_shape"), numbered(golden, f"run{number}_peak_at")
        if [list(np.shape(output)) for output in outputs] != [list(shape) for shape in shapes]:
            found, asked = [list(np.shape(output)) for output in outputs], [list(map(int, shape)) for shape in shapes]
            return math.inf, math.inf, "", f"its outputs have shape {found}, wanted {asked}"
        outputs = [thinned(np.asarray(output), step, peak) for output, peak in zip(outputs, peaks)]
        noise, there = usual, (units or {}).get(str(number))
        if there is not None and multiple <= ALLOWED and LOOK_AGAIN < reading(outputs, wanted, noise) < math.inf:
            noise = np.maximum(noise, there)
        if np.any(noise > LEFT_OUT * usual) and reading(outputs, wanted, noise) <= ALLOWED:
            continue
        counted += 1
        for place, reference in enumerate(wanted):
            output = outputs[place]
            if reference.dtype.kind not in "fc":
                differing[place] += int(np.sum(output != reference))
                total[place] += reference.size
                continue
            error, times = errors(output, reference, noise[place])
            largest, multiple = max(largest, error), max(multiple, times)
            peak = np.abs(reference).max() if reference.size else 0.0
            if tolerance and not error * (peak or 1.0) <= tolerance["absolute"] + tolerance["relative"] * peak:
                wrong.append(f"output {place} differs by {error * (peak or 1.0):.1e} at a peak of {peak:.3g}")
            if reference.ndim == 2 and reference.shape[1] >= 2:
                same, told = top1(output, reference, noise[place])
                agree, clear = agree + same, clear + told
    if not tolerance and not multiple <= ALLOWED:
        wrong.append(f"{ALLOWED:g} times the noise are allowed")
    for place, share in enumerate(shares):
        if differing[place] > share * total[place]:
            wrong.append(f"output {place} differs in {differing[place]} of {total[place]} values")
    if not counted:
        wrong.append("it was compared on no input that shows anything")
    if agree < clear:
        wrong.append(f"{clear - agree} of {clear} clear classes differ")
    return largest, multiple, f"top-1 {agree}/{clear}" if clear else "", "; ".join(wrong)


def units_of(entry):
    """Run -> its noise per output, as the export found it for this artifact."""
    return (entry.get("comparison") or {}).get("units") or {}


def reading(outputs, wanted, noise):
    """The largest multiple of the outputs of one run."""
    pairs = [each for each in zip(outputs, wanted, noise) if each[1].dtype.kind in "fc"]
    return max((errors(*each)[1] for each in pairs), default=0.0)


def errors(output, reference, n32):
    """(max|e|, multiple) as the text on top has them; what is not finite is infinitely wrong."""
    if reference.size == 0:
        return 0.0, 0.0
    error = np.abs(output.astype(np.result_type(reference, np.float64)) - reference)
    if not np.isfinite(error).all():
        return math.inf, math.inf
    error = error / (np.abs(reference).max() or 1.0)
    spread = max(1.0, math.sqrt(2.0 * math.log(error.size)))
    largest, rms = float(error.max()), math.sqrt(float(np.mean(error**2)))
    return largest, max(rms / n32, largest / (n32 * spread))


def top1(output, reference, n32):
    """(samples with the same best class, samples whose best class is clear)."""
    second, first = np.sort(reference, axis=1)[:, -2:].T
    clear = first - second > TIE * n32 * np.abs(reference).max()
    return int(np.sum((output.argmax(1) == reference.argmax(1)) & clear)), int(np.sum(clear))


def thinned(output, step, peak_at):
    """Of a large output every step-th value was kept, and the largest one."""
    flat = output.reshape(-1)
    return output if step == 1 or not output.size else np.append(flat[::step], flat[peak_at])


def numbered(golden, name):
    """``[golden[name + "0"], golden[name + "1"], ...]``"""
    found = []
    while f"{name}{len(found)}" in golden:
        found.append(golden[f"{name}{len(found)}"])
    return found


def check(folder, entry, manifest, golden, broken):
    """(agrees, differs or not run; the runtime; what was found) of one artifact."""
    touched = [each["name"] for each in entry["files"] if each["name"] in broken]
    if touched:
        return DIFFERS, "", f"{touched[0]} {broken[touched[0]]}"
    runners = RUNNERS.get(entry["format"], ())
    there = [row for row in runners if all(importlib.util.find_spec(name) for name in row[0].split())]
    if not there:
        install = " or ".join(dict.fromkeys(f"pip install {row[1]}" for row in runners))
        return NOT_RUN, "", f"its runtime is not installed: {install}" if install else "foldexport verify can run it"
    if golden is None:
        return NOT_RUN, "", "golden.npz is not as it was"
    precision = (manifest.get("precision") or {}).get("precision", "fp32")
    reasons = []
    for package, _, load in there:
        try:
            runtime, run = load(folder / entry["file"], {**entry, "precision": precision})
            error, multiple, classes, wrong = compare(run, golden, manifest.get("tolerance"), units_of(entry))
        except (NotHere, ImportError) as reason:
            reasons.append(f"{package.split()[-1]}: {reason}")
            continue
        except Exception as reason:  # every runtime has exceptions of its own
            lines = str(reason).strip().splitlines() or [type(reason).__name__]
            return DIFFERS, package.split()[-1], f"does not run: {lines[0][:300]}"
        unit = "float32" if precision == "fp32" else precision
        said = [f"max error {error:.1e} of peak ({multiple:.1f}x {unit} noise)", classes, wrong]
        return DIFFERS if wrong else AGREES, runtime, "  ".join(filter(None, said))
    return NOT_RUN, "", "; ".join(reasons)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Does this machine compute what was proven?", epilog="Exit codes: 0 yes; 4 no; "
                                     "5 nothing could be run here; 2 this folder is no bundle.")  # fmt: skip
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent, help="default: this file's own")
    folder = parser.parse_args(argv).folder
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    manifests = sorted(folder.glob("*.manifest.json"))
    if not (folder / "SHA256SUMS").is_file() or len(manifests) != 1:
        print(f"{folder}: is no bundle: wanted SHA256SUMS and one NAME.manifest.json in it", file=sys.stderr)
        return NO_BUNDLE
    broken = changed(folder)
    try:
        manifest = json.loads(manifests[0].read_text(encoding="utf-8"))
        entries = manifest["artifacts"]
        of_artifacts = {each["name"] for entry in entries for each in entry["files"]}
    except (ValueError, KeyError, TypeError):
        print(f"{DIFFERS:8} {manifests[0].name} {broken.get(manifests[0].name, 'cannot be read')}")
        return WRONG
    for name in sorted(broken.keys() - of_artifacts):
        print(f"{DIFFERS:8} {name}  {name} {broken[name]}")
    golden = None
    if "golden.npz" not in broken:
        with np.load(folder / "golden.npz", allow_pickle=False) as stored:
            golden = dict(stored)
    found = []
    for entry in entries:
        status, runtime, said = check(folder, entry, manifest, golden, broken)
        found.append(status)
        print("  ".join(filter(None, (f"{status:8} {entry['file']}", runtime, said))), flush=True)
    ran = len(found) - found.count(NOT_RUN)
    if broken or DIFFERS in found:
        touched = f", and changed or missing: {', '.join(sorted(broken))}" if broken else ""
        print(f"This is not what was proven: {found.count(DIFFERS)} of {len(found)} artifacts failed{touched}.")
        return WRONG
    if not ran:
        print("All files are as they were, but none could be run here: install one of the runtimes above.")
        return NOTHING_RAN
    print(f"This machine computes what was proven: {ran} of {len(found)} artifacts ran, and all that ran agree.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
