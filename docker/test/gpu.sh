# The GPU image: linted with the others, and built up to where TensorRT comes from NVIDIA's index,
# or wholly where GPU=1 says that it can be reached; and the CPU image with TensorRT's lean runtime.
# No GPU is needed.
# shellcheck shell=bash disable=SC2154

"$(tools)/hadolint" docker/Dockerfile docker/Dockerfile.gpu docker/Dockerfile.load ||
    fail "hadolint"
say "hadolint finds nothing"
remove_gpu_image() { engine rmi -f localhost/slsnet:gpu-test localhost/slsnet:lean-test; }
at_exit+=(remove_gpu_image)
target=(--target libraries)
[ -z "${GPU:-}" ] || target=()
started=$(now_ms)
quietly "$output/gpu.log" build localhost/slsnet:gpu-test docker/Dockerfile.gpu "${target[@]}"
say "built ${target[*]:-all} in $((($(now_ms) - started) / 1000)) s"
size_and_layers localhost/slsnet:gpu-test
providers='import onnxruntime; print(onnxruntime.__version__, *onnxruntime.get_available_providers())'
found=$(engine run --rm --network none "${hardened[@]}" -e ORT_DISABLE_TELEMETRY=1 --entrypoint /opt/venv/bin/python \
    localhost/slsnet:gpu-test -c "$providers")
[[ $found = *CUDAExecutionProvider* ]] || fail "ONNX Runtime in it has no CUDA: $found"
say "ONNX Runtime in it: $found"

started=$(now_ms)
quietly "$output/lean.log" build localhost/slsnet:lean-test docker/Dockerfile \
    --build-arg REQUIREMENTS=requirements-lean
say "built with the lean runtime in $((($(now_ms) - started) / 1000)) s"
size_and_layers localhost/slsnet:lean-test
library='from engines.tensorrt_api import find_tensorrt; print(find_tensorrt().library)'
found=$(engine run --rm --network none "${hardened[@]}" --entrypoint /opt/venv/bin/python \
    localhost/slsnet:lean-test -c "$library")
[[ $found = "tensorrt_lean "* ]] || fail "no lean runtime in it: $found"
say "the lean runtime in it: $found"
