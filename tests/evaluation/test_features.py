"""The networks in which sets of clips are compared: what the offline one sees, and the published ones' shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rats_video.assets import ASSETS
from rats_video.datasets.shapes.render import SHAPES_CLIP, parse_prompt, render, split_combinations
from rats_video.errors import UserError
from rats_video.evaluation.features import Dino, VideoMae, WordFeatures, pixel_features
from rats_video.evaluation.i3d import I3D
from rats_video.evaluation.sets import Reference, distances
from rats_video.evaluation.stats import Estimate
from rats_video.rewards.convert import convert_checkpoint
from rats_video.rewards.word import WordReward
from rats_video.seeds import seeded

pytestmark = pytest.mark.pipeline

CPU = torch.device("cpu")
PROMPTS = tuple(attributes.prompt for attributes in split_combinations()[1])


def rendered(prompts: tuple[str, ...], seed: int) -> Tensor:
    return render([parse_prompt(prompt) for prompt in prompts], SHAPES_CLIP, seeded(seed))


@pytest.fixture(scope="module")
def shapes() -> WordFeatures:
    return WordFeatures(WordReward.load(ASSETS / "shapes-reward-heldout", CPU))


@pytest.fixture(scope="module")
def real(shapes: WordFeatures) -> Reference:
    return Reference(torch.cat([shapes(rendered(PROMPTS, seed)) for seed in (1, 2)]), PROMPTS * 2, "rendered")


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return rendered(PROMPTS, 9)


@pytest.fixture(scope="module")
def undamaged(shapes: WordFeatures, clips: Tensor, real: Reference) -> dict[str, Estimate]:
    return distances(shapes(clips), PROMPTS, real)


def noisy(clips: Tensor, strength: float) -> Tensor:
    return (clips + strength * torch.randn(clips.shape, generator=seeded(5))).clamp(0, 1)


def blurred(clips: Tensor, factor: float) -> Tensor:
    small = F.interpolate(clips.flatten(0, 1), scale_factor=1 / factor, mode="area")
    return F.interpolate(small, size=clips.shape[-2:], mode="bilinear").view_as(clips)


def frozen(clips: Tensor, last: float) -> Tensor:
    """The last so many frames repeat the one before them."""
    frames = clips.shape[1]
    return clips[:, torch.arange(frames).clamp(max=frames - 1 - int(last))]


def shuffled(clips: Tensor, reach: float) -> Tensor:
    """Frames change places with others, up to about `reach` away."""
    batch, frames = clips.shape[:2]
    order = (torch.arange(frames) + reach * torch.rand(batch, frames, generator=seeded(6))).argsort(dim=1)
    return clips[torch.arange(batch)[:, None], order]


def faded(clips: Tensor, share: float) -> Tensor:
    return clips.lerp(clips.mean(dim=2, keepdim=True).expand_as(clips), share)


def recoloured(clips: Tensor, share: float) -> Tensor:
    """Red towards green towards blue towards red."""
    return clips.lerp(clips.roll(1, dims=2), share)


def flickering(clips: Tensor, strength: float) -> Tensor:
    gain = torch.randn(*clips.shape[:2], 1, 1, 1, generator=seeded(7))
    return (clips + strength * gain).clamp(0, 1)


@pytest.mark.parametrize(
    ("corruption", "strengths"),
    [
        (noisy, (0.05, 0.1, 0.2)),
        (blurred, (3, 5, 9)),
        (frozen, (6, 11, 16)),
        (shuffled, (4, 8, 64)),
        (faded, (0.3, 0.6, 1.0)),
        (recoloured, (0.15, 0.3, 0.5)),
        (flickering, (0.05, 0.1, 0.2)),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_both_distances_rise_with_every_corruption(
    corruption: Callable[[Tensor, float], Tensor], strengths: tuple[float, ...], shapes: WordFeatures,
    real: Reference, clips: Tensor, undamaged: dict[str, Estimate],
) -> None:  # fmt: skip
    looks = [shapes(corruption(clips, strength)) for strength in strengths]
    found = [undamaged, *(distances(features, PROMPTS, real) for features in looks)]
    for name in ("fvd", "kvd"):
        means = [each[name].mean for each in found]
        assert means == sorted(means), name
        assert means[1] > 1.3 * means[0], name
        assert means[-1] > 10 * max(means[0], 1e-3), name


def test_the_clips_own_distribution_is_near(undamaged: dict[str, Estimate]) -> None:
    assert 0 < undamaged["fvd"].mean < 0.02
    assert abs(undamaged["kvd"].mean) < 2 * undamaged["kvd"].ci95


def test_time_reversed_is_seen_where_it_is_no_real_clip(shapes: WordFeatures) -> None:
    left = tuple(prompt for prompt in PROMPTS if "left" in prompt)
    real = Reference(shapes(rendered(left * 3, 1)), left * 3, "left")
    ours, reverse = rendered(left, 2), rendered(left, 2).flip(1)
    forward, backward = (distances(shapes(clips), left, real) for clips in (ours, reverse))
    assert backward["kvd"].mean - backward["kvd"].ci95 > forward["kvd"].mean + forward["kvd"].ci95
    assert backward["fvd"].mean > 5 * forward["fvd"].mean


def test_pixel_features_are_root_mean_square_apart() -> None:
    videos = torch.stack([torch.full((9, 3, 20, 24), 0.2), torch.full((9, 3, 20, 24), 0.7)])
    a, b = pixel_features(videos)
    assert float((a - b).norm()) == pytest.approx(0.5, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- I3D


def test_i3d_has_the_published_parameters() -> None:
    """12.7 M weights (of which 400 x 1025 the logits), under the names of pytorch-i3d's rgb_imagenet.pt."""
    with torch.device("meta"):
        network = I3D()
    counts = {name: weight.numel() for name, weight in network.named_parameters()}
    assert sum(counts.values()) == 12_697_264
    assert counts["logits.conv3d.weight"] + counts["logits.conv3d.bias"] == 400 * 1025
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes["Conv3d_1a_7x7.conv3d.weight"] == [64, 3, 7, 7, 7]
    assert shapes["Mixed_3b.b1b.conv3d.weight"] == [128, 96, 3, 3, 3]
    assert shapes["Mixed_4f.b2a.bn.running_var"] == [32]
    assert shapes["Mixed_5c.b3b.conv3d.weight"] == [128, 832, 1, 1, 1]
    assert shapes["logits.conv3d.weight"] == [400, 1024, 1, 1, 1]
    assert len([name for name in shapes if not name.endswith("tracked")]) == 57 * 5 + 2


