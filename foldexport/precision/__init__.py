"""Reduced precision that is really delivered: float16 and bfloat16 in the graph, int8 as quantise-dequantise pairs.

``types``: the number types. ``groups``, ``homogeneous``: the freedom of scale. ``ranges``: what fits. ``scales``: the rewriting and
its proof. ``half``: the module that is exported. ``emulate``: networks run in a type. ``prepare``: all of it. ``readback``:
what a file is really in. ``equalise``, ``int8``, ``quantised``: eight-bit integers.
"""
