"""From the exported ONNX file to a TensorRT engine, and its description.

`plan`, `device` and `tensorrt_api` import neither onnx nor TensorRT until asked: the server reads
engines with them. `convert`, `calibrate`, `build` and `parity` are for the machine that builds.
"""
