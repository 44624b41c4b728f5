"""A parsed network to an engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from foldexport.errors import UsageError
from foldexport.exporters.tensorrt import driver, messages, timing
from foldexport.exporters.tensorrt.flavour import FULL, RTX, Flavour
from foldexport.exporters.tensorrt.network import Parsed
from foldexport.exporters.tensorrt.options import HARDWARE, TensorRTOptions, size_text
from foldexport.exporters.tensorrt.profile import Profile, text

#: What the builder says of matrix products on Turing, and of a limit on scratch memory that nothing fits in.
NO_PRODUCTS = re.compile(r"Cannot compile operation '([^']+)'.*\(SM(\d+)\): FP32 GEMM is not supported")
NO_SCRATCH = re.compile(r"workspace (limit|size)", re.IGNORECASE)
DEFAULT_TARGETS = "the library's default: 8.0, 8.6, 8.9, 12.0 and later"  # TensorRT-RTX documentation, CPU-only engines


def build(parsed: Parsed, flavour: Flavour, options: TensorRTOptions, profile: Profile | None, path: Path) -> dict[str, Any]:
    """Build the engine into ``path``; returns what was asked for, as read back from the builder's configuration.

    Raises UsageError with the builder's own reason where it makes none.
    """
    config = _configured(parsed, flavour, options, profile)
    notes = _read_back(parsed, flavour, config)
    cache = None
    if flavour is FULL and options.timing_cache:
        cache = timing.file(flavour.version(), driver.gpu())
        notes["timing_cache"] = timing.install(config, cache)
    serialized = parsed.builder.build_serialized_network(parsed.network, config)
    if serialized is None:
        library = f"{flavour.title} {flavour.version()}"
        raise UsageError(f"tensorrt: {_advice(parsed, library, options) or f'{library} builds no engine: {_why(parsed)}'}")
    with open(path, "wb") as stream:
        stream.write(memoryview(serialized))
    if cache is not None:
        timing.save(config, cache)
    return notes


def _configured(parsed: Parsed, flavour: Flavour, options: TensorRTOptions, profile: Profile | None) -> Any:
    trt, config = parsed.trt, parsed.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not options.tf32:  # on by default, and off wherever numbers are compared
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimisation_level is not None:
        config.builder_optimization_level = options.optimisation_level
    if flavour is FULL:
        levels, level = trt.HardwareCompatibilityLevel.__members__, HARDWARE[options.hardware_compatibility]
        if level not in levels:
            asked = options.hardware_compatibility
            raise UsageError(f"--hardware-compatibility {asked}: TensorRT {flavour.version()} has no such level.")
        config.hardware_compatibility_level = levels[level]
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    elif options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for place, each in enumerate(options.compute_capabilities):
            config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{each.replace('.', '')}"], place)
    _add_profile(parsed, config, profile)
    return config


def _add_profile(parsed: Parsed, config: Any, profile: Profile | None) -> None:
    """Raises UsageError, before the builder does, for a free input without a profile."""
    free = [each for each in parsed.inputs() if -1 in tuple(each.shape)]
    if not free:
        return
    if profile is None:
        shape = text(["?" if size == -1 else size for size in tuple(free[0].shape)])
        raise UsageError(
            f"tensorrt: input {free[0].name!r} is {shape}, and an engine needs to know which sizes it will get: pass "
            "--min-shape, --opt-shape and --max-shape, or --dynamic none."
        )
    shapes = {each.name: place for place, each in enumerate(parsed.inputs())}
    made = parsed.builder.create_optimization_profile()
    for each in free:
        place = shapes[each.name]
        made.set_shape(each.name, *(points[place] for points in profile.points()))
    if config.add_optimization_profile(made) < 0:
        raise UsageError(f"tensorrt: the builder refuses the profile: {_why(parsed)}")


def _read_back(parsed: Parsed, flavour: Flavour, config: Any) -> dict[str, Any]:
    trt = parsed.trt
    found: dict[str, Any] = {
        "compatibility": {
            "hardware": config.hardware_compatibility_level.name.lower().replace("_", "-"),
            "version": bool(config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)),
        },
        "workspace_bytes": config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
        "optimisation_level": config.builder_optimization_level,
        "tf32": bool(config.get_flag(trt.BuilderFlag.TF32)),
    }
    if flavour is RTX:
        names = [config.get_compute_capability(place).name for place in range(config.num_compute_capabilities)]
        found["targets"] = [f"{name[2:-1]}.{name[-1]}" for name in names] or DEFAULT_TARGETS
    else:
        found["targets"] = [driver.gpu().compute_capability]
    return found


def _advice(parsed: Parsed, library: str, options: TensorRTOptions) -> str:
    """The option that helps, where the builder's errors are of a kind that is known; else nothing."""
    said = "; ".join(messages.errors(parsed.log.lines))
    product = NO_PRODUCTS.search(said)
    if product is not None:
        node, target = product[1], f"{product[2][:-1]}.{product[2][-1]}"
        where = parsed.modules.of(node) or parsed.modules.behind(node)
        return (
            f"`{where or node}` is a float32 matrix product, which {library} has none of for {target}: pass --precision fp16, "
            f"or leave {target} out of --compute-capability."
        )
    if options.workspace_bytes is not None and NO_SCRATCH.search(said):
        given = size_text(options.workspace_bytes)
        return f"--workspace {given}: {library} finds no way to compute a layer in so little; allow more, or leave it out."
    return ""


def _why(parsed: Parsed) -> str:
    """The builder's errors, with the user's modules behind the nodes that they name; one line."""
    said = "; ".join(parsed.modules.named(each) for each in messages.errors(parsed.log.lines)[:2])
    return said[:400] or "it does not say why"
