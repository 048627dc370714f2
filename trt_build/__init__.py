"""Turns the exported ONNX file into a TensorRT engine and its description.

Engines and their descriptions are read and run by `engines`, which knows nothing of this package.
"""
