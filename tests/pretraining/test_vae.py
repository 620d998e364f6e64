"""The embedded VAE: it starts as an image autoencoder in time, and each stage of its training trains what it says."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rats_video.backbones.wan_decode import decode_unclamped
from rats_video.datasets.shapes.render import split_combinations
from rats_video.datasets.video.pool import VideoPool, read_videos
from rats_video.errors import UserError
from rats_video.inference.video import write_mp4
from rats_video.pretraining.vae import (
    VaeConfig,
    build_vae,
    evaluate_psnr,
    prune_latents,
    train_vae,
    vae_loss,
)
from rats_video.pretraining.vae_clips import draw_shapes, shapes_clips, video_clips
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def fresh(vae_config: VaeConfig) -> Any:
    torch.manual_seed(0)
    return build_vae(vae_config).eval()


@pytest.fixture(scope="module")
def trained(vae_config: VaeConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, float]]:
    folder = tmp_path_factory.mktemp("vae")
    return folder, *train_vae(vae_config, torch.device("cpu"), folder)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.encode(pixels).latent_dist.mean


def moved(one: Tensor, other: Tensor) -> list[bool]:
    """Which frames differ."""
    return (one != other).transpose(1, 2).flatten(2).any(dim=2)[0].tolist()


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(1, 3, 9, 32, 32, generator=seeded(0)) * 2 - 1


def test_sizes(fresh: Any, vae_config: VaeConfig) -> None:
    assert (fresh.config.scale_factor_spatial, fresh.config.scale_factor_temporal) == (8, 4)
    assert fresh.config.z_dim == vae_config.model.latent_channels == 4


@pytest.mark.parametrize(("frame", "latent"), [(0, 0), (4, 1), (8, 2)])
def test_at_the_start_a_latent_sees_the_newest_frame_of_its_own_chunk(
    fresh: Any, pixels: Tensor, frame: int, latent: int
) -> None:
    other = pixels.clone()
    other[:, :, frame] = 0.3
    assert moved(encode(fresh, pixels), encode(fresh, other)) == [chunk == latent for chunk in range(3)]


@pytest.mark.parametrize("latent", [0, 1, 2])
def test_at_the_start_a_latent_moves_its_own_chunk_alone(fresh: Any, pixels: Tensor, latent: int) -> None:
    latents = encode(fresh, pixels)
    other = latents.clone()
    other[:, :, latent] += 1
    with torch.no_grad():
        differs = moved(decode_unclamped(fresh, latents), decode_unclamped(fresh, other))
    assert differs == [(frame + 3) // 4 == latent for frame in range(9)]


def test_what_single_frames_teach_holds_for_the_first_frame_of_clips(fresh: Any, pixels: Tensor) -> None:
    whole, first = encode(fresh, pixels), encode(fresh, pixels[:, :, :1])
    assert torch.equal(whole[:, :, :1], first)
    with torch.no_grad():
        torch.testing.assert_close(decode_unclamped(fresh, whole)[:, :, :1], decode_unclamped(fresh, first))


def test_a_still_latent_decodes_to_still_chunks(fresh: Any, pixels: Tensor) -> None:
    latents = encode(fresh, pixels[:, :, :1]).expand(-1, -1, 3, -1, -1)
    with torch.no_grad():
        decoded = decode_unclamped(fresh, latents)
    torch.testing.assert_close(decoded[:, :, 1:5], decoded[:, :, 5:9])


def test_the_posterior_is_narrow(fresh: Any, pixels: Tensor) -> None:
    posterior = fresh.encode(pixels).latent_dist
    torch.testing.assert_close(posterior.logvar, torch.full_like(posterior.logvar, -8.0))


def parts(vae: Any) -> dict[str, dict[str, Tensor]]:
    names = ("encoder", "quant_conv", "post_quant_conv", "decoder")
    return {name: getattr(vae, name).state_dict() for name in names}


def changed(one: Any, other: Any) -> dict[str, bool]:
    before, after = parts(one), parts(other)
    return {name: any(not torch.equal(v, after[name][k]) for k, v in before[name].items()) for name in before}


def test_each_stage_is_saved_and_trains_what_it_says(
    trained: tuple[Path, Any, dict[str, float]], vae_config: VaeConfig
) -> None:
    folder, vae, _ = trained
    assert sorted(path.name for path in folder.iterdir()) == ["stage-1", "stage-2"]
    from diffusers import AutoencoderKLWan

    first, second = (AutoencoderKLWan.from_pretrained(folder / f"stage-{i}") for i in (1, 2))
    torch.manual_seed(vae_config.seed)
    assert all(changed(build_vae(vae_config), first).values())
    expected = {"encoder": False, "quant_conv": False, "post_quant_conv": True, "decoder": True}
    assert changed(first, second) == expected
    assert not any(changed(second, vae).values())
    for name in ("latents_mean", "latents_std"):
        assert list(first.config[name]) == list(second.config[name]) == list(vae.config[name])


def test_latent_statistics_are_those_of_the_training_clips(
    trained: tuple[Path, Any, dict[str, float]], vae_config: VaeConfig
) -> None:

    _, vae, metrics = trained
    train, _ = split_combinations()
    videos, _ = draw_shapes(train, 32, vae_config.clip.spec, (vae_config.seed, 12345), torch.device("cpu"))
    latents = encode(vae, videos.transpose(1, 2) * 2 - 1)
    mean, std = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
    assert ((latents.mean(dim=(0, 2, 3, 4)) - mean).abs() < 0.2 * std).all()
    assert ((latents.std(dim=(0, 2, 3, 4)) / std - 1).abs() < 0.2).all()
    assert 0 < metrics["psnr_db"] < 30


def test_finished_stages_are_not_trained_again(
    trained: tuple[Path, Any, dict[str, float]], vae_config: VaeConfig, tmp_path: Path
) -> None:
    folder, vae, metrics = trained
    shutil.copytree(folder / "stage-1", tmp_path / "stage-1")
    again, measured = train_vae(vae_config, torch.device("cpu"), tmp_path)
    assert not any(changed(vae, again).values())
    assert measured == metrics
    config = json.loads((tmp_path / "stage-2" / "config.json").read_text())
    assert config["latents_std"] == pytest.approx(list(vae.config.latents_std))


def test_loss_weighs_the_object_up(fresh: Any, vae_config: VaeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = torch.full((1, 1, 3, 32, 32), 0.5)
    videos[..., 8:16, 8:16] = 1.0  # 64 of 1024 pixels
    off = 0.25  # everywhere, in [-1, 1]
    monkeypatch.setattr("rats_video.pretraining.vae.decode_unclamped", lambda *_: videos.transpose(1, 2) * 2 - 1 + off)
    loss, mse = vae_loss(fresh, videos, vae_config, vae_config.stages[0], seeded(0))
    assert mse.item() == pytest.approx(off**2 / 4)
    assert loss.item() == pytest.approx((1 + 15.0 * 64 / 1024) * (off + 4 * off**2), rel=1e-5)


def test_pruned_latents_are_the_principal_components_of_the_old_ones() -> None:
    cfg = VaeConfig.model_validate({
        "model": {"base_dim": 8, "latent_channels": 6, "patch_size": 2, "dim_mult": [1, 1, 1]},
        "clip": {"num_frames": 5, "height": 32, "width": 32},
        "stages": [{"num_frames": 1, "batch_size": 1, "steps": 1, "lr": 1.0}],
        "stats_clips": 32,
        "prune_channels": 6,
    })  # fmt: skip
    torch.manual_seed(3)
    vae = build_vae(cfg).eval()
    torch.nn.init.zeros_(vae.post_quant_conv.bias)  # zero padding stays zero only without it
    draw = shapes_clips(cfg.clip.spec, torch.device("cpu")).train
    rotated = prune_latents(vae, cfg, draw)
    pruned = prune_latents(vae, cfg.model_copy(update={"prune_channels": 2}), draw)
    pixels = draw(32, 5, (cfg.seed, 90, 0)).transpose(1, 2) * 2 - 1  # the clips that they were found on
    with torch.no_grad():
        old, new, few = (model.encode(pixels).latent_dist.mean for model in (vae, rotated, pruned))
        assert new.norm() == pytest.approx(float(old.norm()), rel=1e-4)
        torch.testing.assert_close(new[:, :2].abs(), few.abs(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(decode_unclamped(rotated, new), decode_unclamped(vae, old), rtol=1e-3, atol=1e-4)
    assert new.square().mean(dim=(0, 2, 3, 4)).diff().le(1e-6).all()  # the largest component first
    assert len(pruned.config.latents_std) == 2


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two videos of 12 frames a second: a square that moves right over a gray ground, and one that moves down."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, across in (("right", True), ("down", False)):
        frames = torch.full((36, 3, 48, 64), 0.4)
        for index, frame in enumerate(frames):
            x, y = (index, 8) if across else (8, index // 2)
            frame[:, y : y + 12, x : x + 12] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
        write_mp4(frames, folder / f"{name}.mp4", fps=12)
    return folder


def test_a_vae_learns_what_videos_look_like(
    videos: Path, vae_config: VaeConfig, trained: tuple[Path, Any, dict[str, float]], tmp_path: Path
) -> None:
    clip = vae_config.clip.model_copy(update={"fps": 12.0})
    stages = [vae_config.stages[0].model_copy(update={"steps": 40, "lr": 3e-3})]
    cfg = vae_config.model_copy(update={"videos": str(videos), "clip": clip, "stages": stages, "object_weight": 0.0})
    pools = read_videos(str(videos), cfg.clip.spec)
    assert [len(pool.clips) for pool in pools] == [2 * (36 // clip.num_frames) - 1, 1]
    before = evaluate_psnr(trained[1], cfg, video_clips(str(videos), cfg.clip.spec, torch.device("cpu")).heldout)
    first, metrics = train_vae(cfg, torch.device("cpu"), tmp_path / "one", init=copy.deepcopy(trained[1]))
    assert metrics["psnr_db"] > before + 2
    again, _ = train_vae(cfg, torch.device("cpu"), tmp_path / "two", init=copy.deepcopy(trained[1]))
    assert not any(changed(first, again).values())


def test_a_draw_is_a_piece_of_a_clip_or_its_mirror_image() -> None:
    clips = torch.arange(2 * 4 * 3 * 2 * 2, dtype=torch.uint8).view(2, 4, 3, 2, 2)
    drawn = VideoPool(clips).draw(64, 3, (5,), torch.device("cpu"))
    pieces = [piece.float() / 255 for clip in clips for piece in (clip[:3], clip[1:])]
    kinds = {
        next(i for i, piece in enumerate(pieces) if piece.equal(one) or piece.equal(one.flip(-1))) for one in drawn
    }
    assert kinds == {0, 1, 2, 3}
    assert any(one.equal(piece.flip(-1)) for one in drawn for piece in pieces)


def test_too_few_videos(videos: Path) -> None:
    (videos / "down.mp4").unlink()
    with pytest.raises(UserError, match=r"gives 1 clips of 33 frames \(give more videos\)"):
        read_videos(str(videos), ClipSpec(33, 32, 32, 12.0))


def test_images_among_videos_are_left_out(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(videos / "image.png")
    train, heldout = read_videos(str(videos), ClipSpec(33, 32, 32, 12.0))
    assert (train.clips.shape, heldout.clips.shape) == ((1, 33, 3, 32, 32), (1, 33, 3, 32, 32))
    assert capsys.readouterr().err == f"warning: {videos}: 1 images are left out: clips have 33 frames\n"
