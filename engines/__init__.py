"""TensorRT engines as those see them who run them: description, device, library and runtime.

The server runs engines with it, and `trt_build` builds them with it. `plan`, `device` and
`tensorrt_api` import neither CUDA nor TensorRT until a function needs it.
"""
