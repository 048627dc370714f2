"""JPEG files to the network's pixels on the GPU: nvImageCodec decodes, and a kernel averages.

    jpeg = GpuJpeg()                                 # refuses where the GPU cannot do it
    photo = read_photo(data, jpeg=jpeg)              # the CPU reads what the GPU does not

The GPU decodes the whole photo, where the CPU decodes it at a reduced scale. Then it averages as
Pillow's BOX filter does, integer for integer. So the pixels are a level or so off the CPU's, and
the masks differ by a pixel here and there (`python -m trt_build.parity --decode`).

Source of the average: Pillow's Resample.c (`precompute_coeffs`, `ImagingResampleHorizontal_8bpc`),
as in photos/native. It is hand-written because nvImageCodec's Python interface cannot resize.
"""

import os
import threading
from dataclasses import dataclass
from io import BytesIO
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.device import Gpu, NoGpuError, current_gpu
from photos.image import MODEL_SIZE, read_photo

__all__ = ["KERNEL", "MOST_LEVELS", "GpuJpeg", "GpuJpegError", "differences"]

MOST_LEVELS = 2.5
"""The most levels (of 255) that a photo's pixels on the GPU may be off the CPU's on average."""

KERNEL = r"""
/* Which of `length` samples output `index` of `size` is the mean of, by Resample.c's own steps. */
__device__ int average_of(int index, int length, int size, int *first) {
    double scale = (double)length / size, filter_scale = scale < 1 ? 1 : scale;
    double centre = (index + 0.5) * scale, support = 0.5 * filter_scale;
    double per_sample = 1 / filter_scale;
    int from = (int)(centre - support + 0.5), to = (int)(centre + support + 0.5), count = 0;
    from = from < 0 ? 0 : from;
    to = to > length ? length : to;
    for (int at = from; at < to; ++at) {
        double x = (at - centre + 0.5) * per_sample;
        if (x > -0.5 && x <= 0.5 && !count++)
            *first = at;
    }
    return count;
}

/* The rounded mean of `count` samples; 22 bits after the point, as Pillow has them. */
__device__ unsigned mean(unsigned sum, int count) {
    unsigned weight = count ? (unsigned)(0.5 + 1.0 / count * (1 << 22)) : 0;
    return (sum * weight + (1u << 21)) >> 22;
}

/* One pixel of the square a thread. `right` and `down` are the bytes from a pixel of the upright
   photo to its neighbours, so a photo that is stored on its side is read on its side. */
extern "C" __global__ void average(const unsigned char *photo, long long right, long long down,
                                   int width, int height, int size, unsigned char *square) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y, left = 0, top = 0;
    if (x >= size)
        return;
    int columns = average_of(x, width, size, &left), rows = average_of(y, height, size, &top);
    for (int colour = 0; colour < 3; ++colour) {
        unsigned total = 0;
        for (int row = top; row < top + rows; ++row) {
            const unsigned char *at = photo + row * down + left * right + colour;
            unsigned sum = 0;
            for (int column = 0; column < columns; ++column, at += right)
                sum += *at;
            total += mean(sum, columns);
        }
        square[3 * (size * y + x) + colour] = (unsigned char)mean(total, rows);
    }
}
"""
"""CUDA C++ of the average."""

_BLOCK = 64

# The environment's variable for what nvImageCodec writes to stderr: 0 is nothing, 2 are warnings.
_LOUDNESS = "PYNVIMGCODEC_VERBOSITY"


class GpuJpegError(RuntimeError):
    """The GPU cannot decode photos here. The message says what is missing, or what went wrong."""


def differences(read: "GpuJpeg", size: int = MODEL_SIZE) -> tuple[float, int]:
    """How far the GPU's pixels are from the CPU's, on drawn photos.

    There is one of each kind of colours that the GPU gets: 4:2:0, 4:2:2 and 4:4:4.

    Returns:
        The mean of the photo whose mean is the greatest, and the most, both in levels.

    Raises:
        GpuJpegError: the GPU does not decode them.
    """
    apart = []
    for orientation, (width, height) in enumerate(((600, 450), (1023, 767), (450, 600)), start=1):
        data = _drawn(width, height, orientation)
        found = read(data, orientation, size)
        if found is None:
            raise GpuJpegError(
                "nvImageCodec does not decode a JPEG of Pillow's;"
                f" with {_LOUDNESS}=2 in the environment it says why"
            )
        apart.append(np.abs(found.astype(int) - read_photo(data, size=size).pixels))
    return float(max(part.mean() for part in apart)), int(max(part.max() for part in apart))


