"""Every packaged configuration loads; those of real models fit their models and can be downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from rats_video.assets import HUB, download, is_embedded, resolve_folder
from rats_video.backbones.cogvideox import CogVideoXBackbone
from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.hunyuan import HunyuanVideoBackbone
from rats_video.backbones.ltx import LTXBackbone
from rats_video.backbones.wan import WanBackbone
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
from rats_video.rewards.clip_score import ClipScoreConfig, PickScoreConfig
from rats_video.rewards.frames import scored_frames
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
    "cogvideox15_5b": (16, 4, 8),
}  # fmt: skip


def read(name: str, *overrides: str) -> DistillConfig:
    return load_config(DistillConfig, name, group="distill", overrides=overrides)


@pytest.mark.parametrize(
    "path", [p for group in ROOTS for p in sorted((CONFIGS / group).glob("[!_]*.yaml"))], ids=lambda path: path.stem
)
def test_config_loads(path: Path) -> None:
    load_config(ROOTS[path.parent.name], path.stem, group=path.parent.name)


def test_every_real_model_is_tested_below() -> None:
    real = {path.stem for path in (CONFIGS / "distill").glob("*.yaml") if "_video\n" in path.read_text()}
    assert real == set(STRIDES)


@pytest.mark.parametrize("name", STRIDES)
def test_clip_fits_the_model_and_every_latent_frame_is_scored(name: str) -> None:
    cfg = read(name)
    pixels, stride, step = STRIDES[name]
    assert (cfg.clip.height % pixels, cfg.clip.width % pixels, (cfg.clip.num_frames - 1) % step) == (0, 0, 0)
    for reward in (cfg.reward, cfg.heldout_reward):
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
    families = {"wan": WanBackbone, "ltx": LTXBackbone, "hunyuan": HunyuanVideoBackbone, "cogvideox": CogVideoXBackbone}
    for name in STRIDES:
        (family,) = (family for start, family in families.items() if name.startswith(start))
        assert (read(name).compute.decode.window is not None) == family.exact_window


@pytest.mark.parametrize("name", STRIDES)
def test_recipe_of_a_real_model(name: str) -> None:
    cfg = read(name)
    assert isinstance(cfg.reward, PickScoreConfig)
    assert isinstance(cfg.heldout_reward, ClipScoreConfig)
    assert isinstance(cfg.student.weights, LoraConfig)
    assert isinstance(cfg.teacher, FrozenTeacherConfig)
    assert cfg.teacher.guidance_scale == cfg.evaluation.guidance_scale
    assert cfg.student.num_steps == cfg.evaluation.nfe == (3, 4, 5, 8)
    assert (cfg.compute.dtype, cfg.student.weights.dtype) == ("bfloat16", "float32")
    assert cfg.compute.activation_checkpointing
    assert cfg.compute.cache_text
    assert cfg.compute.decode.checkpoint
    assert cfg.prompts == FilePromptsConfig(kind="file", train="video-train", heldout="video-heldout")


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
    assert [residual[steps] for steps in (3, 4, 8)] == [0, 0, 0]
    assert 0.01 < residual[5] < 0.02


def test_both_experts_of_wan22_get_gradient_at_every_nfe() -> None:
    cfg = read("wan22_a14b")
    for steps in cfg.student.num_steps:
        sigmas = sigma_grid(steps, cfg.shift).tolist()
        assert {sigmas[step] >= 0.875 for step in cfg.student.gradient_steps(steps)} == {True, False}


@pytest.mark.pipeline  # imports diffusers
def test_shift_of_ltx_is_its_schedulers() -> None:
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

    cfg = read("ltx_video")
    tokens = (1 + (cfg.clip.num_frames - 1) // 8) * (cfg.clip.height // 32) * (cfg.clip.width // 32)
    mu = calculate_shift(tokens, base_seq_len=1024, max_seq_len=4096, base_shift=0.95, max_shift=2.05)
    assert cfg.shift == pytest.approx(2.718281828**mu, rel=0.01)


@pytest.mark.parametrize("name", STRIDES)
def test_what_is_missing_comes_with_its_download(name: str) -> None:
    cfg = read(name)
    assert isinstance(cfg.reward, PickScoreConfig)
    for folder in (cfg.model, cfg.reward.path, cfg.reward.tokenizer):
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
