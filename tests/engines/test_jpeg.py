"""JPEG files decoded on a GPU: the kernel's own source, compiled for the host, on a simulated CUDA.

nvImageCodec is stood in for by Pillow, whose pixels its CPU decoder gives to the bit. What needs a
GPU is in tests/trt_build/test_gpu.py.
"""

# ruff: noqa: N802 - nvImageCodec's own names

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engines import cuda, jpeg
from engines.device import Gpu, NoGpuError
from engines.jpeg import KERNEL, GpuJpeg, GpuJpegError
from photos.image import UPRIGHT, read_photo
from tests.support import ROOT
from tests.support.fake_cuda import FakeCuda, Status
from tests.support.lesions import lesion_photo

pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")

Average = Callable[..., None]

# What CUDA C++ has beyond C, and every thread of the grid in turn.
HOST = """
#define __device__ static
#define __global__
typedef struct {{ int x, y; }} place;
static place blockIdx, blockDim, threadIdx;
{kernel}
void run(int across, int down, int block, const unsigned char *photo, long long right,
         long long below, int width, int height, int size, unsigned char *square) {{
    blockDim.x = block;
    for (blockIdx.y = 0; blockIdx.y < down; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < across; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x)
                average(photo, right, below, width, height, size, square);
}}
"""


@pytest.fixture(scope="session")
def average(tmp_path_factory: pytest.TempPathFactory) -> Average:
    """The kernel on the host: grid's two sides, threads of a block, then its own arguments."""
    compiler = [found] if (found := shutil.which("cc")) else [sys.executable, "-m", "ziglang", "cc"]
    if len(compiler) > 1 and importlib.util.find_spec("ziglang") is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("kernel")
    source = folder / "average.c"
    source.write_text(HOST.format(kernel=KERNEL.replace('extern "C" ', "")))
    library = folder / "average.so"
    flags = ["-O2", "-shared", "-fPIC", "-ffp-contract=off", "-o", str(library)]
    subprocess.run([*compiler, *flags, str(source)], check=True, capture_output=True)
    run = ctypes.CDLL(str(library)).run
    run.argtypes = [ctypes.c_int] * 3 + list(cuda.Kernel.PARAMETERS)
    return run


class FakeDecoder:
    """nvImageCodec's module and decoder, by Pillow, into memory that CUDA knows."""

    BackendKind = SimpleNamespace(HW_GPU_ONLY=1, GPU_ONLY=2, HYBRID_CPU_GPU=3)

    def __init__(self, memory: FakeCuda) -> None:
        self.memory = memory
        self.decoded = 0
        self.breaks = False

    def Backend(self, kind: int) -> int:
        return kind

    def DecodeParams(self, *, apply_exif_orientation: bool) -> bool:
        return apply_exif_orientation

    def CodeStream(self, data: bytes) -> bytes:
        return data

    def Decoder(self, *, max_num_cpu_threads: int, backends: list[int]) -> "FakeDecoder":
        assert backends == [1, 2, 3]
        return self

    def decode(self, data: bytes, *, image: Any, params: bool, cuda_stream: int) -> Any:
        assert params is False and cuda_stream in self.memory.streams
        if self.breaks:
            raise RuntimeError("CUDA Runtime failure: '#700'")
        try:
            with Image.open(BytesIO(data)) as opened:
                pixels = np.asarray(opened)
        except OSError:
            return None
        self.decoded += 1
        _, address = self.memory.allocate(pixels.nbytes)
        ctypes.memmove(address, pixels.ctypes.data, pixels.nbytes)
        there = {"shape": pixels.shape, "strides": None, "typestr": "|u1", "data": (address, False)}
        return SimpleNamespace(__cuda_array_interface__=there)


