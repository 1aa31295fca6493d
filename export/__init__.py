"""Exported models: ONNX through Optimum, the map of edited weights, and measured parity with PyTorch."""
