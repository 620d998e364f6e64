"""The two aesthetic predictors: encoder and pixels against transformers' own, the head by hand, folders refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from published import pil_squares
from safetensors.torch import load_file, save_file
from tiny_clip import save_clip, save_siglip
from torch import Tensor, nn

from rats_video.assets import PICKLED
from rats_video.distillation.settings import DistillConfig
from rats_video.distillation.teacher_identity import teacher_identity
from rats_video.errors import UserError
from rats_video.methods.teacher import FrozenTeacherConfig
from rats_video.planning.memory_tracker import no_workspace
from rats_video.planning.trace import trace_reward
from rats_video.rewards.aesthetic import AestheticConfig, AestheticReward, AestheticV25Config, siglip_pixels
from rats_video.rewards.pixels import CLIP_MEAN, CLIP_STD
from rats_video.rewards.reward import build_reward, reward_folders, reward_on_meta
from rats_video.seeds import seeded

pytestmark = pytest.mark.pipeline

PROMPTS = ["a red dog runs", "two blue birds"]
SIZE = 32
CPU = torch.device("cpu")
V2_KEYS = [f"layers.{i}" for i in (0, 2, 4, 6, 7)]
V25_KEYS = [f"scoring_head.{i}" for i in (0, 2, 4, 6, 8)]


class Published(NamedTuple):
    kind: str
    path: Path
    head: Path


def save_head(folder: Path, keys: list[str], width: int) -> None:
    """Random layers of the published widths under the published names."""
    widths = (width, 1024, 128, 64, 16, 1)
    torch.manual_seed(3)
    tensors = {}
    for key, inputs, outputs in zip(keys, widths, widths[1:], strict=False):
        tensors[f"{key}.weight"] = torch.randn(outputs, inputs) / inputs**0.5 * 1.5
        tensors[f"{key}.bias"] = torch.randn(outputs)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Published:
    root = tmp_path_factory.mktemp("v2")
    save_clip(root / "clip", SIZE, 20)
    save_head(root / "head", V2_KEYS, 8)
    return Published("aesthetic", root / "clip", root / "head")


@pytest.fixture(scope="module")
def v25(tmp_path_factory: pytest.TempPathFactory) -> Published:
    root = tmp_path_factory.mktemp("v25")
    save_siglip(root / "siglip", SIZE)
    save_head(root / "head", V25_KEYS, 16)
    return Published("aesthetic_v25", root / "siglip", root / "head")


@pytest.fixture(params=["v2", "v25"])
def published(request: pytest.FixtureRequest) -> Published:
    found: Published = request.getfixturevalue(request.param)
    return found


def config(published: Published, **options: Any) -> AestheticConfig | AestheticV25Config:
    kind = AestheticConfig if published.kind == "aesthetic" else AestheticV25Config
    return kind(kind=published.kind, path=str(published.path), head=str(published.head), **options)  # type: ignore[arg-type]


def load(published: Published, **options: Any) -> AestheticReward:
    reward = build_reward(config(published, **options), CPU, where="reward")
    assert isinstance(reward, AestheticReward)
    return reward


def videos_of(height: int, width: int) -> Tensor:
    """Two smooth clips of three frames, in whole steps of 1/255, as PIL has them."""
    coarse = torch.rand(6, 3, 5, 6, generator=seeded(1)) * 0.8 + 0.1
    frames = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return ((frames * 255).round() / 255).unflatten(0, (2, 3))


def by_hand(folder: Path, features: Tensor) -> Tensor:
    """Unit features through the layers in the order of their numbers, with nothing between them."""
    tensors = load_file(folder / "model.safetensors")
    rows = (features / features.norm(dim=1, keepdim=True)).double().numpy()
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        rows = rows @ tensors[f"{name}.weight"].double().numpy().T + tensors[f"{name}.bias"].double().numpy()
    return torch.from_numpy(rows[:, 0]).float()


@pytest.mark.parametrize(("height", "width"), [(64, 96), (90, 50), (20, 27)])
def test_v2_is_the_head_on_clips_own_features(v2: Published, height: int, width: int) -> None:
    from transformers import CLIPModel

    videos = videos_of(height, width)
    pixels = pil_squares(videos.flatten(0, 1), SIZE, CLIP_MEAN, CLIP_STD)
    with torch.no_grad():
        seen = CLIPModel.from_pretrained(v2.path).get_image_features(pixel_values=pixels)
        expected = by_hand(v2.head, seen.pooler_output).unflatten(0, (2, 3))
        ours = load(v2)(videos, PROMPTS)
    assert ours.frames is not None
    assert expected.std() > 0.1  # else anything would pass
    torch.testing.assert_close(ours.frames, expected, atol=0.03, rtol=0)  # PIL rounds to whole steps twice
    torch.testing.assert_close(ours.clip, ours.frames.mean(dim=1))


@pytest.mark.parametrize(("height", "width"), [(64, 96), (90, 50), (20, 27)])
def test_v25_is_the_head_on_siglips_own_features(v25: Published, height: int, width: int) -> None:
    from PIL import Image
    from transformers import SiglipVisionModel

    videos = videos_of(height, width)
    frames = videos.flatten(0, 1)
    images = [Image.fromarray((f * 255).round().byte().permute(1, 2, 0).numpy()) for f in frames]
    squares = [np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for image in images]
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(siglip_pixels(frames, SIZE), pixels, atol=0.016, rtol=0)  # two steps of 1/255
    encoder = SiglipVisionModel.from_pretrained(v25.path)
    with torch.no_grad():
        expected = by_hand(v25.head, encoder(pixel_values=siglip_pixels(frames, SIZE)).pooler_output)
        rounded = by_hand(v25.head, encoder(pixel_values=pixels).pooler_output)
        ours = load(v25)(videos, PROMPTS)
    assert ours.frames is not None
    assert expected.std() > 1
    torch.testing.assert_close(ours.frames.flatten(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.frames.flatten(), rounded, atol=0.1, rtol=0)


def test_siglips_pixels_are_those_of_its_processor() -> None:
    from PIL import Image
    from transformers import SiglipImageProcessorPil

    frames = videos_of(64, 96).flatten(0, 1)
    images = [Image.fromarray((f * 255).round().byte().permute(1, 2, 0).numpy()) for f in frames]
    processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, resample=Image.Resampling.BICUBIC)
    pixels = processor(images, return_tensors="pt").pixel_values
    torch.testing.assert_close(siglip_pixels(frames, SIZE), pixels, atol=0.016, rtol=0)


def test_prompts_are_not_read_and_clips_do_not_touch(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    reward, videos = load(published), videos_of(40, 48)
    with torch.no_grad():
        one = reward(videos, PROMPTS)
        other = reward(videos.flip(0), ["", "a very long prompt " * 50])
    torch.testing.assert_close(one.clip, other.clip.flip(0), atol=1e-4, rtol=0)
    assert capsys.readouterr().err == ""


def test_gradient_reaches_every_frame_in_chunks_as_in_one(published: Published) -> None:
    videos = torch.rand(2, 5, 3, 40, 48, generator=seeded(2)).requires_grad_()
    gradients = [
        torch.autograd.grad(load(published, chunk=chunk)(videos, PROMPTS).clip.sum(), videos)[0] for chunk in (3, 100)
    ]
    scale = gradients[1].abs().max().item()
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4 * scale, rtol=1e-3)
    assert (gradients[0].abs().amax(dim=(2, 3, 4)) > 1e-5).all()


def test_gradient_is_that_of_finite_differences(published: Published) -> None:
    reward = load(published)
    videos = torch.rand(1, 2, 3, 40, 40, generator=seeded(3)) * 0.5 + 0.25
    direction = torch.randn(videos.shape, generator=seeded(4))
    (gradient,) = torch.autograd.grad(reward(videos.requires_grad_(), PROMPTS[:1]).clip.sum(), videos)
    with torch.no_grad():
        above, below = (reward(videos + step * direction, PROMPTS[:1]).clip for step in (1e-3, -1e-3))
    assert (gradient * direction).sum().item() == pytest.approx(((above - below) / 2e-3).item(), rel=0.02, abs=2e-3)


def test_only_the_images_half_is_kept_frozen_and_the_head_in_float32(published: Published) -> None:
    reward = load(published, dtype="bfloat16")
    assert {weight.dtype for weight in reward.model.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in reward.head.parameters()} == {torch.float32}
    assert not any(weight.requires_grad for weight in reward.parameters())
    assert not any("text_model" in name for name, _ in reward.named_parameters())
    videos = videos_of(32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            reward(videos, PROMPTS).clip, load(published)(videos, PROMPTS).clip, atol=0.2, rtol=0
        )


def changed(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(head: Path) -> None:
        tensors = load_file(head / "model.safetensors")
        change(tensors)
        save_file(tensors, head / "model.safetensors")

    return apply


def _without_model(head: Path) -> None:
    (head / "model.safetensors").rename(head / "sac+logos+ava1-l14-linearMSE.pth")


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (changed(lambda tensors: tensors.pop("layers.2.bias")), "lacks 1 of 10 tensors, the first is layers.2.bias"),
        (
            changed(lambda tensors: tensors.update({"layers.8.bias": tensors.pop("layers.7.bias")})),
            "lacks 1 of 10 tensors, the first is layers.7.bias",
        ),
        (
            changed(lambda tensors: tensors.update({"layers.1.weight": torch.ones(1)})),
            "holds 1 tensors too many, the first is layers.1.weight",
        ),
        (lambda head: save_head(head, V2_KEYS, 768), "layers.0.weight is [1024, 768], must be [1024, 8]"),
        (lambda head: save_head(head, V25_KEYS, 8), "lacks 10 of 10 tensors, the first is layers.0.bias"),
        (
            _without_model,
            "only has pickled weights, which can run code when they are loaded (rats-video rewards convert",
        ),
        (lambda head: (head / "model.safetensors").unlink(), "no safetensors file in it"),
        (lambda head: (head / "model.safetensors").write_bytes(b"{}"), "model.safetensors: cannot be read: "),
    ],
)
def test_damaged_head_is_one_line(v2: Published, tmp_path: Path, damage: Callable[[Path], object], line: str) -> None:
    head = Path(shutil.copytree(v2.head, tmp_path / "head"))
    damage(head)
    with pytest.raises(UserError) as caught:
        load(v2._replace(head=head))
    assert line in str(caught.value)
    assert str(caught.value).startswith(str(head))
    assert len(str(caught.value).splitlines()) == 1


def test_the_other_encoder_is_refused(v2: Published, v25: Published) -> None:
    with pytest.raises(UserError, match=r"is a 'siglip' model, not a CLIPModel \(model_type 'clip'\)$"):
        load(v2._replace(path=v25.path))
    with pytest.raises(UserError, match=r"is a 'clip' model, not a SiglipModel \(model_type 'siglip'\)$"):
        load(v25._replace(path=v2.path))


def test_missing_folders_name_their_key_and_download(v2: Published) -> None:
    cfg = AestheticConfig(kind="aesthetic", path=str(v2.path))
    with pytest.raises(UserError) as caught:
        build_reward(cfg, CPU, where="reward")
    url, file = PICKLED["aesthetic-v2"], "sac%2Blogos%2Bava1-l14-linearMSE.pth"
    fix = f"curl -LO {url} && rats-video rewards convert {file} models/aesthetic-v2"
    assert str(caught.value) == f"reward.head: no such folder: models/aesthetic-v2 ({fix})"
    assert url.endswith(f"/{file}")
    siglip = "google/siglip-so400m-patch14-384"
    with pytest.raises(UserError, match=rf"^reward\.path: .* \(3.6 GB: hf download {siglip} --local-dir models/"):
        build_reward(AestheticV25Config(kind="aesthetic_v25"), CPU, where="reward")


def test_both_folders_decide_the_scores(published: Published) -> None:
    assert reward_folders(config(published), where="reward") == [published.path, published.head]


def test_a_cached_teacher_knows_which_head_scored_it(
    published: Published, make_config: Callable[..., DistillConfig], tmp_path: Path
) -> None:
    head = Path(shutil.copytree(published.head, tmp_path / "head"))
    reward = f"{{kind: {published.kind}, path: {published.path}, head: {head}}}"
    cfg = make_config(f"reward={reward}", "teacher.cache=guides")
    assert isinstance(cfg.teacher, FrozenTeacherConfig)
    before = teacher_identity(cfg, cfg.teacher)
    assert before["reward"] == {"kind": published.kind, "frames": None, "dtype": "float32"}
    changed(lambda tensors: next(iter(tensors.values())).add_(1))(head)
    assert teacher_identity(cfg, cfg.teacher)["weights"] != before["weights"]


def test_plan_counts_the_folders_own_network(published: Published) -> None:
    planned, real = reward_on_meta(config(published), where="reward"), load(published)
    assert isinstance(planned, AestheticReward)
    assert {name: weight.shape for name, weight in planned.named_parameters()} == {
        name: weight.shape for name, weight in real.named_parameters()
    }
    videos = torch.empty(2, 5, 3, 40, 48, device="meta")
    counted = trace_reward(planned, videos, PROMPTS, with_gradient=True, workspace=no_workspace)
    assert counted["reward backward", "flops"] > counted["teacher reward", "flops"] > 0


@pytest.mark.parametrize(
    ("cfg", "millions"),
    [
        (AestheticConfig(kind="aesthetic", path="/not/here"), 304.56),  # CLIP ViT-L/14's images and its projections
        (AestheticV25Config(kind="aesthetic_v25", path="/not/here"), 428.23),  # SigLIP so400m's images
    ],
)
def test_encoders_that_are_not_there_yet_are_the_usual_ones(
    cfg: AestheticConfig | AestheticV25Config, millions: float, capfd: pytest.CaptureFixture[str]
) -> None:
    reward = reward_on_meta(cfg, where="reward")
    assert isinstance(reward, AestheticReward)
    assert sum(weight.numel() for weight in reward.model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert "".join(capfd.readouterr()) == ""