class Card:
    """A simulated GPU that decodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, average: Average) -> None:
        self.memory = FakeCuda()
        self.decoder = FakeDecoder(self.memory)
        self.sources: list[str] = []
        monkeypatch.setattr(cuda, "runtime", self.memory)
        monkeypatch.setattr(jpeg, "current_gpu", lambda: Gpu("a card", "9.0", 1 << 30, 132))
        monkeypatch.setitem(sys.modules, "nvidia", SimpleNamespace(nvimgcodec=self.decoder))

        class HostKernel:
            def __init__(self, source: str, name: str, compute_capability: str) -> None:
                assert (source, name, compute_capability) == (KERNEL, "average", "9.0")

            def launch(
                self, stream: cuda.Stream, grid: tuple[int, int], block: int, *arguments: int
            ) -> None:
                average(*grid, block, *arguments)

        monkeypatch.setattr(cuda, "Kernel", HostKernel)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, average: Average) -> Card:
    return Card(monkeypatch, average)


def _jpeg(pixels: NDArray[np.uint8], orientation: int = 1, **options: Any) -> bytes:
    file, exif = BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, "JPEG", exif=exif, **{"quality": 90, **options})
    return file.getvalue()


def _whole(data: bytes, orientation: int, size: int = 128) -> NDArray[np.uint8]:
    """The whole photo, upright, averaged by Pillow."""
    with Image.open(BytesIO(data)) as image:
        upright = image.transpose(UPRIGHT[orientation]) if orientation > 1 else image
        return np.asarray(upright.resize((size, size), Image.Resampling.BOX))


SIDES = [(600, 450), (1023, 767), (140, 131), (140, 100), (257, 200), (3000, 411)]


@pytest.mark.parametrize(("width", "height"), SIDES)
def test_the_kernel_averages_as_pillow_does(card: Card, width: int, height: int) -> None:
    data = _jpeg(lesion_photo(3, width, height).pixels)
    np.testing.assert_array_equal(GpuJpeg()(data, 1, 128), _whole(data, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_on_its_side_is_read_upright(card: Card, orientation: int) -> None:
    data = _jpeg(lesion_photo(4, 331, 290).pixels, orientation)
    read = GpuJpeg()
    before = card.decoder.decoded
    photo = read_photo(data, jpeg=read)
    assert card.decoder.decoded == before + 1
    np.testing.assert_array_equal(photo.pixels, _whole(data, orientation))
    without = read_photo(data)
    assert (photo.width, photo.height, photo.orientation) == (
        *(without.width, without.height),
        without.orientation,
    )


def test_odd_files_are_the_cpus(card: Card) -> None:
    pixels = lesion_photo(5, 300, 260).pixels
    whole = _jpeg(pixels)
    frame, colours = b"\xff\xc0\0\x11\x08", b"\x01\x22\0\x02\x11\x01\x03\x11\x01"
    scan = b"\xff\xda\0\x0c\x03\x01\0\x02\x11\x03\x11\0\x3f\0"
    grey = BytesIO()
    Image.fromarray(pixels).convert("L").save(grey, "JPEG")
    cmyk = BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG")
    png = BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    odd = {
        "progressive": _jpeg(pixels, progressive=True),
        "stored as RGB": _jpeg(pixels, keep_rgb=True),
        "bytes after the end": whole + b"\0",
        "arithmetic coding": _changed(whole, frame, b"\xff\xc9" + frame[2:]),
        "4:4:0": _changed(whole, colours, b"\x01\x12" + colours[2:]),
        "4:1:1": _changed(whole, colours, b"\x01\x41" + colours[2:]),
        "finer colours": _changed(whole, colours, b"\x01\x11\0\x02\x22\x01\x03\x22\x01"),
        "one finer colour": _changed(whole, colours, colours[:4] + b"\x21" + colours[5:]),
        "no colours in its scan": _changed(whole, scan, b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"),
        "grey": grey.getvalue(),
        "CMYK": cmyk.getvalue(),
        "PNG": png.getvalue(),
    }
    read = GpuJpeg()
    before = card.decoder.decoded
    for name, data in odd.items():
        with_gpu, without = read_photo(data, jpeg=read), read_photo(data)
        np.testing.assert_array_equal(with_gpu.pixels, without.pixels, err_msg=name)
    with pytest.raises(ValueError, match="truncated"):
        read_photo(whole[:-200], jpeg=read)
    assert card.decoder.decoded == before
    # Tall ones Pillow averages in another order. Only the decoder finds out.
    tall = _jpeg(lesion_photo(6, 150, 700).pixels)
    np.testing.assert_array_equal(read_photo(tall, jpeg=read).pixels, read_photo(tall).pixels)


def _changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_what_cameras_write_is_the_gpus(card: Card, subsampling: str) -> None:
    read = GpuJpeg()
    before = card.decoder.decoded
    pixels = lesion_photo(5, 300, 260).pixels
    for more in ({}, {"restart_marker_rows": 1}, {"icc_profile": bytes(70_000)}):
        data = _jpeg(pixels, subsampling=subsampling, **more)
        np.testing.assert_array_equal(read_photo(data, jpeg=read).pixels, _whole(data, 1))
    assert card.decoder.decoded == before + 3


def test_what_the_gpu_does_not_decode_the_cpu_does(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _jpeg(lesion_photo(7, 300, 260).pixels)
    read = GpuJpeg()
    monkeypatch.setattr(card.decoder, "decode", lambda *_, **__: None)
    np.testing.assert_array_equal(read_photo(data, jpeg=read).pixels, read_photo(data).pixels)
    # It says no more than that when the GPU is broken. No photo waits for such a one again.
    card.memory.sticky = Status.cudaErrorIllegalAddress
    with pytest.raises(GpuJpegError, match="cudaErrorIllegalAddress"):
        read(data, 1, 128)


def test_photos_are_decoded_while_a_graph_is_recorded(card: Card) -> None:
    """ONNX Runtime records in CUDA's global mode, when a network is loaded anew."""
    data = _jpeg(lesion_photo(7, 300, 260).pixels)
    read = GpuJpeg()
    stream = cuda.Stream()
    with ThreadPoolExecutor(1) as recorder, ThreadPoolExecutor(1) as decoder:
        number = card.memory.streams[stream.handle]
        mode = card.memory.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
        recorder.submit(card.memory.cudaStreamBeginCapture, number, mode).result()
        # A thread that has not decoded yet allocates.
        found = decoder.submit(read, data, 1, 128).result()
        status, _ = recorder.submit(card.memory.cudaStreamEndCapture, number).result()
    assert found is not None and status == Status.cudaSuccess


