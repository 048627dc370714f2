"""Export a trained generator to the ONNX graph that every backend serves.

    python -m model.export --weights runs/best/best.safetensors --output slsnet.onnx

The graph is the contract between training and serving: `image` uint8 [n, 128, 128, 3] RGB in,
`probability` float32 [n, 128, 128] out; normalisation, layout and sigmoid are inside.

The two position attentions at half resolution are two thirds of the exact network's arithmetic.
`pooled`, the default, averages their keys and values over 8×8 positions. A network that was trained
so computes just that. For any other network it is an approximation, to be compared with the exact
graph on photos before it is served:

    python -m model.export --weights W --attention exact --output exact.onnx
    python -m trt_build.parity --onnx exact.onnx --candidate slsnet.onnx --images PHOTOS --masks M

`--half` stores the weights in float16, in a file of half the size. Arithmetic stays float32.

Weights that were trained at another size than 128 say so and give a graph of that size, which the
server refuses.
"""

import argparse
from collections.abc import Sequence
from copy import deepcopy
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import model.training_tools  # noqa: F401, before what it looks for

# isort: split
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.files import replacing
from common.half import halved
from common.onnx import onnx_runner
from common.program import Help, program
from common.stamp import stamped
from model.generator import Generator, input_size, load_metadata
from model.layers import PositionAttention
from model.names import add_network_argument, name_of
from model.networks import read_network
from photos.image import MODEL_SIZE

OPSET = 20
POOL = 8
"""Positions a side that the pooled form averages: 64 keys are left of 4,096. The shipped
network's masks stay alike at 2, 4 and 8; at quarter resolution even 2 changes them."""
MAX_DIFFERENCE = 1e-4  # probability; float32 kernels of two libraries differ by about 1e-6
MAX_DIFFERENCE_HALF = 2e-2
"""The same for weights in float16, which change the probability most at the lesion's border."""
METADATA = (
    "network",
    "training_data",
    "validation_jaccard",
    "threshold",
)  # copied from the weights


AttentionForm = Literal["exact", "pooled"]


def set_attention(generator: Generator, form: AttentionForm) -> None:
    """Let attentions at half resolution compare all positions, or averages of keys and values.

    Raises:
        ValueError: `exact` is asked of a network that was trained pooled.
    """
    trained = generator.config.pam_pool[0]
    if form == "exact" and trained > 1:
        raise ValueError(
            f"the network was trained with keys averaged over {trained}×{trained} positions:"
            " pooled attention is its exact form"
        )
    for attention in generator.half_resolution_attention():
        attention.pool = POOL if form == "pooled" and trained == 1 else trained


class Contract(nn.Module):
    """A network in its served form: bytes go in, probabilities come out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] → float32 [n, H, W]."""
        x = image.permute(0, 3, 1, 2).float() / 255
        return torch.sigmoid(self.network(x))[:, 0]


def export(
    weights: Path,
    output: Path,
    version: str | None = None,
    licence: str = "Apache-2.0",
    size: int | None = None,
    *,
    name: str | None = None,
    attention: AttentionForm = "pooled",
    network: str | None = None,
    half: bool = False,
) -> float:
    """Write the contract graph of `weights` to `output` and check it against PyTorch.

    Args:
        weights: safetensors, as `model.train` writes them.
        output: the ONNX file.
        version: version of the weights, for the model card; by default the start of their sha256.
        size: side of the input, pixels, for weights that do not say theirs.
        name: name for the model card; by default that of the run or the file.
        attention: form of SLSNet's attentions at half resolution; the module describes both.
        network: the network that the caller wants (`model.names`); by default the file's.
        half: store the weights in float16 (`common.half`).

    Returns:
        The largest difference in probability between PyTorch and ONNX Runtime.

    Raises:
        ValueError: the weights are unreadable or of another network, have no such attention, or
            the exported graph computes something else.
    """
    contract = _contract(weights, attention, network)
    images = _photos(input_size(weights, size))
    model = _graph(contract, images)
    model.graph.name = name_of(load_metadata(weights))
    _forget_origin(model)
    given = {"name": name or _name(weights), "licence": licence}
    if isinstance(contract.network, Generator):
        given["attention"] = attention
    onnx.helper.set_model_props(model, given | _card(weights, contract, version))
    onnx.checker.check_model(model, full_check=True)

    with replacing(output) as path:
        content = model.SerializeToString()
        path.write_bytes(halved(content) if half else content)
        difference = _difference(path, contract, images)
        most = MAX_DIFFERENCE_HALF if half else MAX_DIFFERENCE
        if not difference <= most:
            raise ValueError(
                f"the exported graph differs from PyTorch by {difference:.2e} in probability, "
                f"more than {most:.0e}: {output} was not written"
            )
        stamp(path)
    return difference


