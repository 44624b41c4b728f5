"""ncnn's text and weights, through PNNX."""
