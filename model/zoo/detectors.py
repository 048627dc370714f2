"""Detectors of one lesion in a photo: SSDLite finds its box, Mask R-CNN its box and its mask.

Sources: Sandler et al. 2018, "MobileNetV2" (arXiv:1801.04381), section 6.2, for SSDLite; He et al.
2017, "Mask R-CNN" (arXiv:1703.06870); Lin et al. 2016 for the pyramid (arXiv:1612.03144).
Implementation: torchvision (BSD-3-Clause) for heads, anchors, losses and pyramid.
Substituted: both stand on EfficientNet-Lite0, whose ImageNet weights a package carries
(`model.zoo.lite0_unet`), with narrow heads, so that a processor can train them. Their papers'
backbones are MobileNetV2 and ResNet, pre-trained on ImageNet and COCO: those were not to be had.
"""

from collections import OrderedDict
from functools import partial
from typing import cast

from model.zoo.vision import torchvision

# isort: split
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead

from model.zoo.lite0_unet import ENCODER, MEAN, STD, read_imagenet

_CHANNELS = 96
_LEVELS = ("0", "1", "2", "3")  # at 1/4 to 1/32 of the photo


class _Pyramid(nn.Module):
    """EfficientNet-Lite0 and a feature pyramid over its last four stages."""

    out_channels = _CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.encoder = smp.encoders.get_encoder(ENCODER, weights=None)
        channels = list(self.encoder.out_channels[-len(_LEVELS) :])
        self.pyramid = torchvision.ops.FeaturePyramidNetwork(
            channels, _CHANNELS, norm_layer=nn.BatchNorm2d
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        stages = self.encoder(images)[-len(_LEVELS) :]
        named = OrderedDict(zip(_LEVELS, stages, strict=True))
        return cast(dict[str, Tensor], self.pyramid(named))


def build_detector(name: str, size: int, *, pretrained: bool = True) -> nn.Module:
    """A detector of one class, which finds at most one lesion in a photo.

    In training it takes images and targets and gives losses, else images and gives detections, as
    torchvision's detectors do.

    Args:
        name: one of `DETECTORS`.
        size: side of the photos, pixels.
        pretrained: the encoder starts from ImageNet weights.

    Raises:
        ModuleNotFoundError: the package with the ImageNet weights is missing.
    """
    body = _Pyramid()
    if pretrained:
        read_imagenet(body.encoder)
    # A quarter less time on a processor.
    detector: nn.Module = DETECTORS[name](body, size)
    return detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _ssdlite(body: _Pyramid, size: int) -> SSD:
    anchors = DefaultBoxGenerator([[2]] * len(_LEVELS))
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)  # torchvision's for SSDLite
    channels = [_CHANNELS] * len(_LEVELS)
    head = SSDLiteHead(channels, anchors.num_anchors_per_location(), 2, norm)
    return SSD(
        body,
        anchors,
        (size, size),
        2,
        image_mean=list(MEAN),
        image_std=list(STD),
        head=head,
        topk_candidates=50,
        detections_per_img=1,
    )


def _mask_rcnn(body: _Pyramid, size: int) -> MaskRCNN:
    # A lesion is a tenth of the frame at least, mostly a third.
    anchors = tuple((round(size * part),) for part in (0.15, 0.3, 0.5, 0.8))
    return MaskRCNN(
        body,
        min_size=size,
        max_size=size,
        image_mean=list(MEAN),
        image_std=list(STD),
        rpn_anchor_generator=AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * len(_LEVELS)),
        rpn_pre_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_train=50,
        rpn_post_nms_top_n_test=20,
        rpn_batch_size_per_image=64,
        box_head=TwoMLPHead(_CHANNELS * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, 2),
        box_batch_size_per_image=16,
        box_score_thresh=0.01,
        box_detections_per_img=1,
        mask_head=MaskRCNNHeads(_CHANNELS, (_CHANNELS,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(_CHANNELS, _CHANNELS, 2),
    )


DETECTORS = {"ssdlite": _ssdlite, "mask-rcnn": _mask_rcnn}
"""The detectors that `build_detector` knows."""
