"""onnxruntime's own format, for its mobile and minimal builds."""
