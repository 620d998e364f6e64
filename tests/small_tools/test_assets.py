"""What ships with the package is what the README says it is."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from rats_video.assets import ASSETS, resolve_folder
from rats_video.backbones.wan import WanBackbone
from rats_video.datasets.shapes.measure import measure_shapes, read_words
from rats_video.datasets.shapes.render import (
    ATTRIBUTES,
    SHAPES_CLIP,
    ShapeAttributes,
    render,
    split_combinations,
)
from rats_video.distillation.run_rewards import latent_space
from rats_video.errors import UserError
from rats_video.inference.sampler import SamplerSpec, sample_videos
from rats_video.inference.student import load_card
from rats_video.pretraining.ranks import rank_correlation
from rats_video.rewards.latent import LatentReward
from rats_video.rewards.reward import RewardConfig
from rats_video.rewards.word import WordReward, WordRewardConfig
from rats_video.seeds import seeded

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def backbone() -> WanBackbone:
    return WanBackbone.from_pretrained(ASSETS / "tiny-wan")


def test_all_weights_are_safetensors_and_at_most_24_mb() -> None:
    weights = [path for path in ASSETS.rglob("*") if path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}]
    assert {path.suffix for path in weights} == {".safetensors"}
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 24 * 10**6


@pytest.mark.parametrize(
    "folder",
    ["tiny-wan", "tiny-wan/vae", "shapes-reward", "shapes-reward-heldout", "shapes-latent-reward", "tiny-wan-student"],
)
def test_training_is_recorded_beside_the_weights(folder: str) -> None:
    record = json.loads((ASSETS / folder / "training.json").read_text())
    assert record["seconds"] > 0
    assert record["seed"] == record["config"]["seed"]
    assert record["metrics"]


def test_vae_round_trip_keeps_at_least_28_db_and_the_words(backbone: WanBackbone) -> None:
    _, heldout = split_combinations()
    videos = render(heldout, SHAPES_CLIP, seeded(77))
    with torch.no_grad():
        decoded = torch.cat([backbone.decode(backbone.encode(part)) for part in videos.split(16)])
    psnr = -10 * (decoded - videos).square().mean(dim=(1, 2, 3, 4)).log10()
    assert psnr.mean() >= 28
    assert measure_shapes(decoded, [a.prompt for a in heldout]).adherence.mean() >= 0.95


def test_teacher_shows_every_word_and_can_be_surpassed() -> None:
    metrics = json.loads((ASSETS / "tiny-wan" / "training.json").read_text())["metrics"]
    for name in ATTRIBUTES:
        assert metrics[f"{name}_50_steps"] >= 0.88, name
        assert metrics[f"{name}_first_frame_given"] >= 0.95, name
    assert metrics["adherence_50_steps"] <= 0.98
    assert metrics["adherence_4_steps"] < metrics["adherence_50_steps"] - 0.02


def test_plain_diffusers_goes_on_from_a_first_frame() -> None:
    from diffusers import WanImageToVideoPipeline

    shown = ShapeAttributes("fast", "red", "circle", "left", "gray")
    clip = render([shown], SHAPES_CLIP, seeded(3))
    first = Image.fromarray((clip[0, 0] * 255).round().byte().permute(1, 2, 0).numpy())
    pipeline = WanImageToVideoPipeline.from_pretrained(ASSETS / "tiny-wan")
    pipeline.set_progress_bar_config(disable=True)
    (frames,) = pipeline(
        image=first, prompt=shown.prompt, height=64, width=64, num_frames=17,
        num_inference_steps=8, guidance_scale=2.0, output_type="pt", generator=seeded(0),
    ).frames  # fmt: skip
    assert (frames[0] - clip[0, 0]).square().mean() < 0.002
    assert read_words(frames[None]) == [dataclasses.asdict(shown)]


def test_plain_diffusers_loads_the_pipeline_on_our_grid() -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(ASSETS / "tiny-wan")
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-6)


def test_student_draws_its_prompts_in_four_calls(backbone: WanBackbone) -> None:
    card = load_card(ASSETS / "tiny-wan-student")
    student = backbone.load_denoiser(ASSETS / "tiny-wan-student")
    calls: list[int] = []
    handle = student.denoiser.register_forward_hook(lambda *_: calls.append(1))
    prompts = [a.prompt for a in split_combinations()[1][:16]]
    (samples,) = sample_videos(student, prompts, SHAPES_CLIP, SamplerSpec(4, card.shift), seed=3)
    handle.remove()
    assert len(calls) == 4
    assert measure_shapes(samples.videos, prompts).adherence.mean() >= 0.95


@pytest.mark.parametrize("name", ["shapes-reward", "shapes-reward-heldout"])
def test_reward_prefers_the_clip_that_shows_the_prompt(name: str) -> None:
    _, heldout = split_combinations()
    videos = render(heldout, SHAPES_CLIP, seeded(78))
    prompts = [a.prompt for a in heldout]
    reward = WordReward.load(ASSETS / name)
    with torch.no_grad():
        right = reward(videos, prompts).clip
        wrong = reward(videos, prompts[1:] + prompts[:1]).clip
    assert (right > wrong).float().mean() >= 0.95


@torch.no_grad()
def test_latent_reward_ranks_samples_as_the_pixel_reward_does(backbone: WanBackbone) -> None:
    def judge(imitated: RewardConfig) -> WordReward:
        assert imitated == WordRewardConfig(path="shapes-reward")
        return WordReward.load(ASSETS / "shapes-reward")

    folder = ASSETS / "shapes-latent-reward"
    here = latent_space(ASSETS / "tiny-wan", backbone, SHAPES_CLIP)
    reward = LatentReward.load(folder, "cpu", judge, here)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * 2**20
    prompts, said, wanted = [a.prompt for a in split_combinations()[1]], [], []
    for seed, (steps, scale) in enumerate(itertools.product((2, 4, 10), (1.0, 3.0))):  # bad clips and good ones
        part = prompts[seed::6]
        spec = SamplerSpec(steps, 3.0, scale)
        (samples,) = sample_videos(backbone, part, SHAPES_CLIP, spec, seed=seed)
        said.append(reward.score_latents(samples.latents, part).clip)
        wanted.append(reward.judge(samples.videos, part).clip)
    assert rank_correlation(torch.cat(said), torch.cat(wanted)) >= 0.87  # of 64 clips; measured on 192 below
    assert json.loads((folder / "training.json").read_text())["metrics"]["rank_correlation_samples"] >= 0.88


def test_names_resolve_only_inside_the_assets(tmp_path: Path) -> None:
    assert resolve_folder("tiny-wan", where="model") == ASSETS / "tiny-wan"
    assert resolve_folder(str(tmp_path), where="model") == tmp_path
    with pytest.raises(UserError, match=r"model: no such folder: tiny-wam .*did you mean tiny-wan"):
        resolve_folder("tiny-wam", where="model")


WAN_1B = "29 GB: hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir models/Wan2.1-T2V-1.3B-Diffusers"
DINO = (
    "0.4 GB: hf download facebook/dino-vitb16 --local-dir models/dino-vitb16 "
    "&& rats-video rewards convert models/dino-vitb16/pytorch_model.bin models/dino-vitb16"
)
LTX = "25 GB: hf download Lightricks/LTX-Video --exclude 'ltx*' --local-dir models/LTX-Video"


@pytest.mark.parametrize(
    ("where", "name", "message"),
    [
        ("model", "nowhere", "no such folder: nowhere (embedded ones: tiny-wan)"),
        ("--base", "nowhere", "no such folder: nowhere (embedded ones: tiny-wan)"),
        ("student.init", "nowhere", "no such folder: nowhere (embedded ones: tiny-wan-student)"),
        ("reward.path", "shapes-rewards", "no such folder: shapes-rewards (did you mean shapes-reward?)"),
        ("reward.path", "shapes-rewart", "no such folder: shapes-rewart (did you mean shapes-reward?)"),
        ("reward.path", "facebook/dino-vitb16", f"no such folder: facebook/dino-vitb16 ({DINO})"),
        ("model", "models/LTX-Video", f"no such folder: models/LTX-Video ({LTX})"),
        (
            "reward.path", "someone/a-fine.tune",
            (
                "no such folder: someone/a-fine.tune "
                "(a folder is needed: hf download someone/a-fine.tune --local-dir models/a-fine.tune)"
            ),
        ),
        ("reward.path", "models/dino-vitb16", f"no such folder: models/dino-vitb16 ({DINO})"),
    ],
)  # fmt: skip
def test_what_is_missing_says_how_to_get_it(where: str, name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_folder(name, where=where)
    assert str(caught.value) == f"{where}: {message}"


def test_single_file_is_told_from_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "wan2.1_t2v_1.3B_fp16.safetensors"
    file.touch()
    with pytest.raises(UserError) as caught:
        resolve_folder(str(file), where="model")
    made = "docs/models.md, Your own checkpoint, makes one of a single file"
    fix = f"give a folder in diffusers' layout, such as that of: {WAN_1B}; {made}"
    assert str(caught.value) == f"model: is a file, not a folder: {file} ({fix})"


def test_repository_in_the_hubs_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--someone--wan" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--someone--wan" / "refs").mkdir()
    (tmp_path / "models--someone--wan" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        resolve_folder("someone/wan", where="reward.path")
    assert str(caught.value) == f"reward.path: no such folder: someone/wan (the hub's cache has it: {snapshot})"
