"""The table of runtimes: names, what is missing and how it is said, and that asking imports nothing."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from foldexport import device
from foldexport.benchmark import environment, runtimes
from foldexport.benchmark import gpu as benchmark_gpu
from foldexport.benchmark.library import Wish, available, settings_of
from foldexport.benchmark.runtimes import RUNTIMES, get, missing, resolve, unsuited
from foldexport.errors import MissingDependencyError, UsageError


def wish(*names, device="cpu"):
    return Wish(settings_of(1, device, 1.0, None, 2, 0.99, 0, None), tuple(map(get, names)))


@pytest.fixture
def gpu(monkeypatch):
    """A driver that answers."""
    monkeypatch.setattr(environment, "no_gpu", lambda: "")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "no_gpu", lambda: "the NVIDIA driver says: no device (cuInit returned 100)")


def test_names_and_aliases_are_found_in_any_case_each_once():
    assert [row.name for row in resolve("ORT, torch.compile,onnxruntime")] == ["onnxruntime", "compile"]
    every = [name for row in RUNTIMES.values() for name in (row.name, *row.aliases)]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize(
    ("names", "said"), [("opnvino", "did you mean openvino"), ("zzz", "runtimes are eager"), (" , ", "no runtime in")]
)
def test_other_names_are_refused(names, said):
    with pytest.raises(UsageError, match=said):
        resolve(names)


def test_a_missing_package_is_said_with_its_install(monkeypatch):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None if name == "openvino" else object())
    assert missing(get("openvino"), "cpu") == "openvino is not installed: pip install 'foldexport[openvino]'"
    with pytest.raises(MissingDependencyError, match=r"foldexport\[openvino\]"):
        available(wish("openvino"))
    rows, reasons = available(wish())
    assert "openvino" in reasons and "openvino" not in [row.name for row in rows]


def test_several_missing_packages_are_said_in_the_plural(monkeypatch):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    assert missing(get("litert"), "cpu").startswith("litert_torch, ai_edge_litert are not installed: pip install")


def test_a_runtime_of_gpus_is_not_sent_to_the_cpu(no_gpu):
    for name in ("cudagraphs", "tensorrt"):
        assert "--device cpu" not in missing(get(name), "cpu") and "cuInit returned 100" in missing(get(name), "cpu")


def test_without_a_compiler_compile_says_so(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "C++ compiler" in missing(get("compile"), "cpu") and not missing(get("eager"), "cpu")
    with pytest.raises(MissingDependencyError, match="apt install"):
        available(wish("compile"))
    assert "compile" in available(wish())[1]


def test_a_gpu_that_is_not_there_is_never_replaced_by_the_cpu(no_gpu):
    for asked in (wish(device="cuda"), wish("onnxruntime", device="cuda"), wish("cudagraphs")):
        with pytest.raises(MissingDependencyError, match="cuInit returned 100"):
            available(asked)
    assert "cudagraphs" in available(wish())[1]


def test_the_clock_of_a_gpu():
    pynvml = pytest.importorskip("pynvml")
    mask = pynvml.nvmlClocksEventReasonHwThermalSlowdown | pynvml.nvmlClocksEventReasonSwThermalSlowdown
    assert benchmark_gpu.held_by(mask | pynvml.nvmlClocksEventReasonSwPowerCap) == ["its power limit", "heat"]
    assert benchmark_gpu.held_by(pynvml.nvmlClocksEventReasonGpuIdle) == []
    found = benchmark_gpu.reading()
    assert found is None if environment.no_gpu() else found["sm_mhz"] > 0


def test_pytorch_without_cuda_is_named_where_the_driver_is_well(gpu):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("PyTorch has CUDA here")
    assert any(word in missing(get("cudagraphs"), "cuda") for word in ("CUDA", "NVIDIA driver"))
    assert "onnxruntime-gpu" in missing(get("onnxruntime"), "cuda")


def test_a_runtime_of_another_device_is_refused(gpu, monkeypatch):
    assert unsuited(get("openvino"), "cuda") == "runs on cpu only: pass --device cpu"
    monkeypatch.setattr(runtimes, "_no_gpu", lambda row: "")
    with pytest.raises(UsageError, match="--device cuda"):
        available(wish("cudagraphs"))


def test_every_command_gives_the_driver_s_reason(no_gpu):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = "--device cuda: the NVIDIA driver says: no device (cuInit returned 100). Run with --device cpu."
    for refuse in (lambda: device.require("cuda"), lambda: available(wish(device="cuda"))):
        with pytest.raises(MissingDependencyError) as caught:
            refuse()
        assert str(caught.value) == reason


def test_the_driver_is_asked_for_its_own_words(monkeypatch):
    class Driver:
        def cuInit(self, flags):
            return 100

        def cuGetErrorString(self, code, text):
            ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"no CUDA-capable device is detected"

    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: Driver())
    assert environment.no_gpu() == "the NVIDIA driver says: no CUDA-capable device is detected (cuInit returned 100)"


def test_the_package_and_its_worker_import_nothing_that_is_timed():
    heavy = ("torch", "onnx", "onnxruntime", "openvino", "matplotlib", "rich")
    code = (
        "import sys, foldexport.benchmark, foldexport.benchmark.worker;"
        "from foldexport.benchmark.runtimes import RUNTIMES, missing;"
        f"missing(RUNTIMES['openvino'], 'cpu'); print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_environment_has_units_and_no_name_of_the_machine():
    found = environment.describe()
    assert found["cores"] >= 1 and found["memory_bytes"] is None or found["memory_bytes"] > 2**28
    assert environment.peak_memory_bytes() > 2**20 and environment.interruptions() >= 0
    assert environment.turbo() in ("on", "off", "unknown") and all(value > 0 for value in environment.clocks_mhz())
