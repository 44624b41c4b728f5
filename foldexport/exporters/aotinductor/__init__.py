"""Networks compiled ahead of time by TorchInductor: a package that libtorch runs without Python.

`compiler`: whether there is a C++ compiler. `package`: the written archive made independent of the machine that wrote it.
`exporter`: the format.
"""
