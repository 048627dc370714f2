"""Turns the exported ONNX file into a TensorRT engine and its description.

The server reads engines with `plan`, `device` and `tensorrt_api`, which import neither onnx nor
TensorRT until a function needs it. `convert`, `calibrate`, `build` and `parity` build engines.
"""
