"""TensorRT engines: full TensorRT 10 and 11, and TensorRT-RTX, which builds without a GPU. See docs/tensorrt.md.

    options.py       what the user asks for             profile.py   min, opt and max shapes
    flavour.py       which of the two is used           driver.py    the GPU, asked through the driver
    messages.py      the library's log, collected       network.py   ONNX parsed, and proved to hold the folded weights
    build.py         network to engine                  timing.py    the timing cache of full TensorRT
    layers.py        what the engine is made of         modules.py   ONNX nodes in the user's module names
    engine.py        the engine, opened and run         batches.py   inputs of any batch through an engine's fixed ones
    exporter.py      the format
"""
