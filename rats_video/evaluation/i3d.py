"""I3D, the network of the Frechet video distance (arXiv 1705.07750), with the names of the published checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rats_video.config.fields import Config, PositiveFloat
from rats_video.errors import UserError
from rats_video.rewards.files import check_keys, checkpoint_origin, load_checkpoint_tensors


class I3dFeaturesConfig(Config):
    """Logits of I3D on Kinetics-400 (400 numbers): the network of the published Frechet video distances."""

    kind: Literal["i3d"]
    path: str = Field("models/I3D-Kinetics400", description="rgb_imagenet.pt as `rats-video rewards convert` leaves it")
    eps: PositiveFloat | None = Field(
        None,
        exclude_if=lambda eps: eps is None,
        description="of its normalisation; null = that of the published file whose name it has",
    )


SIDE = 224  # pixels
_EPS = {"rgb_imagenet.pt": 1e-3, "i3d_pretrained_400.pt": 1e-5}
"""Of the normalisation, by file: that of pytorch-i3d, and that of videogpt, TATS and cd-FVD. Their names and shapes are
the same; at the other's eps features are 1.4% off."""
LEAST_FRAMES = 9  # the last average is over two of the frames that are left after strides of 8
_MIXED = {  # channels of the branches: 1x1; 1x1 then 3x3; 1x1 then 3x3; pool then 1x1
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
_POOLS = {  # kernel and stride, before the first block of each stage
    "Mixed_3b": ("MaxPool3d_3a_3x3", (1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ("MaxPool3d_4a_3x3", (3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ("MaxPool3d_5a_2x2", (2, 2, 2), (2, 2, 2)),
}
Size = tuple[int, int, int]


def _padded(volume: Tensor, kernel: Size, stride: Size) -> Tensor:
    """Pad with zeros as TensorFlow's "SAME": each stride has an output, an odd zero is at the end."""
    sides: list[int] = []
    for size, width, step in reversed(list(zip(volume.shape[2:], kernel, stride, strict=True))):
        total = max(width - (size % step or step), 0)
        sides += [total // 2, total - total // 2]
    return F.pad(volume, sides)


class _Pool(nn.Module):
    def __init__(self, kernel: Size, stride: Size) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, volume: Tensor) -> Tensor:
        return F.max_pool3d(_padded(volume, self.kernel, self.stride), self.kernel, self.stride)


class _Unit(nn.Module):
    def __init__(self, inputs: int, outputs: int, width: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, width, stride=stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-3)  # of pytorch-i3d
        self.kernel, self.stride = (width,) * 3, (stride,) * 3

    def forward(self, volume: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(_padded(volume, self.kernel, self.stride))))


class _Mixed(nn.Module):
    def __init__(self, inputs: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = _Unit(inputs, sizes[0])
        self.b1a, self.b1b = _Unit(inputs, sizes[1]), _Unit(sizes[1], sizes[2], 3)
        self.b2a, self.b2b = _Unit(inputs, sizes[3]), _Unit(sizes[3], sizes[4], 3)
        self.b3a, self.b3b = _Pool((3, 3, 3), (1, 1, 1)), _Unit(inputs, sizes[5])

    def forward(self, volume: Tensor) -> Tensor:
        branches = (
            self.b0(volume), self.b1b(self.b1a(volume)), self.b2b(self.b2a(volume)), self.b3b(self.b3a(volume)),
        )  # fmt: skip
        return torch.cat(branches, dim=1)


class I3D(nn.Module):
    """Clips to the logits of Kinetics-400, averaged over time: `[B, T, 3, height, width]` in [0, 1] to `[B, 400]`.

    These 400 are the features of FVD (arXiv 1812.01717). Every frame is brought to 224 x 224, bilinear, and [-1, 1], as
    in StyleGAN-V's and cd-FVD's code. github JunyaoHu/common_metrics_on_video_quality brings the short side to 224 and
    crops the centre: on frames that are not square its features differ from these by 4 to 7%.

    Args:
        classes: logits.
        slim: divides all numbers of channels; 1 is the published network, others are for tests.
    """

    def __init__(self, classes: int = 400, slim: int = 1) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            Conv3d_1a_7x7=_Unit(3, 64 // slim, 7, 2),
            MaxPool3d_2a_3x3=_Pool((1, 3, 3), (1, 2, 2)),
            Conv3d_2b_1x1=_Unit(64 // slim, 64 // slim),
            Conv3d_2c_3x3=_Unit(64 // slim, 192 // slim, 3),
        )
        channels = 192 // slim
        for name, sizes in _MIXED.items():
            if name in _POOLS:
                pool, kernel, stride = _POOLS[name]
                layers[pool] = _Pool(kernel, stride)
            slimmed = tuple(size // slim for size in sizes)
            layers[name] = _Mixed(channels, slimmed)
            channels = slimmed[0] + slimmed[2] + slimmed[4] + slimmed[5]
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._order = tuple(layers)
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(channels, classes, 1)})

    def forward(self, videos: Tensor) -> Tensor:
        """Encode; raises UserError for fewer than nine frames."""
        if videos.shape[1] < LEAST_FRAMES:
            raise UserError(
                f"I3D reads at least {LEAST_FRAMES} frames, the clips have {videos.shape[1]}",
                where="evaluation.features", fix="use another kind",
            )  # fmt: skip
        frames = F.interpolate(videos.float().flatten(0, 1), (SIDE, SIDE), mode="bilinear", align_corners=False)
        volume = (frames.unflatten(0, videos.shape[:2]) * 2 - 1).transpose(1, 2)
        for name in self._order:
            volume = self.get_submodule(name)(volume)
        logits: Tensor = self.logits["conv3d"](F.avg_pool3d(volume, (2, 7, 7), stride=1))
        return logits.mean(dim=(2, 3, 4))

    @classmethod
    def load(cls, folder: Path, device: torch.device, eps: float | None = None, *, slim: int = 1) -> I3D:
        """Load a frozen network, with the `eps` of the published file that it was converted from, unless it is given.

        Raises:
            UserError: the folder holds other weights, or was converted from a file of another name.
        """
        found = {name: tensor for name, tensor in load_checkpoint_tensors(folder).items() if not _is_count(name)}
        with torch.device("meta"):
            network = cls(slim=slim)
        wanted = {name: tensor for name, tensor in network.state_dict().items() if not _is_count(name)}
        check_keys(found, wanted, where=folder)
        network.to_empty(device="cpu").load_state_dict(found, strict=False)
        eps = eps or _published_eps(folder)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm3d):
                layer.eps = eps
        return network.requires_grad_(requires_grad=False).eval().to(device)


def _published_eps(folder: Path) -> float:
    name = checkpoint_origin(folder)
    if name not in _EPS:
        raise UserError(
            f"was converted from {name or 'a file that it does not name'}: two published I3D have the same tensors and "
            "another eps in their normalisation",
            where=str(folder),
            fix="set evaluation.features.eps: " + ", ".join(f"{value:g} for {file}" for file, value in _EPS.items()),
        )
    return _EPS[name]


def _is_count(name: str) -> bool:
    """True for a counter of training batches, which checkpoints of 2017 lack and nothing here reads."""
    return name.endswith("num_batches_tracked")