@pytest.fixture(scope="module")
def i3d_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slim I3D as torch.save leaves it, converted as a user would."""
    folder = tmp_path_factory.mktemp("i3d")
    torch.manual_seed(0)
    state = {name: tensor for name, tensor in I3D(slim=16).state_dict().items() if not name.endswith("tracked")}
    torch.save(state, folder / "rgb_imagenet.pt")
    convert_checkpoint(folder / "rgb_imagenet.pt", folder / "converted")
    return folder / "converted"


def test_i3d_loads_and_encodes(i3d_folder: Path) -> None:
    network = I3D.load(i3d_folder, CPU, slim=16)
    videos = torch.rand(2, 17, 3, 32, 48, generator=seeded(0))
    with torch.no_grad():
        features = network(videos)
        assert features.shape == (2, 400)
        torch.testing.assert_close(network(videos[1:]), features[1:], rtol=1e-4, atol=1e-5)
        assert not torch.equal(network(videos.flip(1)), features)  # the order of frames counts
        large = F.interpolate(videos.flatten(0, 1), (224, 224), mode="bilinear").unflatten(0, (2, 17))
        torch.testing.assert_close(network(large), features, rtol=1e-4, atol=1e-5)
    assert not network.training
    with pytest.raises(UserError, match="at least 9 frames, the clips have 8"):
        network(videos[:, :8])


def test_i3d_pads_as_tensorflow_does() -> None:
    """With one of two zeros more at the end: the first output of a stride of 2 sees inputs -2 .. 4 of 8."""
    unit = I3D(slim=16).eval().get_submodule("Conv3d_1a_7x7")
    with torch.no_grad():
        for weight in unit.parameters():
            weight.fill_(1.0)
        ones = torch.ones(1, 3, 8, 8, 8)
        found = unit(ones)
    seen = torch.tensor([5.0, 7.0, 6.0, 4.0])  # inputs -2..4, 0..6, 2..8, 4..10
    wanted = 3 * seen[:, None, None] * seen[None, :, None] * seen / (1 + 1e-3) ** 0.5 + 1
    torch.testing.assert_close(found[0, 0], wanted)


def test_i3d_of_videogpt_keeps_its_own_eps(i3d_folder: Path, tmp_path: Path) -> None:
    """1e-3 in github piergiaj/pytorch-i3d 05783d1; under the same names 1e-5 in songweige/content-debiased-fvd a1e037a
    and in fvd/videogpt of JunyaoHu/common_metrics_on_video_quality 5f75173."""
    torch.save(load_file(i3d_folder / "model.safetensors"), tmp_path / "i3d_pretrained_400.pt")
    convert_checkpoint(tmp_path / "i3d_pretrained_400.pt", tmp_path / "videogpt")
    videogpt, ours = I3D.load(tmp_path / "videogpt", CPU, slim=16), I3D.load(i3d_folder, CPU, slim=16)
    for network, eps in ((videogpt, 1e-5), (ours, 1e-3)):
        assert {layer.eps for layer in network.modules() if isinstance(layer, nn.BatchNorm3d)} == {eps}
    unit, volume = videogpt.get_submodule("Conv3d_2b_1x1"), torch.rand(1, 4, 2, 3, 3, generator=seeded(1))
    with torch.no_grad():
        wanted = torch.relu(unit.conv3d(volume)) / (1 + 1e-5) ** 0.5  # mean 0 and variance 1, as before training
        torch.testing.assert_close(unit(volume), wanted)


def test_i3d_of_another_name_needs_its_eps(i3d_folder: Path, tmp_path: Path) -> None:
    """Both published files hold the same names and shapes: neither tensor nor count tells them apart."""
    for name, said in (("fvd.pt", "fvd.pt"), ("model.safetensors", "a file that it does not name")):
        weights = load_file(i3d_folder / "model.safetensors")
        folder = tmp_path / name.replace(".", "-")
        if name.endswith(".pt"):
            torch.save(weights, tmp_path / name)
            convert_checkpoint(tmp_path / name, folder)
        else:
            folder.mkdir()
            save_file(weights, folder / name)
        with pytest.raises(UserError) as caught:
            I3D.load(folder, CPU, slim=16)
        assert str(caught.value) == (
            f"{folder}: was converted from {said}: two published I3D have the same tensors and another eps in their "
            "normalisation (set evaluation.features.eps: 0.001 for rgb_imagenet.pt, 1e-05 for i3d_pretrained_400.pt)"
        )
        network = I3D.load(folder, CPU, 2e-5, slim=16)
        assert {layer.eps for layer in network.modules() if isinstance(layer, nn.BatchNorm3d)} == {2e-5}


def test_i3d_refuses_other_weights(i3d_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bn.bias is \[4\], must be \[64\]"):
        I3D.load(i3d_folder, CPU)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lacks"):
        I3D.load(tmp_path, CPU)


# -------------------------------------------------------------------------------------------------------- VideoMAE


@pytest.fixture(scope="module")
def videomae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=1,
        decoder_intermediate_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("videomae")
    VideoMAEForPreTraining(config).save_pretrained(folder)
    return folder


def test_videomae_loads_from_a_hub_folder_and_encodes(videomae_folder: Path) -> None:
    network = VideoMae.load(videomae_folder, CPU)
    videos = torch.rand(3, 7, 3, 32, 32, generator=seeded(0))
    with torch.no_grad():
        features = network(videos)
        assert features.shape == (3, 16)
        shown = videos[:, [0, 2, 4, 6]]
        torch.testing.assert_close(network(shown), features)  # 4 of 7 frames, spread evenly
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = (shown - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(network.model(pixels).last_hidden_state.mean(1), features)


def test_videomae_refuses_another_model(reward_folders: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="not a VideoMAEModel"):
        VideoMae.load(reward_folders[0], CPU)


# ---------------------------------------------------------------------------------------------------------- DINOv2


def test_dino_gives_the_class_token_of_each_frame(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    size = {"image_size": 28, "patch_size": 14, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**size, mlp_ratio=1)).save_pretrained(tmp_path)
    network = Dino.load(tmp_path, CPU)
    videos = torch.rand(2, 2, 3, 224, 224, generator=seeded(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (videos - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = network.model(pixels.flatten(0, 1)).pooler_output.unflatten(0, (2, 2)).mean(1)
        torch.testing.assert_close(network(videos), expected)
        torch.testing.assert_close(network(videos[:, :1]), network.model(pixels[:, 0]).pooler_output)
    with pytest.raises(UserError, match="not a VideoMAEModel"):
        VideoMae.load(tmp_path, CPU)
