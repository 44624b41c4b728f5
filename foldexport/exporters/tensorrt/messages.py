"""What the library logs, collected: it says only there why it refused something."""

from __future__ import annotations

import functools
import re
from types import ModuleType
from typing import Any

from foldexport.errors import MissingDependencyError

MOST_LINES = 200_000  # beyond which verbose ones are dropped: full TensorRT writes several for every tactic that it tries
SHOWN = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")
ERRORS = ("INTERNAL_ERROR", "ERROR")
#: Lines of the parser's banner, which name the temporary file, and of nothing that concerns the network.
BANNER = re.compile(
    r"^(-+|(Input filename|ONNX IR version|Opset version|Producer name|Producer version|Domain|Model version|Doc string):.*)$"
)
#: "IBuilder::build…: Error Code 4: API Usage Error ([file.cpp:1: pass] … In validate at /_src/…)" → what lies between
SOURCE = re.compile(r"\s*In \w[\w:~]* at \S+:\d+")
CODE = re.compile(r"^(?:[\w:]+: )?Error Code \d+: ")
PASS = re.compile(r"\[[\w.]+:\d+: \w+\] ")
PARENTHESES = re.compile(r"^[\w ]+ \((.*)\)$")
NOISE = ("differs from one already registered", "catchCudaError", "Thread context has not been set")


@functools.cache
def logger(trt: ModuleType) -> Any:
    """The process's one logger of a library: TensorRT keeps the first that it is given and ignores others."""

    class Collector(trt.ILogger):
        """Severities and texts, in order."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            level = str(severity).rpartition(".")[2]
            if len(self.lines) < MOST_LINES or level in SHOWN:
                self.lines.append((level, message))

    return Collector()


def made(kind: type, log: Any) -> Any:
    """A ``Builder`` or a ``Runtime``. Raises MissingDependencyError, with what was logged, where the library does not start here.

    It then gives a null pointer, of which pybind11 makes a TypeError; the reason, such as a driver too old for its CUDA, may be
    a warning.
    """
    before = len(log.lines)
    try:
        return kind(log)
    except TypeError as error:
        new = log.lines[before:]
        said = errors(new) or [_plain(text) for severity, text in new if severity == "WARNING"]
        reason = "; ".join(said[-2:])[:300] or "it does not say why"
        raise MissingDependencyError(f"tensorrt: the library does not start on this machine: {reason}.") from error


def errors(lines: list[tuple[str, str]]) -> list[str]:
    """What went wrong, without the library's own source positions, each once."""
    found = [_plain(text) for severity, text in lines if severity in ERRORS and not any(word in text for word in NOISE)]
    return list(dict.fromkeys(text for text in found if text))


def kept(lines: list[tuple[str, str]]) -> list[str]:
    """The log for the manifest: everything but verbose lines and the parser's banner."""
    return [
        f"{severity}: {text}" for severity, text in lines
        if severity in SHOWN and not BANNER.match(text.strip()) and NOISE[0] not in text
    ]  # fmt: skip


def _plain(text: str) -> str:
    text = SOURCE.sub("", " ".join(text.split()))
    text = PASS.sub("", CODE.sub("", text)).strip()
    return PARENTHESES.sub(r"\1", text)
