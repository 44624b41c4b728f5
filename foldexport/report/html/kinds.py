"""What operators are called on the page, and which of them share a colour."""

from __future__ import annotations

#: kind → text of its chip, where that is not its name
CHIPS = {
    "batch_norm": "batch norm", "conv_transpose": "conv transp.", "relu": "ReLU", "relu6": "ReLU6", "leaky_relu": "leaky ReLU",
    "prelu": "PReLU", "silu": "SiLU", "gelu": "GELU", "elu": "ELU", "hardswish": "hard swish", "hardsigmoid": "hard sigmoid",
    "cat": "concat", "max_pool": "max pool", "avg_pool": "avg pool", "layer_norm": "layer norm", "group_norm": "group norm",
    "instance_norm": "instance norm",
}  # fmt: skip
#: kind → the same in a sentence or a table
WORDS = {"conv": "convolution", "conv_transpose": "transposed convolution", "add": "addition", "mul": "multiplication",
         "cat": "concatenation"}  # fmt: skip
#: family → its name in the legend; the order is that of the legend
FAMILIES = {
    "conv": "convolution, linear",
    "norm": "normalisation",
    "scalar": "constant factor or term",
    "act": "activation",
    "join": "sum, product, concatenation",
    "pool": "pooling, resampling, padding",
    "view": "view",
    "other": "anything else",
}
_FAMILY_OF = {
    **dict.fromkeys(("conv", "conv_transpose", "linear", "matmul", "mm", "bmm", "addmm", "einsum"), "conv"),
    **dict.fromkeys(("batch_norm", "layer_norm", "group_norm", "instance_norm", "native_group_norm"), "norm"),
    **dict.fromkeys(("relu", "relu6", "clamp", "leaky_relu", "prelu", "silu", "gelu", "elu", "celu", "selu", "sigmoid", "tanh",
                     "hardswish", "hardsigmoid", "mish", "softplus", "softmax", "_softmax", "log_softmax", "hardtanh", "rrelu",
                     "exp", "glu", "softsign", "logsigmoid", "log_sigmoid"), "act"),
    **dict.fromkeys(("cat", "stack"), "join"),
    **dict.fromkeys(("max_pool", "avg_pool", "upsample", "pad", "pixel_shuffle", "pixel_unshuffle"), "pool"),
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten", "expand", "identity", "permute",
                     "transpose", "slice", "split", "chunk", "select", "channel_shuffle", "split_with_sizes", "movedim",
                     "t"), "view"),
}  # fmt: skip
ARITHMETIC = {"add": "+", "mul": "×"}


def family(kind: str, reads: int) -> str:
    """The colour of an operator. reads: how many values of the network it reads; arithmetic with one has a constant."""
    if kind in ARITHMETIC:
        return "join" if reads > 1 else "scalar"
    return _FAMILY_OF.get(kind, "other")


def chip(kind: str, reads: int) -> str:
    """The few letters on an operator's chip: "conv", "+", "× constant"."""
    if kind in ARITHMETIC:
        return ARITHMETIC[kind] if reads > 1 else f"{ARITHMETIC[kind]} constant"
    return CHIPS.get(kind) or kind.strip("_").replace("_", " ")


def words(kind: str) -> str:
    """ "convolution", "batch norm"."""
    return WORDS.get(kind) or CHIPS.get(kind) or kind.strip("_").replace("_", " ")
