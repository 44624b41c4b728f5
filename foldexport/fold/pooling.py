"""Facts about pooling operators that the table and the merges share."""

from __future__ import annotations

from torch import fx

from foldexport.fold.pending import name_of, shape_of
from foldexport.trace import bound


def per_axis(value, rank: int) -> tuple[int, ...]:
    """ATen's integer or list arguments as one integer per spatial axis."""
    if isinstance(value, int):
        return (value,) * rank
    values = tuple(value)
    return values * rank if len(values) == 1 else values


def window(node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """``(kernel, stride, padding)`` of a pooling node; the stride defaults to the kernel."""
    args, rank = bound(node), int(name_of(node)[-2])
    kernel = per_axis(args["kernel_size"], rank)
    stride = args.get("stride")
    return kernel, per_axis(stride, rank) if stride else kernel, per_axis(args.get("padding", 0), rank)


def has_batch(node: fx.Node) -> bool:
    """Whether a pooling node reads ``[N, C, …]``; without a batch its window runs over what a convolution calls channels."""
    return len(shape_of(bound(node)["self"])) == int(name_of(node)[-2]) + 2


def keeps_constants(node: fx.Node) -> bool:
    """Whether averaging a constant gives that constant everywhere, ``pool(1) = 1``.

    Not so when padding is counted, or when `divisor_override` differs from the window. Windows clipped by `ceil_mode`
    divide by what they cover.
    """
    if not name_of(node).startswith("avg_pool"):
        return True
    args = bound(node)
    kernel, stride, padding = window(node)
    override = args.get("divisor_override")
    if override is not None:
        covers = _covers_exactly(node, kernel, stride)
        return override == _product(kernel) and not any(padding) and covers
    return not any(padding) or not args.get("count_include_pad", True)


def is_convolution(node: fx.Node) -> bool:
    """Whether an average pool divides every window by the same number, so that it is a convolution with padding."""
    if not name_of(node).startswith("avg_pool") or not has_batch(node):
        return False
    args = bound(node)
    kernel, stride, padding = window(node)
    if any(padding) and not args.get("count_include_pad", True) and args.get("divisor_override") is None:
        return False
    return not args.get("ceil_mode", False) or _covers_exactly(node, kernel, stride)


def _covers_exactly(node: fx.Node, kernel: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether no window of this input hangs over its end; only then `ceil_mode` changes nothing."""
    sizes = shape_of(bound(node)["self"])[-len(kernel):]
    padding = window(node)[2]
    return all((n + 2 * p - k) % s == 0 for n, p, k, s in zip(sizes, padding, kernel, stride, strict=True))


def divisor(node: fx.Node) -> int:
    """What every window is divided by when :func:`is_convolution` holds."""
    return bound(node).get("divisor_override") or _product(window(node)[0])


def _product(values: tuple[int, ...]) -> int:
    total = 1
    for value in values:
        total *= value
    return total
