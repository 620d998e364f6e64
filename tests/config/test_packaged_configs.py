"""Every packaged configuration loads; those of real models fit their models and can be downloaded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import BaseModel

from rats_video.assets import HUB, download, is_embedded, resolve_folder
from rats_video.backbones.architecture import find_architecture
from rats_video.backbones.compute import LoraConfig
from rats_video.config.load import load_config
from rats_video.datasets.prompts.settings import FilePromptsConfig
from rats_video.datasets.video.settings import PrepareConfig
from rats_video.diffusion.schedule import sigma_grid
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.horizon import match_horizons
from rats_video.methods.teacher import FrozenTeacherConfig
from rats_video.pretraining.finetune import FinetuneConfig
from rats_video.pretraining.latent_pool import LatentRewardTrainConfig
from rats_video.pretraining.paths import PathTrainConfig
from rats_video.pretraining.preference import PreferenceTrainConfig
from rats_video.pretraining.reward import RewardTrainConfig
from rats_video.pretraining.teacher import TeacherTrainConfig
from rats_video.pretraining.vae import VaeConfig
from rats_video.rewards.clap_score import ClapScoreConfig
from rats_video.rewards.clip_score import ClipScoreConfig, PickScoreConfig
from rats_video.rewards.frames import scored_frames
from rats_video.rewards.sum import SumRewardConfig
from rats_video.rewards.word import WordRewardConfig

CONFIGS = Path(__file__).parents[2] / "configs"
ROOTS: dict[str, type[BaseModel]] = {
    "distill": DistillConfig, "vae": VaeConfig, "teacher": TeacherTrainConfig, "reward": RewardTrainConfig,
    "latent_reward": LatentRewardTrainConfig, "finetune": FinetuneConfig, "preference": PreferenceTrainConfig,
    "prepare": PrepareConfig, "paths": PathTrainConfig,
}  # fmt: skip
# pixels a token is wide, pixel frames a latent frame, what num_frames - 1 must be a multiple of
STRIDES = {
    "wan21_1b": (16, 4, 4), "wan21_14b": (16, 4, 4), "wan22_a14b": (16, 4, 4), "wan22_5b": (32, 4, 4),
    "ltx_video": (32, 8, 8), "hunyuan_video": (16, 4, 4), "cogvideox_5b": (16, 4, 8),
    "cogvideox15_5b": (16, 4, 8), "wan21_i2v_14b": (16, 4, 4), "wan22_i2v_a14b": (16, 4, 4), "wan22_5b_i2v": (32, 4, 4),
    "ltx_video_i2v": (32, 8, 8), "ltx2": (32, 8, 8), "flux1_dev": (16, 1, 1), "sd35_medium": (16, 1, 1),
    "qwen_image": (16, 1, 1), "flux2_klein_4b": (16, 1, 1),
}  # fmt: skip
IMAGES = ("flux1_dev", "sd35_medium", "qwen_image", "flux2_klein_4b")


def read(name: str, *overrides: str) -> DistillConfig:
    return load_config(DistillConfig, name, group="distill", overrides=overrides)


def seeing(reward: BaseModel) -> list[BaseModel]:
    """The rewards of a sum, or the one, but for those that hear."""
    found = [term.reward for term in reward.terms.values()] if isinstance(reward, SumRewardConfig) else [reward]
    return [each for each in found if not isinstance(each, ClapScoreConfig)]


@pytest.mark.parametrize(
    "path", [p for group in ROOTS for p in sorted((CONFIGS / group).glob("[!_]*.yaml"))], ids=lambda path: path.stem
)
def test_config_loads(path: Path) -> None:
    load_config(ROOTS[path.parent.name], path.stem, group=path.parent.name)


def test_every_real_model_is_tested_below() -> None:
    named = sorted(path.stem for path in (CONFIGS / "distill").glob("[!_]*.yaml") if "-" not in path.stem)
    assert {name for name in named if read(name).model.startswith("models/")} == set(STRIDES)


@pytest.mark.parametrize("name", STRIDES)
def test_clip_fits_the_model_and_every_latent_frame_is_scored(name: str) -> None:
    cfg = read(name)
    pixels, stride, step = STRIDES[name]
    assert (cfg.clip.height % pixels, cfg.clip.width % pixels, (cfg.clip.num_frames - 1) % step) == (0, 0, 0)
    assert cfg.heldout_reward is not None
    for reward in (*seeing(cfg.reward), cfg.heldout_reward):
        assert isinstance(reward, PickScoreConfig | ClipScoreConfig)
        scored = scored_frames(cfg.clip.num_frames, reward.frames, [""])[0]
        latent_frames = {(int(frame) + stride - 1) // stride for frame in scored}
        assert latent_frames == set(range(1 + (cfg.clip.num_frames - 1) // stride))


@pytest.mark.parametrize("path", sorted((CONFIGS / "prepare").glob("*.yaml")), ids=lambda path: path.stem)
def test_prepared_clips_fit_the_model(path: Path) -> None:
    cfg = load_config(PrepareConfig, path.stem, group="prepare")
    pixels, _, step = (16, 4, 4) if path.stem == "tiny" else STRIDES[path.stem]
    for bucket in cfg.buckets:
        assert (bucket.height % pixels, bucket.width % pixels, (bucket.num_frames - 1) % step) == (0, 0, 0)
    if path.stem != "tiny":  # what the model is distilled at can come from the cache
        clip = read(path.stem).clip
        shapes = {(bucket.num_frames, bucket.height, bucket.width) for bucket in cfg.buckets}
        assert cfg.fps == clip.fps
        assert cfg.model == read(path.stem).model
        assert (clip.num_frames, clip.height, clip.width) in shapes


def test_a_decode_window_is_asked_of_families_that_have_one() -> None:
    for name in STRIDES:
        cfg = read(name)
        family = find_architecture(cfg.model, cfg.architecture).family
        assert (cfg.compute.decode.window is not None) == family.exact_window


@pytest.mark.parametrize("name", STRIDES)
def test_recipe_of_a_real_model(name: str) -> None:
    cfg = read(name)
    assert [type(reward) for reward in seeing(cfg.reward)] == [PickScoreConfig]
    assert isinstance(cfg.heldout_reward, ClipScoreConfig)
    assert isinstance(cfg.student.weights, LoraConfig)
    assert isinstance(cfg.teacher, FrozenTeacherConfig)
    assert cfg.teacher.guidance_scale == cfg.evaluation.guidance_scale
    assert cfg.teacher.guidance_scale_2 == cfg.evaluation.guidance_scale_2
    assert cfg.student.num_steps == cfg.evaluation.nfe == ((3, 5, 8) if name in IMAGES else (3, 4, 5, 8))
    assert (cfg.compute.dtype, cfg.student.weights.dtype) == ("bfloat16", "float32")
    assert cfg.compute.activation_checkpointing
    assert cfg.compute.cache_text
    assert cfg.compute.decode.checkpoint
    prompts = {"train": "video-train", "heldout": "video-heldout"}
    if "i2v" in name:  # from pictures, which nobody can package
        prompts = {"train": "pictures.jsonl", "heldout_share": 0.1, "first_frame": True}
    assert cfg.prompts == FilePromptsConfig.model_validate({"kind": "file", **prompts})


@pytest.mark.parametrize("name", ["wan21_1b-dmd2", "wan21_14b-dmd2", "wan21_1b-rtdmd", "wan21_1b-grpo"])
def test_rival_of_a_real_model_has_its_clip_base_and_precision(name: str) -> None:
    cfg, base = read(name), read(name.split("-", maxsplit=1)[0])
    assert cfg.method.kind == name.rsplit("-", maxsplit=1)[1]
    same = ("model", "clip", "shift", "prompts", "reward", "heldout_reward", "evaluation")
    assert [getattr(cfg, key) for key in same] == [getattr(base, key) for key in same]
    assert (cfg.student.weights, cfg.student.num_steps) == (base.student.weights, base.student.num_steps)
    assert cfg.compute.model_dump(exclude={"decode"}) == base.compute.model_dump(exclude={"decode"})
    assert cfg.parallel.shard == ("14b" in name)


@pytest.mark.parametrize("name", STRIDES)
def test_teacher_nests_in_3_4_and_8_steps_and_is_near_at_5(name: str) -> None:
    cfg = read(name)
    residual = {
        steps: match_horizons(sigma_grid(steps, cfg.shift), sigma_grid(cfg.teacher.num_steps, cfg.shift)).residual
        for steps in cfg.student.num_steps
    }
    assert {residual[steps] for steps in cfg.student.num_steps if steps != 5} == {0}
    assert 0.005 < residual[5] < 0.02


@pytest.mark.parametrize(("name", "boundary"), [("wan22_a14b", 0.875), ("wan22_i2v_a14b", 0.9)])
def test_both_experts_of_wan22_get_gradient_at_every_nfe(name: str, boundary: float) -> None:
    cfg = read(name)
    for steps in cfg.student.num_steps:
        sigmas = sigma_grid(steps, cfg.shift).tolist()
        assert {sigmas[step] >= boundary for step in cfg.student.gradient_steps(steps)} == {True, False}


@pytest.mark.pipeline  # imports diffusers
def test_shift_of_ltx_is_its_schedulers() -> None:
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

    cfg = read("ltx_video")
    tokens = (1 + (cfg.clip.num_frames - 1) // 8) * (cfg.clip.height // 32) * (cfg.clip.width // 32)
    mu = calculate_shift(tokens, base_seq_len=1024, max_seq_len=4096, base_shift=0.95, max_shift=2.05)
    assert cfg.shift == pytest.approx(2.718281828**mu, rel=0.01)


@pytest.mark.pipeline  # imports diffusers
def test_shift_of_an_image_is_its_pipelines() -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    schedules = {"flux1_dev": (256, 4096, 0.5, 1.15), "qwen_image": (256, 8192, 0.5, 0.9)}  # the published ones
    for name, (first, last, base, most) in schedules.items():
        tokens = (read(name).clip.height // 16) * (read(name).clip.width // 16)
        mu = base + (most - base) * (tokens - first) / (last - first)
        assert read(name).shift == pytest.approx(math.exp(mu), rel=0.002)
    assert read("flux2_klein_4b").shift == pytest.approx(math.exp(compute_empirical_mu(4096, 50)), rel=0.002)


@pytest.mark.parametrize("name", STRIDES)
def test_what_is_missing_comes_with_its_download(name: str) -> None:
    cfg = read(name)
    (reward,) = seeing(cfg.reward)
    assert isinstance(reward, PickScoreConfig)
    for folder in (cfg.model, reward.path, reward.tokenizer):
        assert folder is not None
        assert not is_embedded(folder)
        repository = next(known for known in HUB if known.endswith(f"/{folder.removeprefix('models/')}"))
        with pytest.raises(UserError) as caught:
            resolve_folder(folder, where="model")
        assert str(caught.value) == f"model: no such folder: {folder} ({download(repository, folder)})"
        if folder == cfg.model:  # the same line is in the file, for who reads before running
            size, _, command = download(repository, folder).partition(": ")
            text = (CONFIGS / f"distill/{name}.yaml").read_text()
            assert f"#   {command}  # {size}\n" in text


def test_reward_without_a_kind_is_a_word_reward(tmp_path: Path) -> None:
    tiny = (CONFIGS / "distill/tiny.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(tiny.replace("kind: word, ", ""))
    assert read(str(tmp_path / "mine.yaml")) == read("tiny")
    assert read("tiny").reward == WordRewardConfig(path="shapes-reward")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("reward.kind=pikscore", "--set reward.kind: unknown kind 'pikscore' (did you mean 'pickscore'?)"),
        ("reward.frames=4", "--set reward.frames: unknown key (valid keys: kind, path, blind_to)"),
        ("reward={kind: pickscore, path: x, frames: 0}", "reward.frames: must be at least 1, got 0"),
        ("reward=3", "--set reward: must be a group of keys, got 3"),
        ("heldout_reward.kind=no", "--set heldout_reward.kind: unknown kind"),
    ],
)
def test_bad_reward_is_one_line(override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        read("tiny", override)
    assert line in str(caught.value)


def test_base_files_are_not_offered() -> None:
    with pytest.raises(UserError) as caught:
        read("zzz")
    assert "_video" not in str(caught.value).replace("hunyuan_video", "").replace("ltx_video", "")
