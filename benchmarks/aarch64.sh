#!/usr/bin/env bash
# The shipped network and the exact one on an emulated Arm processor: whether the probabilities are
# those of this machine, and how many instructions a photo takes. As root on Debian, x86-64.
#
#   benchmarks/aarch64.sh exact.onnx          a file of `model.export --attention exact`
#
# Debian's qemu-user runs Debian's Python for arm64 with the wheels of numpy and ONNX Runtime for
# aarch64. RUNTIME is not the version that serves: 1.32.0 crashes as it is imported under qemu 7.2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exact=$(realpath "$1")
shipped=$(realpath model/weights/slsnet.onnx)
work=${WORK:-/var/tmp/slsnet-aarch64}
runtime=${RUNTIME:-1.23.2}
here=$PWD
mkdir -p "$work/root" "$work/site"

if [ ! -x "$work/root/usr/bin/python3.11" ]; then
    dpkg --add-architecture arm64
    apt-get update -qq
    apt-get install -y -qq qemu-user gcc libc6-dev
    (
        cd "$work"
        apt-get download -qq {python3.11-minimal,libpython3.11-minimal,libpython3.11-stdlib}:arm64 \
            {libc6,libstdc++6,libgcc-s1,zlib1g,libexpat1,libssl3,libffi8,liblzma5,libbz2-1.0,libuuid1}:arm64
        for package in *.deb; do dpkg-deb -x "$package" root; done
    )
fi
if [ ! -d "$work/site/onnxruntime" ]; then
    "$here/.venv/bin/python" -m pip download -q --only-binary=:all: --python-version 3.11 \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux2014_aarch64 -d "$work/wheels" "onnxruntime==$runtime" numpy pillow
    for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$work/site"; done
fi

# Counts the instructions that the emulated processor executes.
cat >"$work/count.c" <<'END'
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
struct qemu_plugin_tb;
int qemu_plugin_version = 1;
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t, void (*)(uint64_t, struct qemu_plugin_tb *));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
void qemu_plugin_register_atexit_cb(uint64_t, void (*)(uint64_t, void *), void *);
static uint64_t count;
static void translated(uint64_t id, struct qemu_plugin_tb *block) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &count, qemu_plugin_tb_n_insns(block));
}
static void ended(uint64_t id, void *data) {
    (void)id, (void)data;
    fprintf(stderr, "%lu\n", count);
}
int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv) {
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
END
gcc -shared -fPIC -O2 -o "$work/count.so" "$work/count.c"

cat >"$work/run.py" <<'END'
import sys
import numpy as np
import onnxruntime as ort
model, pixels, out, runs = *sys.argv[1:4], int(sys.argv[4])
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
for _ in range(runs):
    (found,) = session.run(None, {session.get_inputs()[0].name: np.load(pixels)})
np.save(out, found)
END
.venv/bin/python - "$work/pixels.npy" <<'END'
import sys
from pathlib import Path
import numpy as np
from photos.image import read_photo
np.save(sys.argv[1], read_photo(Path("docs/lesion.jpg").read_bytes()).pixels[None])
END

emulated() { # MODEL OUT RUNS: prints the instructions
    ORT_DISABLE_TELEMETRY=1 PYTHONPATH=$work/site PYTHONHOME=$work/root/usr \
        qemu-aarch64 -cpu neoverse-n1 -plugin "$work/count.so" -L "$work/root" \
        "$work/root/usr/bin/python3.11" "$work/run.py" "$1" "$work/pixels.npy" "$2" "$3" 2>&1 | tail -n 1
}
declare -A each
for name in shipped exact; do
    once=$(emulated "${!name}" "$work/$name.npy" 1)
    twice=$(emulated "${!name}" "$work/$name.npy" 2)
    each[$name]=$((twice - once))
    echo "$name: $((each[$name] / 1000000)) million instructions a photo"
    .venv/bin/python - "$work/$name.npy" "${!name}" "$work/pixels.npy" <<'END'
import sys
import numpy as np
import onnxruntime as ort
session = ort.InferenceSession(sys.argv[2])
(here,) = session.run(None, {session.get_inputs()[0].name: np.load(sys.argv[3])})
there = np.load(sys.argv[1])
print(f"  largest difference from this machine {abs(here - there).max():.1e};", end=" ")
print(f"pixels of the mask that differ {((here > 0.5) != (there > 0.5)).sum()}")
END
done
echo "shipped / exact: $(awk "BEGIN {print ${each[shipped]} / ${each[exact]}}")"
