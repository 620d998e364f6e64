"""TAEHV decoders: the published layout computed another way, and only weights that fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from rats_video.backbones.compute import DecodeConfig
from rats_video.backbones.small_decoder import SmallDecoder, load_small_decoder
from rats_video.distillation.roles import build_backbone, build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.distillation.teacher_identity import teacher_identity
from rats_video.errors import UserError
from rats_video.seeds import seeded

WIDTHS = (8, 6, 4, 4)
Weights = dict[str, Tensor]


def published(latent_channels: int = 4, patch_size: int = 1, strides: tuple[int, int, int] = (1, 2, 2)) -> Weights:
    """Random weights with the names and shapes of a published file, an encoder's among them."""
    shapes = {"decoder.1": (WIDTHS[0], latent_channels, 3), "decoder.22": (3 * patch_size**2, WIDTHS[3], 3)}
    for stage, (width, after, stride) in enumerate(zip(WIDTHS[:3], WIDTHS[1:], strides, strict=True)):
        for block in range(3):
            for layer, inputs in ((0, 2 * width), (2, width), (4, width)):
                shapes[f"decoder.{3 + 6 * stage + block}.conv.{layer}"] = (width, inputs, 3)
        shapes[f"decoder.{7 + 6 * stage}.conv"] = (width * stride, width, 1)
        shapes[f"decoder.{8 + 6 * stage}"] = (after, width, 3)
    random = seeded(1)
    weights = {
        f"{name}.weight": torch.randn(rows, inputs, size, size, generator=random) / (inputs * size * size) ** 0.5
        for name, (rows, inputs, size) in shapes.items()
    }
    without_bias = {"decoder.7.conv", "decoder.13.conv", "decoder.19.conv", "decoder.8", "decoder.14", "decoder.20"}
    biases = {name: 0.3 * torch.randn(shapes[name][0], generator=random) for name in shapes.keys() - without_bias}
    return weights | {f"{name}.bias": bias for name, bias in biases.items()} | {"encoder.0.weight": torch.zeros(2)}


def reference(weights: Weights, latents: Tensor, patch_size: int, strides: tuple[int, int, int]) -> Tensor:
    """The published computation, all frames at once, one clip: pixels `[T, 3, height, width]`, about [0, 1]."""

    def conv(name: str, frames: Tensor, padding: int = 1) -> Tensor:
        return F.conv2d(frames, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding=padding)

    hidden = F.relu(conv("decoder.1", 3 * torch.tanh(latents[0].transpose(0, 1) / 3)))
    for stage, stride in enumerate(strides):
        for block in range(3):
            name = f"decoder.{3 + 6 * stage + block}.conv"
            before = torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]])
            update = F.relu(conv(f"{name}.0", torch.cat([hidden, before], dim=1)))
            hidden = F.relu(hidden + conv(f"{name}.4", F.relu(conv(f"{name}.2", update))))
        hidden = hidden.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        grown = conv(f"decoder.{7 + 6 * stage}.conv", hidden, padding=0)
        hidden = conv(f"decoder.{8 + 6 * stage}", torch.stack(grown.chunk(stride, dim=1), dim=1).flatten(0, 1))
    total = strides[0] * strides[1] * strides[2]
    return F.pixel_shuffle(conv("decoder.22", F.relu(hidden)), patch_size)[total - 1 :]


def load(folder: Path, channels: int = 4, spatial: int = 8, temporal: int = 4) -> SmallDecoder:
    return load_small_decoder(
        folder, latent_channels=channels, spatial_stride=spatial, temporal_stride=temporal, where="compute.decode.small"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(published(), tmp_path / "taew2_1.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("channels", "patch", "strides", "temporal"), [(4, 1, (1, 2, 2), 4), (5, 2, (1, 2, 2), 4), (6, 4, (2, 2, 2), 8)]
)
def test_decodes_as_published(
    tmp_path: Path, channels: int, patch: int, strides: tuple[int, int, int], temporal: int
) -> None:
    weights = published(channels, patch, strides)
    save_file(weights, tmp_path / "taehv.safetensors")
    decoder = load(tmp_path, channels, 8 * patch, temporal)
    latents = torch.randn(1, channels, 3, 2, 3, generator=seeded(2))
    ours = decoder(latents)
    assert ours.shape == (1, 3, 2 * temporal + 1, 16 * patch, 24 * patch)
    theirs = reference(weights, latents, patch, strides).transpose(0, 1)[None]
    torch.testing.assert_close(ours, theirs * 2 - 1, atol=1e-5, rtol=0)
    assert ours.std() > 0.05


def test_half_precision_files_with_unused_frames(tmp_path: Path) -> None:
    weights = published(strides=(2, 2, 2))  # the first stage was trained to double frames as well
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "a.safetensors")
    decoder = load(tmp_path)
    assert {weight.dtype for weight in decoder.parameters()} == {torch.float32}
    assert not any(weight.requires_grad for weight in decoder.parameters())
    kept = {name: tensor.half().float() for name, tensor in weights.items()}
    kept["decoder.7.conv.weight"] = kept["decoder.7.conv.weight"][8:]  # the last frame of two
    latents = torch.randn(1, 4, 2, 2, 2, generator=seeded(3))
    theirs = reference(kept, latents, 1, (1, 2, 2)).transpose(0, 1)[None]
    torch.testing.assert_close(decoder(latents), theirs * 2 - 1, atol=1e-5, rtol=0)


