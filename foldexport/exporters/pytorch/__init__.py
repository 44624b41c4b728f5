"""Plain PyTorch source beside its weights: a network that is read, fine-tuned and owned without foldexport.

`layers`: one layer as text. `calls`: one function call as text. `source`: the whole file. `checked`: what such a file may hold.
`process`, `runner`: the file run in a process of its own. `exporter`: the format.
"""

MARK = "Written by foldexport"  # in the docstring of every written file