def _contract(weights: Path, attention: AttentionForm, name: str | None) -> Contract:
    network = read_network(weights, name)
    if isinstance(network, Generator):
        set_attention(network, attention)
        for module in network.modules():
            if isinstance(module, PositionAttention):
                module.mode = "plain"
    return Contract(network).eval()


def _card(weights: Path, contract: Contract, version: str | None) -> dict[str, str]:
    """What the weights themselves say on the model card."""
    digest = sha256(weights.read_bytes()).hexdigest()
    metadata = load_metadata(weights)
    return {
        "version": version or digest[:12],
        "parameters": str(sum(p.numel() for p in contract.parameters())),
        "weights_sha256": digest,
        **{key: metadata[key] for key in METADATA if key in metadata},
    }


def _photos(size: int) -> NDArray[np.uint8]:
    """Make three images that resemble photos, uint8 [3, size, size, 3]."""
    rng = np.random.default_rng(0)
    # They are smooth: on white noise every activation is small, and an error could hide.
    coarse = rng.integers(0, 256, (3, 8, 8, 3)).astype(np.float32)
    smooth = np.kron(coarse, np.ones((1, size // 8, size // 8, 1)))
    return np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)


def _graph(contract: Contract, images: NDArray[np.uint8]) -> onnx.ModelProto:
    """The contract as an ONNX graph, for any number of images of this size."""
    program = torch.onnx.export(
        _folded(contract),
        (torch.from_numpy(images),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["probability"],
        dynamic_shapes={"image": {0: torch.export.Dim("n", min=1)}},
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def _folded(contract: Contract) -> Contract:
    """A copy whose convolutions do what the norm right after them in a sequence does.

    The exporter folds them too, but only after it has traced each norm three times, which is a
    third of its time for a network of many layers.
    """
    copied = deepcopy(contract)
    for sequence in copied.modules():
        if isinstance(sequence, nn.Sequential):
            for i, (layer, norm) in enumerate(pairwise(list(sequence))):
                if type(layer) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d):
                    sequence[i] = fuse_conv_bn_eval(layer, norm)
                    sequence[i + 1] = nn.Identity()
    return copied


def _difference(path: Path, contract: Contract, images: NDArray[np.uint8]) -> float:
    """The largest difference in probability between PyTorch and ONNX Runtime."""
    infer = onnx_runner(path)
    with torch.inference_mode():
        expected = contract(torch.from_numpy(images)).numpy()
    difference = 0.0
    for n in (1, len(images)):
        difference = max(difference, float(np.abs(infer(images[:n]) - expected[:n]).max()))
    return difference


def stamp(path: Path) -> None:
    """Write answers and digest into an ONNX file (`common.stamp`). Earlier ones are replaced."""
    content = path.read_bytes()
    # The server runs only networks of this size, so only they get answers.
    side = onnx.load_from_string(content).graph.input[0].type.tensor_type.shape.dim[1].dim_value
    path.write_bytes(stamped(content, onnx_runner(content) if side == MODEL_SIZE else None))


def _name(weights: Path) -> str:
    """The name for the model card: the run for `runs/a/best.safetensors` (a), else the file's."""
    path = weights.resolve()
    return path.parent.name if path.stem == "best" and path.parent.name else path.stem


def _forget_origin(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes: paths and source lines of the exporting machine."""
    graph = model.graph
    for field in (graph.node, graph.value_info, graph.input, graph.output, graph.initializer):
        for part in field:
            part.ClearField("metadata_props")
            part.ClearField("doc_string")
    graph.ClearField("metadata_props")
    graph.ClearField("doc_string")


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, check and write the file."""
    parser = argparse.ArgumentParser(
        prog=program("model.export"),
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument(
        "--weights", type=Path, required=True, metavar="FILE", help="trained weights, .safetensors"
    )
    add_network_argument(parser, "refuse weights of another one")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the graph; replaced if it is there (default: beside the weights, if none is there)",
    )
    parser.add_argument(
        "--name",
        help="the network's, for the model card (default: the run's folder, or the weights' file)",
    )
    parser.add_argument(
        "--version", help="of the weights, for the model card (default: the start of their sha256)"
    )
    parser.add_argument(
        "--attention",
        choices=get_args(AttentionForm),
        default="pooled",
        help="keys and values of SLSNet's half-resolution attention: all, or averages"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--licence", default="Apache-2.0", help="of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--half", action="store_true", help="store the weights in float16: half the bytes"
    )
    args = parser.parse_args(arguments)
    output = args.output or args.weights.with_suffix(".onnx")
    if not args.output and output.exists():
        parser.error(f"{output} is there already: name the file to write with --output")
    try:
        difference = export(
            args.weights,
            output,
            args.version,
            args.licence,
            name=args.name,
            attention=args.attention,
            network=args.network,
            half=args.half,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{output}: largest difference from PyTorch {difference:.1e} in probability")


if __name__ == "__main__":
    main()
