"""Building blocks of SLSNet: attention over positions and channels, factorised layers, samplers.

References: Sarker et al. 2019 (arXiv:1907.00856) section 3, eqs. 1-6; DANet (Fu et al. 2018) for
PAM and CAM; ERFNet (Romera et al. 2018) for the down-sampler and the non-bottleneck-1D layer.
All tensors are [n, C, H, W].
"""

from typing import Literal, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_fn
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import CamForm


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the global batch, on CPU and GPU alike.

    torch's SyncBatchNorm runs on accelerators only. Without statistics over all processes,
    data-parallel training would follow another loss curve than one process does.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)  # ERFNet's eps

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.autocast(x.device.type, enabled=False):
            x32 = x.float()
            sums = torch.stack([x32.sum((0, 2, 3)), x32.square().sum((0, 2, 3))])
            mean, square = dist_fn.all_reduce(sums) / count  # type: ignore[no-untyped-call]
            var = (square - mean.square()).clamp_min(0)
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                momentum = cast(float, self.momentum)
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * (count / (count - 1)), momentum)
                self.num_batches_tracked.add_(1)
            scale = self.weight * torch.rsqrt(var + self.eps)
            shift = self.bias - mean * scale
            return cast(Tensor, x32 * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


class PositionAttention(nn.Module):
    """PAM, eqs. 3 and 4: each position attends to all others; `x + η · attention`, η = 0 at first.

    With `pool` = p > 1, keys and values are averaged over p×p positions before the product, so
    each of the H·W queries attends to H·W / p² averages:

        attention = softmax(B · mean_p(C)ᵀ) · mean_p(D)

    This is the asymmetric non-local block (Zhu et al., ICCV 2019, arXiv:1908.07678) with one
    average in the place of its pyramid; DANet's authors call it compact position attention (DRANet,
    Fu et al. 2020). p = 1 is the paper's own form.

    `mode` says how the same function is computed. `fused` is scaled_dot_product_attention,
    whose memory is linear in H·W. `plain` is the H·W × H·W matrix as written in eq. 3, which
    exports to MatMul-Softmax-MatMul. `asleep` is the identity, at no cost: η is 0 and stays so.
    """

    mode: Literal["fused", "plain", "asleep"]

    def __init__(self, channels: int, pool: int = 1) -> None:
        super().__init__()

        def projection() -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, channels, 1), BatchNorm(channels), nn.ReLU(inplace=True)
            )

        self.key, self.query, self.value = projection(), projection(), projection()  # B, C, D
        self.eta = nn.Parameter(torch.zeros(1))
        self.pool = pool
        self.mode = "fused"

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "asleep":
            return x
        n, channels, height, width = x.shape
        key, value = self.key(x), self.value(x)  # [n, C, H, W]
        if self.pool > 1:
            if height % self.pool or width % self.pool:
                raise ValueError(
                    f"keys and values of {width}×{height} positions do not divide into averages"
                    f" over {self.pool}×{self.pool}"
                )
            key, value = F.avg_pool2d(key, self.pool), F.avg_pool2d(value, self.pool)
        key, query, value = (
            y.flatten(2).transpose(1, 2) for y in (key, self.query(x), value)
        )  # queries [n, H·W, C]; keys and values [n, H·W / pool², C]
        if self.mode == "fused":
            # Unscaled, as in eq. 3. One head and contiguous rows select the fast kernel.
            out = F.scaled_dot_product_attention(
                query.contiguous()[:, None],
                key.contiguous()[:, None],
                value.contiguous()[:, None],
                scale=1.0,
            )[:, 0]
        else:
            out = (query @ key.transpose(1, 2)).softmax(-1) @ value
        out = (self.eta * out).transpose(1, 2).reshape(n, channels, height, width)
        return x + out


