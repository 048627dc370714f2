"""From the exported ONNX file to a TensorRT engine, and what there is to know about one.

`plan`, `device` and `tensorrt_api` import neither onnx nor TensorRT until asked: the server reads
engines with them. `convert`, `calibrate`, `build` and `parity` are for the machine that builds.
"""
