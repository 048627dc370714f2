#!/usr/bin/env bash
# Lock what the images install: every package, every version, every hash. Run after a change of
# requirements*.txt. Needs uv (`pip install uv`).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock() { # SOURCE LOCK OPTION…
    uv pip compile --quiet --generate-hashes --no-annotate --upgrade \
        --custom-compile-command docker/lock.sh "${@:3}" "$1" --output-file "$2"
}
lock requirements.txt docker/requirements.lock --universal --python-version 3.11
for image in full openvino; do
    lock docker/requirements-$image.in docker/requirements-$image.lock \
        --universal --python-version 3.11
done
lock docker/requirements-build.in docker/requirements-build.lock --universal --python-version 3.11
lock requirements-bench.txt docker/requirements-load.lock --universal --python-version 3.11
# CUDA's wheels differ from platform to platform, TensorRT's from Python to Python.
for image in gpu lean; do
    lock requirements-$image.txt docker/requirements-$image.lock \
        --python-version 3.13 --python-platform x86_64-manylinux_2_28
done
