"""LiteRT, the format of TensorFlow Lite."""
