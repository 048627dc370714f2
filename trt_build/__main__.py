"""Build a TensorRT engine.

    python -m trt_build --onnx model/weights/slsnet.onnx --output slsnet.engine --precision fp16

It writes the engine and, beside it, `slsnet.engine.json`: what it was built for and what TensorRT
made of it, layer by layer. It fails if the precision is not the one asked for.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.program import Help, program
from engines.device import NoGpuError, current_gpu
from engines.plan import BUCKETS, PRECISIONS, PlanError, parse_buckets
from engines.runtime import EngineError
from engines.tensorrt_api import TensorRTError, find_tensorrt
from model.names import OtherNetworkError, add_network_argument
from trt_build.build import DEFAULT_WORKSPACE_BYTES, BuildError, BuildOptions, build
from trt_build.calibrate import CalibrationError, read_ranges
from trt_build.convert import ConversionError
from trt_build.parity import GENERATED, gate_engine
from trt_build.samples import REFERENCE, load_samples

GATE_FAILED = 3
"""Exit code where the engine was built, but its masks differ too much for it to be served."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 1, with one line on stderr, where no engine was made, and
    GATE_FAILED where the engine must not be served.
    """
    args = _parser().parse_args(arguments)
    options = BuildOptions(
        network=args.network,
        precision=args.precision,
        buckets=args.buckets,
        attention=args.attention,
        workspace_bytes=args.workspace_mib << 20,
        timing_cache=args.timing_cache,
        beside_serving=args.beside_serving,
        hardware_compatible=args.hardware_compatible,
        version_compatible=args.version_compatible,
        compute_capability=args.compute_capability,
    )
    started = time.monotonic()

    def progress(line: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {line}", flush=True)

    try:
        if args.parity:
            # The gate needs a GPU. That is said now, before a build that takes minutes.
            trt = find_tensorrt()
            trt.check_builds()
            trt.check_runs_on(current_gpu())
        ranges = read_ranges(args.onnx, args.calibration) if args.precision == "int8" else None
        build(args.onnx, args.output, options, ranges=ranges, progress=progress, gated=args.parity)
        if args.parity:
            result = gate_engine(args.onnx, args.output, load_samples(REFERENCE), GENERATED)
            progress(f"parity on {result.photos} {GENERATED}: {result.failures() or 'passed'}")
            if result.failures():
                return GATE_FAILED
    except (
        BuildError,
        CalibrationError,
        ConversionError,
        EngineError,
        NoGpuError,
        OtherNetworkError,
        PlanError,
        TensorRTError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _add_card(parser: argparse.ArgumentParser) -> None:
    """What depends on the GPU."""
    parser.add_argument(
        "--workspace-mib",
        type=int,
        default=DEFAULT_WORKSPACE_BYTES >> 20,
        help="memory that one kernel may take, MiB",
    )
    parser.add_argument(
        "--timing-cache", type=Path, help="file of measured times: read, and rewritten"
    )
    parser.add_argument(
        "--beside-serving",
        action="store_true",
        help="the GPU serves meanwhile: its times are noted as such, and go into no timing cache",
    )
    parser.add_argument(
        "--hardware-compatible", action="store_true", help="for any GPU from Ampere on"
    )
    parser.add_argument(
        "--version-compatible",
        action="store_true",
        help="later TensorRTs run the engine, and lean runtimes",
    )
    parser.add_argument(
        "--compute-capability",
        help="with TensorRT for RTX: the one GPU that it is for, such as 8.9, or current",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("trt_build"),
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("--onnx", type=Path, required=True, help="the exported model")
    parser.add_argument("--output", type=Path, required=True, help="the engine file")
    add_network_argument(parser, "refuse a graph of another one")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp16",
        help="numbers that the engine computes with",
    )
    parser.add_argument(
        "--buckets",
        type=parse_buckets,
        default=BUCKETS,
        help=f"batch sizes, one profile each (default {','.join(map(str, BUCKETS))})",
    )
    parser.add_argument(
        "--attention",
        choices=["fused", "chunked", "plain"],
        help="form of SLSNet's attention (default: fused, or chunked for fp32 and tf32)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        help="what int8 needs, as trt_build.calibrate writes it (default: beside the ONNX file)",
    )
    _add_card(parser)
    parser.add_argument(
        "--parity",
        action="store_true",
        help="hold the engine against float32 on the shipped photos, note the result in the"
        " sidecar, and fail where its masks differ",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