def _drawn(width: int, height: int, orientation: int) -> bytes:
    """A JPEG of a dark ellipse on a bright ground with some noise; orientation 1 to 3."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    inside = (1 + np.tanh(8 * (0.5 - np.hypot(x + 0.2, 1.3 * y)))) / 2
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 1))
    ground, lesion = np.array([214, 172, 148]), np.array([96, 62, 54])
    pixels = ground + inside[..., None] * (lesion - ground) + noise + 12 * x[..., None]
    file, exif = BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
        file, "JPEG", quality=92, exif=exif, subsampling=3 - orientation
    )
    return file.getvalue()


class GpuJpeg:
    """Decodes JPEG files on this process's GPU, in any number of threads.

    Raises:
        GpuJpegError: there is no GPU, or one of the packages of requirements-decode.txt is missing,
            or the pixels differ from the CPU's by more than `MOST_LEVELS` on average.
    """

    def __init__(self) -> None:
        try:
            gpu = current_gpu()
        except NoGpuError as error:
            raise GpuJpegError(str(error)) from error
        self._codec = _codec()
        from engines import cuda

        self._cuda = cuda
        self._of_thread = threading.local()
        self._lanes: list[_Lane] = []
        try:
            self._kernel = cuda.Kernel(KERNEL, "average", gpu.compute_capability)
        except cuda.CudaError as error:
            raise GpuJpegError(str(error)) from error
        try:
            self.said = self._proved(gpu)
        except BaseException:
            self.close()
            raise

    def _proved(self, gpu: Gpu) -> str:
        """Compare the GPU's pixels with the CPU's, and say how far they are apart.

        Raises:
            GpuJpegError: too far, or the GPU does not decode.
        """
        mean, most = differences(self)
        said = f"{gpu.name}: pixels are {mean:.2f} levels off the CPU's on average, {most} at most"
        if mean > MOST_LEVELS:
            raise GpuJpegError(f"{said}; {MOST_LEVELS} on average are allowed")
        return said

    def __call__(self, data: bytes, orientation: int, size: int) -> NDArray[np.uint8] | None:
        """The photo's frame averaged to a square; None where the CPU has to read it.

        Args:
            data: a JPEG that `photos.image.read_photo` finds usual.
            orientation: EXIF orientation that makes it upright, 1 to 8 (EXIF 2.32, tag 0x0112).
            size: side of the square, pixels.

        Returns:
            uint8 [size, size, 3], RGB, upright.

        Raises:
            GpuJpegError: the GPU failed.
        """
        try:
            lane = getattr(self._of_thread, "lane", None)
            if lane is None or lane.size != size:
                lane = self._of_thread.lane = _Lane(self._codec, self._cuda, self._kernel, size)
                self._lanes.append(lane)
            return lane.read(data, orientation)
        except Exception as error:
            # CUDA's, or nvImageCodec's, which may be of any kind. None is the photo's fault: what
            # nvImageCodec does not decode is None.
            raise GpuJpegError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Free the GPU's memory. No call may be running or follow."""
        while self._lanes:
            self._lanes.pop().close()


def _codec() -> ModuleType:
    # Else it writes red lines to stderr, between those of the log, about each damaged photo.
    os.environ.setdefault(_LOUDNESS, "0")
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        raise GpuJpegError(
            f"{error}: pip install -r requirements-decode.txt has what decodes on a GPU"
        ) from error
    module: ModuleType = nvimgcodec
    return module


@dataclass(frozen=True)
class _Upright:
    """Where the upright photo's pixels lie in the stored one."""

    offset: int
    """Bytes to its first pixel."""
    right: int
    """Bytes from a pixel to the one at its right."""
    down: int
    """Bytes from a pixel to the one below."""
    width: int
    height: int

    @staticmethod
    def of(width: int, height: int, pixel: int, line: int, orientation: int) -> "_Upright":
        """`pixel` and `line` are the bytes between the stored picture's pixels and lines."""
        mirrored, flipped = orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7)
        offset = mirrored * (width - 1) * pixel + flipped * (height - 1) * line
        across, along = (-pixel if mirrored else pixel), (-line if flipped else line)
        if orientation < 5:
            return _Upright(offset, across, along, width, height)
        return _Upright(offset, along, across, height, width)


class _Lane:
    """What one thread decodes with: a stream, a decoder, the decoded photo, and the square."""

    def __init__(self, codec: ModuleType, cuda: Any, kernel: Any, size: int) -> None:
        # This thread is its only one, and decoding may allocate at any time.
        cuda.pass_over_recordings()
        self.size = size
        self._codec = codec
        self._kernel = kernel
        self._photo: Any = None
        kinds = codec.BackendKind
        on_gpu = [kinds.HW_GPU_ONLY, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU]
        self._decoder = codec.Decoder(
            max_num_cpu_threads=1, backends=[codec.Backend(kind) for kind in on_gpu]
        )
        # The caller turns it upright, as it checks what the file says of that.
        self._parameters = codec.DecodeParams(apply_exif_orientation=False)
        self._stream = cuda.Stream()
        self._square = cuda.PinnedArray((size, size, 3), np.dtype(np.uint8))
        self._on_gpu = cuda.DeviceMemory(self._square.array.nbytes)

    def read(self, data: bytes, orientation: int) -> NDArray[np.uint8] | None:
        """See `GpuJpeg.__call__`."""
        photo = self._decoder.decode(
            self._codec.CodeStream(data),
            image=self._photo,
            params=self._parameters,
            cuda_stream=self._stream.handle,
        )
        if photo is None:
            # The photo may be odd, or the GPU broken: then this raises.
            self._stream.synchronize()
            return None
        self._photo = photo  # The next photo of this thread is decoded into the same memory.
        there = photo.__cuda_array_interface__
        height, width, colours = there["shape"]
        if colours != 3 or there["typestr"] not in ("|u1", "<u1"):
            return None
        line, pixel, _ = there["strides"] or (3 * width, 3, 1)
        upright = _Upright.of(width, height, pixel, line, orientation)
        if 2 * upright.width <= upright.height + self.size:
            return None  # Pillow averages the columns of a tall photo first, with other rounding.
        self._kernel.launch(
            self._stream,
            (-(-self.size // _BLOCK), self.size),
            _BLOCK,
            *(there["data"][0] + upright.offset, upright.right, upright.down),
            *(upright.width, upright.height, self.size, self._on_gpu.address),
        )
        self._stream.copy(self._square.address, self._on_gpu.address, self._on_gpu.size)
        self._stream.synchronize()
        pixels: NDArray[np.uint8] = self._square.array.copy()
        return pixels

    def close(self) -> None:
        self._photo = None
        self._on_gpu.close()
        self._square.close()
        self._stream.close()