def test_pixels_that_are_too_far_off_are_refused_at_the_start(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < float(GpuJpeg().said.split("pixels are ")[1].split()[0]) < jpeg.MOST_LEVELS
    right = card.decoder.decode

    def darker(*args: Any, **named: Any) -> Any:
        found = right(*args, **named)
        there = found.__cuda_array_interface__
        size = int(np.prod(there["shape"]))
        values = np.ctypeslib.as_array(card.memory.view(there["data"][0], size))
        values[:] = np.maximum(values, 8) - 8
        return found

    monkeypatch.setattr(card.decoder, "decode", darker)
    with pytest.raises(GpuJpegError, match=r"levels off .* 2\.5 on average are allowed"):
        GpuJpeg()

    def darker_in_full_colour(data: bytes, **named: Any) -> Any:
        with Image.open(BytesIO(data)) as image:
            is_full = image.layer[0][1:3] == (1, 1)  # type: ignore[attr-defined]
        return (darker if is_full else right)(data, **named)

    monkeypatch.setattr(card.decoder, "decode", darker_in_full_colour)
    with pytest.raises(GpuJpegError, match=r"2\.5 on average are allowed"):
        GpuJpeg()


def test_errors_say_what_is_missing_or_failed(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _jpeg(lesion_photo(8, 300, 260).pixels)
    read = GpuJpeg()
    card.decoder.breaks = True
    with pytest.raises(GpuJpegError, match="#700"):
        read(data, 1, 128)
    card.decoder.breaks = False
    card.memory.sticky = Status.cudaErrorIllegalAddress
    with pytest.raises(GpuJpegError, match="cudaErrorIllegalAddress"):
        read(data, 1, 128)
    card.memory.sticky = None
    for error in (ValueError("an argument"), MemoryError()):
        monkeypatch.setattr(card.decoder, "decode", Mock(side_effect=error))
        with pytest.raises(GpuJpegError, match=type(error).__name__):
            read(data, 1, 128)
    monkeypatch.setitem(sys.modules, "nvidia", None)
    with pytest.raises(GpuJpegError, match=r"pip install -r requirements-decode\.txt"):
        GpuJpeg()

    def none() -> Gpu:
        raise NoGpuError("no NVIDIA driver")

    monkeypatch.setattr(jpeg, "current_gpu", none)
    with pytest.raises(GpuJpegError, match="no NVIDIA driver"):
        GpuJpeg()


def test_memory_is_used_again_and_given_back(card: Card) -> None:
    data = _jpeg(lesion_photo(9, 300, 260).pixels)
    held = card.memory.held()
    read = GpuJpeg()
    read(data, 1, 128)
    photos = card.decoder.decoded
    assert card.memory.held() == held + photos + 3  # a stream, and the square here and there
    read.close()
    assert card.memory.held() == held + photos


def test_nvrtc_compiles_the_kernel() -> None:
    try:
        code = cuda.compiled(KERNEL, "9.0")
    except cuda.CudaError as error:
        pytest.skip(str(error))
    assert code[:4] == b"\x7fELF"
    with pytest.raises(cuda.CudaError, match=r"does not compile it for .*sm_90.* undefined"):
        cuda.compiled(KERNEL.replace("double", "duble"), "9.0")


DAMAGED = """
from engines import jpeg
codec = jpeg._codec()  # Private: it needs a GPU all around it.
decoder = codec.Decoder(
    device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
    backends=[codec.Backend(codec.BackendKind.CPU_ONLY)],
)
assert decoder.decode(codec.CodeStream(b"\\xff\\xd8\\xff\\xd0\\xff\\xd9")) is None
"""


def test_a_damaged_photo_leaves_nothing_in_the_log() -> None:
    pytest.importorskip("nvidia.nvimgcodec", reason="nvidia-nvimgcodec-cu13 is not here")
    command = [sys.executable, "-c", DAMAGED]
    ended = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=600
    )
    assert "parse" not in ended.stdout + ended.stderr


def test_a_real_decoder_gives_pillows_pixels() -> None:
    """What the stand-in above rests on."""
    codec = pytest.importorskip("nvidia.nvimgcodec", reason="nvidia-nvimgcodec-cu13 is not here")
    decoder = codec.Decoder(
        device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
        backends=[codec.Backend(codec.BackendKind.CPU_ONLY)],
    )
    data = _jpeg(lesion_photo(10, 301, 262).pixels, 6)
    parameters = codec.DecodeParams(apply_exif_orientation=False)
    found = decoder.decode(codec.CodeStream(data), params=parameters)
    with Image.open(BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(image))