def test_windows_and_checkpoints_work_on_it(folder: Path) -> None:
    decoder = load(folder)
    latents = torch.randn(2, 4, 4, 2, 2, generator=seeded(4)).requires_grad_()
    plain = decoder(latents)
    (expected,) = torch.autograd.grad(plain.sum(), latents, retain_graph=True)
    assert expected.abs().amin(dim=(0, 1, 3, 4)).min() > 0
    again = decoder(latents, DecodeConfig(checkpoint=True, offload=True))
    assert torch.equal(again, plain)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), latents)[0], expected, atol=1e-6, rtol=1e-6)
    window = decoder(latents, DecodeConfig(checkpoint=True), range(1, 3))
    assert torch.equal(window, plain)
    (reached,) = torch.autograd.grad(window.sum(), latents)
    (inside,) = torch.autograd.grad(plain[:, :, 1:9].sum(), latents)
    torch.testing.assert_close(reached[:, :, 1:3], inside[:, :, 1:3], atol=1e-6, rtol=1e-6)
    assert not reached[:, :, [0, 3]].any()


def change(weights: Weights, **changes: Tensor | None) -> Weights:
    changed = weights | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (published(5), r"a\.safetensors decodes 5 latent channels by 8, the model has 4 by 8 \(take the decoder of"),
        (published(4, 2), "decodes 4 latent channels by 16, the model has 4 by 8"),
        (
            change(published(), decoder__4__conv__2__bias=None),
            r"no TAEHV decoder: decoder\.4\.conv\.2\.bias is missing",
        ),
        (change(published(), decoder__23__weight=torch.zeros(1)), r"decoder\.23\.weight is unexpected"),
        (change(published(), decoder__13__conv__weight=torch.zeros(6, 6, 1, 1)), r"\[6, 6, 1, 1\] .* \[12, 6, 1, 1\]"),
        (change(published(), decoder__14__weight=None), r"it has no convolution decoder\.14\.weight"),
        (change(published(), decoder__1__weight=torch.zeros(3)), r"it has no convolution decoder\.1\.weight"),
        ({"conv.weight": torch.zeros(1)}, r"it has no convolution decoder\.1\.weight"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, weights: Weights, message: str) -> None:
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"^compute.decode.small: .*{message}") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_one_safetensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        load(tmp_path)
    torch.save({"decoder.1.weight": torch.ones(2)}, tmp_path / "taew2_1.pth")
    with pytest.raises(UserError, match=r"taew2_1\.pth is a pickle.*weights_only=True") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    command = str(caught.value).split('python -c "')[1].split('")')[0]
    exec(command)  # the advice works
    with pytest.raises(UserError, match="no convolution"):
        load(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"2 \.safetensors files"):
        load(tmp_path)
    (tmp_path / "taew2_1.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*b\.safetensors"):
        load(tmp_path)


def test_training_scores_what_it_decodes(folder: Path, make_config: Callable[..., DistillConfig]) -> None:
    cfg = make_config(f"compute.decode.small={folder}", "teacher.kind=ema")
    base = build_backbone(cfg, torch.device("cpu"))
    latents = (3 * torch.randn(1, 4, 2, 4, 4, generator=seeded(5))).requires_grad_()
    expected = (load(folder)(latents).transpose(1, 2) + 1) / 2
    assert expected.min() < 0
    for role in (base, *build_roles(cfg, base)):  # student and teacher are compared: they share the decoder
        assert role.small_decoder is base.small_decoder
        torch.testing.assert_close(role.decode(latents), expected.clamp(0, 1))
    (grad,) = torch.autograd.grad(base.decode(latents, range(1, 2)).sum(), latents)
    assert grad.abs().amax(dim=(0, 1, 3, 4)).gt(0).tolist() == [False, True]
    assert build_backbone(make_config(), torch.device("cpu")).small_decoder is None


def test_stored_rollouts_depend_on_it(folder: Path, make_config: Callable[..., DistillConfig]) -> None:
    plain, small = make_config(), make_config(f"compute.decode.small={folder}")
    one, other = (teacher_identity(cfg, cfg.teacher)["weights"] for cfg in (plain, small))
    assert one != other
