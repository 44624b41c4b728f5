"""ONNX for browsers, proved where they run it: onnxruntime-web, WebAssembly, under Node.

`node`: whether Node and the npm package are there. `session`, ``runner.mjs``: a model at work in a Node process.
`exporter`: the format.
"""
