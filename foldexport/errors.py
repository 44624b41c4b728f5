"""The error tree. Each error knows the exit code of the command that meets it.

    FoldexportError                1  a bug of ours, when raised as itself
    ├── UsageError                 2  an option, shape or network that cannot be worked with
    │   ├── TraceError             2  ``torch.export`` cannot trace the network
    │   └── ModelError             2  the network is not a deterministic eval-mode function
    ├── CheckpointError            3  the file cannot be read safely, or not identified
    ├── EquivalenceError           4  a proof failed; no artifact was put in place
    ├── MissingDependencyError     5  a format's package or device is not there
    └── PrecisionError             6  the asked precision could not be honoured

A message says what was found, what was wanted and what to do, in one or two lines, with the user's
own module names and values.
"""

from __future__ import annotations


class FoldexportError(Exception):
    """Base of every error that foldexport raises on purpose."""

    exit_code = 1


class UsageError(FoldexportError):
    """An option, a shape or a network that the command cannot work with."""

    exit_code = 2


class TraceError(UsageError):
    """``torch.export`` cannot turn the network into a graph."""


class ModelError(UsageError):
    """The network is not a deterministic function in eval mode (train mode, random operators, NaN weights)."""


class CheckpointError(FoldexportError):
    """A checkpoint that cannot be read safely, or whose architecture is not recognised."""

    exit_code = 3


class EquivalenceError(FoldexportError):
    """The folded network or an artifact does not compute what the training graph computes."""

    exit_code = 4


class MissingDependencyError(FoldexportError):
    """A format needs a package or a device that is not there."""

    exit_code = 5


class PrecisionError(FoldexportError):
    """The asked precision cannot be honoured in the artifact."""

    exit_code = 6
