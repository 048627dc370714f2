"""Compares an engine, or any backend, with the float32 ONNX file on photos: the gate to serving.

    python -m trt_build.parity --onnx model/weights/slsnet.onnx --engine slsnet.engine
    python -m trt_build.parity --onnx model/weights/slsnet.onnx --simulate fp16 bf16 int8
    python -m trt_build.parity --onnx model/weights/slsnet.onnx --decode gpu --images FOLDER

`--simulate` runs on the CPU without TensorRT, in float32 arithmetic; every value is rounded as
the engine would store it. `fp16-sums` also rounds every step of position attention's sums, as a
kernel that sums in float16 does. `--decode` compares the pixels instead: those of photos that the
GPU decoded (`gpu`), or that are decoded whole on the CPU before they are averaged, as a GPU does it
(`whole`). The command exits with 1 where the gate is not passed, and with 2
where nothing could be compared.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from common.files import write_atomically
from common.onnx import onnx_runner
from common.program import Help
from common.stamp import Infer
from engines.plan import Precision
from model.metrics import count, jaccard
from photos.image import THRESHOLD, UPRIGHT, JpegReader, lesion_mask, unpack_mask
from trt_build.samples import REFERENCE, Sample, batches, load_samples

GENERATED = "generated lesions"


@dataclass(frozen=True)
class Gate:
    """The most that a precision may change."""

    mask_iou: float
    """The least mean overlap between the candidate's masks and those of float32."""
    jaccard: float
    """The largest loss of mean Jaccard against the true masks."""


GATES: Mapping[Precision, Gate] = {
    "fp32": Gate(0.995, 0.002),
    "tf32": Gate(0.995, 0.002),
    "fp16": Gate(0.995, 0.002),
    "bf16": Gate(0.995, 0.002),
    "int8": Gate(0.985, 0.005),
}


@dataclass(frozen=True)
class Parity:
    """How far a candidate is from the float32 ONNX file."""

    candidate: str
    precision: Precision
    photos: int
    source: str
    """The folder that the photos came from."""
    max_difference: float
    """The largest difference of probability, over all pixels."""
    mean_difference: float
    mask_iou_mean: float
    """Mean overlap of the two masks at the photos' own size; 1 where both are empty."""
    mask_iou_min: float
    jaccard_reference: float | None
    """Mean Jaccard over photos, against the truth; None without true masks."""
    jaccard_candidate: float | None

    def failures(self) -> list[str]:
        """List what the gate of this precision finds wrong. The list is empty where it passes."""
        gate = GATES[self.precision]
        found = []
        if not np.isfinite(self.max_difference):
            found.append("probabilities are not finite")
        if not self.mask_iou_mean >= gate.mask_iou:
            found.append(f"mean mask IoU {self.mask_iou_mean:.4f} < {gate.mask_iou}")
        if self.jaccard_reference is not None and self.jaccard_candidate is not None:
            change = self.jaccard_candidate - self.jaccard_reference
            if not abs(change) <= gate.jaccard:
                found.append(f"Jaccard changes by {change:+.4f}, more than {gate.jaccard}")
        return found


def compare(
    reference: Infer,
    candidate: Infer,
    samples: Sequence[Sample],
    *,
    name: str,
    precision: Precision,
    source: str,
    threshold: float = THRESHOLD,
    decoded: Sequence[Sample] | None = None,
) -> Parity:
    """Run both backends on `samples`, and compare probabilities and masks.

    `decoded` are the same photos as the candidate gets them; None if it gets the same pixels.
    """
    differences: list[float] = []
    means: list[float] = []
    overlaps: list[float] = []
    truths: list[tuple[float, float]] = []
    position = 0
    for batch, other in zip(batches(samples), batches(decoded or samples), strict=True):
        expected, found = reference(batch), candidate(other)
        if found.shape != expected.shape:
            raise ValueError(f"{name} gives {found.shape}, expected {expected.shape}")
        for one, other in zip(expected, found, strict=True):
            sample = samples[position]
            position += 1
            error = np.abs(one - other)
            differences.append(float(error.max()))
            means.append(float(error.mean()))
            masks = [
                unpack_mask(
                    lesion_mask(np.nan_to_num(p), sample.width, sample.height, threshold),
                    sample.width,
                )
                for p in (one, other)
            ]
            overlaps.append(mask_iou(*masks))
            if sample.truth is not None:
                truths.append((mask_iou(masks[0], sample.truth), mask_iou(masks[1], sample.truth)))
    jaccards = np.mean(truths, axis=0) if truths else (None, None)
    return Parity(
        candidate=name,
        precision=precision,
        photos=len(samples),
        source=source,
        max_difference=float(np.max(differences)),
        mean_difference=float(np.mean(means)),
        mask_iou_mean=float(np.mean(overlaps)),
        mask_iou_min=float(np.min(overlaps)),
        jaccard_reference=None if jaccards[0] is None else float(jaccards[0]),
        jaccard_candidate=None if jaccards[1] is None else float(jaccards[1]),
    )