class ChannelAttention(nn.Module):
    """CAM, eqs. 1 and 2: every channel attends to every other; `x + γ · attention`, γ = 0 at first.

    `eq1` is softmax(A·Aᵀ) as printed; `danet` is DANet's softmax(max - A·Aᵀ). Energies sum over
    H·W positions and reach thousands, so they and the softmax are float32 under any autocast.
    """

    def __init__(self, form: CamForm) -> None:
        super().__init__()
        self.form = form
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            a = x.float().flatten(2)  # [n, C, H·W]
            energy = a @ a.transpose(1, 2)  # [n, C, C]
            if self.form == "danet":
                # This is also the softmax of max - energy, which ignores a constant added to a row.
                energy = -1.0 * energy
            out = self.gamma * (energy.softmax(-1) @ a)
        return x + out.view_as(x).to(x.dtype)


class FactorisedLayer(nn.Module):
    """The residual 1-D factorised layer of eqs. 5 and 6 (ERFNet's non-bottleneck-1D)."""

    def __init__(self, channels: int, dilation: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        d = dilation
        self.vertical = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.horizontal = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1))
        self.norm = BatchNorm(channels)
        self.dilated_vertical = nn.Conv2d(
            channels, channels, (3, 1), padding=(d, 0), dilation=(d, 1)
        )
        self.dilated_horizontal = nn.Conv2d(
            channels, channels, (1, 3), padding=(0, d), dilation=(1, d)
        )
        self.dilated_norm = BatchNorm(channels)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.vertical(x))
        out = F.relu(self.norm(self.horizontal(out)))
        out = F.relu(self.dilated_vertical(out))
        out = self.dropout(self.dilated_norm(self.dilated_horizontal(out)))
        return F.relu(out + x)


def factorised_attention(
    channels: int, cam: CamForm | None, dilation: int = 1, dropout: float = 0.0
) -> nn.Sequential:
    """Build an FCM (figure 4): a factorised layer, then CAM unless it is ablated."""
    layers: list[nn.Module] = [FactorisedLayer(channels, dilation, dropout)]
    if cam is not None:
        layers.append(ChannelAttention(cam))
    return nn.Sequential(*layers)


class DownSampler(nn.Module):
    """Halves the resolution: stride-2 convolution beside max-pool (ERFNet's), BN, ReLU, PAM."""

    def __init__(self, inputs: int, outputs: int, pam: bool, pool: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs - inputs, 3, stride=2, padding=1)
        self.norm = BatchNorm(outputs)
        self.pam = PositionAttention(outputs, pool) if pam else None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.conv(x), F.max_pool2d(x, 2)], 1)  # [n, outputs, H/2, W/2]
        x = F.relu(self.norm(x))
        return x if self.pam is None else cast(Tensor, self.pam(x))


class UpSampler(nn.Module):
    """Doubles the resolution: stride-2 deconvolution, BN, ReLU, then PAM."""

    def __init__(self, inputs: int, outputs: int, pam: bool, pool: int = 1) -> None:
        super().__init__()
        self.deconv = nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
        self.norm = BatchNorm(outputs)
        self.pam = PositionAttention(outputs, pool) if pam else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.deconv(x)))  # [n, outputs, 2H, 2W]
        return x if self.pam is None else cast(Tensor, self.pam(x))


class MultiscaleBlock(nn.Module):
    """The stem: it convolves the image at 1, 1/2, 1/4 and 1/8, and averages them at full size."""

    def __init__(self, outputs: int, cam: CamForm | None, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.scales = scales

        def branch() -> nn.Sequential:
            layers = [nn.Conv2d(3, outputs, 3, padding=1), BatchNorm(outputs), nn.ReLU()]
            if cam is not None:
                layers.append(ChannelAttention(cam))
            return nn.Sequential(*layers)

        self.branches = nn.ModuleList(branch() for _ in scales)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        maps = []
        for scale, branch in zip(self.scales, self.branches, strict=True):
            y = branch(F.avg_pool2d(x, scale) if scale > 1 else x)  # [n, outputs, H/s, W/s]
            if scale > 1:
                y = F.interpolate(y, size=size, mode="bilinear", align_corners=False)
            maps.append(y)
        return cast(Tensor, sum(maps[1:], maps[0]) / len(maps))