def mask_iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks; 1 where both are empty."""
    return float(jaccard(count(a, b)))


def simulated_runner(onnx_path: Path, precision: Precision, *, half_sums: bool = False) -> Infer:
    """Return a function that runs `precision` on the CPU: float32, values rounded as stored.

    `half_sums` also rounds position attention's sums (`trt_build.convert.convert`).
    """
    import onnx

    from trt_build.calibrate import read_ranges
    from trt_build.convert import convert

    ranges = read_ranges(onnx_path) if precision == "int8" else None
    model = convert(
        onnx.load(onnx_path), precision, ranges=ranges, simulate=True, half_sums=half_sums
    )
    return onnx_runner(model.SerializeToString(), exact=True)


def gate_engine(onnx_path: Path, engine: Path, samples: Sequence[Sample], source: str) -> Parity:
    """Compare an engine with its ONNX file on this machine's GPU; note the result in the sidecar.

    Raises the errors of engines.runtime.EngineRunner.
    """
    from engines.runtime import EngineRunner

    runner = EngineRunner(engine)
    try:
        key = runner.info.key
        result = compare(
            onnx_runner(onnx_path),
            runner.infer,
            samples,
            name=f"{key.library}, {key.precision}, on {runner.gpu.name}",
            precision=key.precision,
            source=source,
        )
    finally:
        runner.close()
    noted = {**asdict(result), "failures": result.failures()}
    replace(runner.info, parity=noted).write(engine)
    return result


def table(results: Sequence[Parity]) -> str:
    """Return the results as a Markdown table."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    rows = [
        "| candidate | photos | max difference | mean difference | mask IoU mean | min "
        "| Jaccard fp32 | Jaccard | gate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        failures = r.failures()
        rows.append(
            f"| {r.candidate} | {r.photos} | {number(r.max_difference)} | {r.mean_difference:.1e} "
            f"| {number(r.mask_iou_mean)} | {number(r.mask_iou_min)} "
            f"| {number(r.jaccard_reference)} | {number(r.jaccard_candidate)} "
            f"| {'; '.join(failures) or 'passed'} |"
        )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; the exit code is 1 if they differ too much, 2 if they cannot be compared."""
    parser = argparse.ArgumentParser(
        prog="python -m trt_build.parity",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("--onnx", type=Path, required=True, help="the float32 reference")
    parser.add_argument("--engine", type=Path, help="an engine built from it; needs its GPU")
    parser.add_argument(
        "--candidate",
        type=Path,
        help="another float32 ONNX file of the same weights, such as its pooled form",
    )
    parser.add_argument(
        "--simulate",
        nargs="+",
        choices=["fp16", "fp16-sums", "bf16", "int8"],
        default=[],
        metavar="PRECISION",
        help="compare these, simulated on the CPU: fp16, fp16-sums, bf16, int8",
    )
    parser.add_argument(
        "--decode",
        choices=["whole", "gpu"],
        help="compare photos decoded whole on the CPU, or on the GPU",
    )
    parser.add_argument("--cuda", action="store_true", help="compare ONNX Runtime's CUDA provider")
    parser.add_argument(
        "--images",
        type=Path,
        default=REFERENCE,
        help="folder of photos (default: the shipped ones)",
    )
    parser.add_argument("--masks", type=Path, help="folder of true masks, where it is another")
    parser.add_argument("--limit", type=int, help="most photos to use (default: all)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args(arguments)
    if not (args.engine or args.simulate or args.cuda or args.candidate or args.decode):
        parser.error(
            "nothing to compare: give --engine, --candidate, --simulate, --decode or --cuda"
        )

    try:
        results = _results(args)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(results))
    if args.json:
        write_atomically(args.json, json.dumps([asdict(r) for r in results], indent=1).encode())
    return int(any(result.failures() for result in results))


def _simulated(onnx_path: Path, name: str) -> tuple[str, Precision, Infer]:
    precision = cast("Precision", name.removesuffix("-sums"))
    runner = simulated_runner(onnx_path, precision, half_sums=name.endswith("-sums"))
    return f"{name}, simulated on CPU", precision, runner


def _results(args: argparse.Namespace) -> list[Parity]:
    if args.cuda and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeError("--cuda: this ONNX Runtime has no CUDA (requirements-gpu.txt)")
    samples = load_samples(args.images, args.masks, args.limit)
    source = GENERATED if args.images == REFERENCE else args.images.name
    # The engine comes first: a missing GPU is reported before the rest, which may take minutes.
    engines = [gate_engine(args.onnx, args.engine, samples, source)] if args.engine else []
    candidates: list[tuple[str, Precision, Infer]] = [
        _simulated(args.onnx, name) for name in args.simulate
    ]
    if args.candidate:
        candidates.append((args.candidate.name, "fp32", onnx_runner(args.candidate)))
    if args.cuda:
        providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
        candidates.append(("ONNX Runtime CUDA", "fp32", onnx_runner(args.onnx, providers)))
    results = [
        compare(
            onnx_runner(args.onnx), infer, samples, name=name, precision=precision, source=source
        )
        for name, precision, infer in candidates
    ]
    if args.decode:
        decoded = load_samples(args.images, args.masks, args.limit, _reader(args.decode))
        apart = np.abs(
            np.stack(
                [
                    one.pixels.astype(int) - two.pixels
                    for one, two in zip(samples, decoded, strict=True)
                ]
            )
        )
        name = f"decoded {args.decode}: pixels {apart.mean():.2f} levels off, at most {apart.max()}"
        infer = onnx_runner(args.onnx)
        results.append(
            compare(
                *(infer, infer, samples),
                name=name,
                precision="fp32",
                source=source,
                decoded=decoded,
            )
        )
    return results + engines


def _reader(how: str) -> JpegReader:
    if how == "whole":
        return _decoded_whole
    from engines.jpeg import GpuJpeg

    return GpuJpeg()


def _decoded_whole(data: bytes, orientation: int, size: int) -> NDArray[np.uint8]:
    with Image.open(BytesIO(data)) as image:
        upright = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
        return np.array(upright.resize((size, size), Image.Resampling.BOX))


if __name__ == "__main__":
    sys.exit(main())
