"""Motion paths: written and read in prompts, drawn and measured, encoded beside the caption, kept from end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.text_cache import TextCache
from rats_video.backbones.wan import WanBackbone
from rats_video.backbones.wan_paths import PATH_ENCODER, PathEncoder, PathWanBackbone
from rats_video.config.load import load_config
from rats_video.datasets.prompts.settings import ShapesPromptsConfig
from rats_video.datasets.prompts.split import check_prompt, load_prompts
from rats_video.datasets.shapes.paths import draw_path, measure_paths, render_paths
from rats_video.datasets.shapes.render import SHAPES, SHAPES_CLIP, ShapeAttributes, parse_prompt, split_combinations
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.motion_path import join_path, resample, split_path
from rats_video.pretraining.paths import PathTrainConfig, encode_path_clips, path_flow_loss, trained_weights
from rats_video.rewards.word import WordReward
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

pytestmark = pytest.mark.pipeline

CAPTION = "a fast red circle moving right on a gray background"
PATH = ((0.25, 0.5), (0.5, 0.4), (0.75, 0.5))
PROMPT = f"{CAPTION} @ 0.25,0.50 0.50,0.40 0.75,0.50"
SMALL = ClipSpec(num_frames=5, height=32, width=32, fps=8.0)


# ------------------------------------------------------------------------------------------------------- in a prompt


def test_a_path_is_what_follows_the_mark() -> None:
    assert split_path(PROMPT) == (CAPTION, PATH)
    assert split_path(CAPTION) == (CAPTION, None)
    assert join_path(CAPTION, PATH) == PROMPT
    assert split_path("@ 0,1 1,.5") == ("", ((0.0, 1.0), (1.0, 0.5)))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("", "a motion path has 2 to 64 points, not 0"),
        ("0.5,0.5", "a motion path has 2 to 64 points, not 1"),
        ("0.5,0.5 " * 65, "a motion path has 2 to 64 points, not 65"),
        ("0.5,0.5 0.5", "'0.5' is no point of a motion path"),
        ("0.5,0.5 nan,0", "'nan,0' is no point of a motion path"),
        ("0.5,0.5 -0.1,0", "'-0.1,0' is no point of a motion path"),
        ("0.5,0.5 0.1,1.01", "the point 0.1,1.01 lies outside the picture"),
        ("0.5,0.5 0.1,0.2 slowly", "'slowly' is no point of a motion path"),
        ("0.5,0.5 @ 0.1,0.2", "'@' is no point of a motion path"),
    ],
)
def test_what_is_no_path_is_one_line(path: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        split_path(f"{CAPTION} @ {path}")
    assert str(caught.value) == f"prompt: {line} (write 'CAPTION @ x,y x,y ...', each of x and y from 0 to 1)"


def test_resampled_it_moves_in_straight_lines() -> None:
    expected = [[0.25, 0.5], [0.375, 0.45], [0.5, 0.4], [0.625, 0.45], [0.75, 0.5]]
    torch.testing.assert_close(resample(PATH, 5), torch.tensor(expected))
    assert torch.equal(resample(PATH, 3), torch.tensor(PATH))


def test_prompts_have_a_path_each_and_keep_their_split() -> None:
    plain, found = load_prompts(ShapesPromptsConfig()), load_prompts(ShapesPromptsConfig(paths=3))
    for side in ("train", "heldout"):
        prompts, captions = getattr(found, side), getattr(plain, side)
        assert tuple(split_path(prompt)[0] for prompt in prompts) == captions * 3
        assert len(set(prompts)) == len(prompts)
    assert load_prompts(ShapesPromptsConfig(paths=2)).train == found.train[: 2 * len(plain.train)]
    assert parse_prompt(found.train[0]) == parse_prompt(plain.train[0])


def test_a_word_reward_reads_the_caption_alone() -> None:
    reward = WordReward(["red", "circle"], width=16)
    videos = torch.rand(1, 5, 3, 32, 32, generator=seeded(1))
    assert torch.equal(reward(videos, [PROMPT]).clip, reward(videos, [CAPTION]).clip)


# -------------------------------------------------------------------------------------------------- drawn and measured


@pytest.mark.parametrize("clip", [SHAPES_CLIP, ClipSpec(9, 64, 96, 8.0), ClipSpec(9, 96, 64, 8.0)])
def test_a_rendered_path_measures_back_within_a_tenth_of_a_pixel(clip: ClipSpec) -> None:
    attributes = [ShapeAttributes("fast", "red", shape, "right", "gray") for shape in SHAPES]
    videos = render_paths(attributes, [PATH] * 3, clip, seeded(1))
    found = measure_paths(videos, [PROMPT] * 3)
    assert found["path_distance"].max() * clip.width < 0.1
    assert found["on_path"].tolist() == [1.0, 1.0, 1.0]


def test_distance_is_in_widths_and_frames_without_a_shape_are_off_the_path() -> None:
    attributes = ShapeAttributes("fast", "red", "circle", "right", "gray")
    video = render_paths([attributes], [PATH], SHAPES_CLIP, seeded(1))
    moved = join_path(CAPTION, tuple((x - 0.03, y + 0.04) for x, y in PATH))
    far = join_path(CAPTION, tuple((x, y + 0.1) for x, y in PATH))
    assert measure_paths(video, [moved])["path_distance"].item() == pytest.approx(0.05, abs=1e-3)
    assert measure_paths(video, [moved])["on_path"].item() == 1.0
    assert measure_paths(video, [far])["on_path"].item() == 0.0
    video[:, 9:] = video[0, 0, :, 0, 0][:, None, None]  # gone from the tenth frame of seventeen on
    found = measure_paths(video, [PROMPT])
    assert found["on_path"].item() == pytest.approx(9 / 17)
    assert found["path_distance"].item() < 0.002
    video[:] = 0.5
    assert math.isnan(measure_paths(video, [PROMPT])["path_distance"].item())
    with pytest.raises(UserError, match="has no motion path"):
        measure_paths(video, [CAPTION])


def test_drawn_paths_go_where_the_caption_says_and_stay_in_view() -> None:
    combinations = split_combinations()[0]
    for index, attributes in enumerate(combinations):
        path = torch.tensor(draw_path(attributes, seeded(index)))
        travel = (path[-1] - path[0]) * 64
        low, high = {"slow": (11.2, 13.6), "fast": (22.4, 25.6)}[attributes.speed]
        direction = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[attributes.direction]
        along = float(travel @ torch.tensor(direction, dtype=torch.float32))
        assert low - 1 < along < high + 1  # two decimals are 0.64 pixels
        assert path.min() * 64 > 13.5
        assert path.max() * 64 < 64 - 13.5


# ------------------------------------------------------------------------------------------------- beside the caption


@pytest.fixture(scope="module")
def guided(tiny_wan: Path) -> PathWanBackbone:
    return PathWanBackbone.from_base(tiny_wan, torch.device("cpu"), seed=0)


def velocity(model: WanBackbone, *prompts: str) -> torch.Tensor:
    noise = model.sample_noise(1, SMALL, seeded(2)).expand(len(prompts), -1, -1, -1, -1)
    with torch.no_grad():
        return model.velocity(noise, torch.full((len(prompts),), 0.7), model.encode_text(prompts))


def test_without_a_path_it_is_the_plain_model_bit_for_bit(guided: PathWanBackbone, loaded: WanBackbone) -> None:
    prompts = [CAPTION, "", "a slow blue square moving up on a white background"]
    assert torch.equal(guided.encode_text(prompts).embeds, loaded.encode_text(prompts).embeds)
    assert torch.equal(velocity(guided, *prompts), velocity(loaded, *prompts))


def test_a_path_changes_its_own_clip_and_no_other(guided: PathWanBackbone, loaded: WanBackbone) -> None:
    other = PROMPT.replace("0.40", "0.60")
    together = velocity(guided, PROMPT, CAPTION, other)
    torch.testing.assert_close(together[1:2], velocity(loaded, CAPTION), atol=5e-6, rtol=0)
    torch.testing.assert_close(together[2:3], velocity(guided, other), atol=5e-6, rtol=0)
    gaps = [(together[i] - together[j]).abs().max().item() for i, j in ((0, 1), (0, 2))]
    assert min(gaps) > 5e-5


def test_the_order_of_the_points_counts(guided: PathWanBackbone) -> None:
    there, back = velocity(guided, PROMPT, join_path(CAPTION, PATH[::-1]))
    assert (there - back).abs().max() > 5e-5


def test_cached_text_keeps_the_path(tiny_wan: Path, guided: PathWanBackbone, tmp_path: Path) -> None:
    prompts = [PROMPT, CAPTION, ""]
    TextCache.encode(guided.encode_text, prompts).save(tmp_path / "text", "me")
    read = TextCache.load(tmp_path / "text", "me", prompts)
    assert read is not None
    frugal = PathWanBackbone.from_base(tiny_wan, torch.device("cpu"), seed=0)
    frugal.cache_text(read)
    assert PATH_ENCODER not in frugal.parts
    torch.testing.assert_close(
        velocity(frugal.with_own_denoiser(), *prompts), velocity(guided, *prompts), atol=5e-6, rtol=0
    )


def test_words_and_paths_are_checked_before_anything_runs(
    guided: PathWanBackbone, loaded: WanBackbone, tmp_path: Path
) -> None:
    check_prompt(PROMPT, guided)
    assert guided.unknown_words(f"zebra {PROMPT}") == ["zebra"]
    assert guided.unknown_words(f"{PROMPT} circle") == ["circle"]
    with pytest.raises(UserError, match="lies outside the picture"):
        check_prompt(f"{CAPTION} @ 0.1,0.2 2,0", guided)
    (tmp_path / "p.txt").write_text(f"{CAPTION}\n{CAPTION} @ 0.1,0.2 2,0\n")
    with pytest.raises(UserError, match=r"p\.txt, line 2: the point 2,0 lies outside the picture"):
        check_prompt(f"{CAPTION} @ 0.1,0.2 2,0", guided, files=[tmp_path / "p.txt"])
    assert guided.truncation_note(PROMPT) == ""
    with pytest.raises(UserError, match="no point of a motion path"):
        guided.truncation_note(f"{CAPTION} @ 1,1 circle")
    with pytest.raises(UserError, match="this model does not know '@'"):
        check_prompt(PROMPT, loaded)


def test_captions_that_fill_the_text_make_room(guided: PathWanBackbone) -> None:
    text = guided.encode_text([" ".join(["red"] * 600) + " @ 0.2,0.2 0.3,0.3"])
    assert text.embeds.shape[1] == 512
    assert text.embeds[0, -1].eq(0).all()
    assert text.embeds[0, -6:-1].ne(0).any(dim=1).all()


def test_the_loss_reaches_every_weight_and_dropped_paths_are_no_path(guided: PathWanBackbone) -> None:
    cfg = PathTrainConfig.model_validate({
        "clip": {"num_frames": 5, "height": 32, "width": 32}, "num_clips": 4, "batch_size": 4,
        "optimizer": {"lr": 1e-3}, "prompt_dropout": 0, "path_dropout": 0,
    })  # fmt: skip
    guided.parts[PATH_ENCODER].requires_grad_(requires_grad=True)
    clips = encode_path_clips(guided, cfg)
    weights = trained_weights(guided)
    gradients = torch.autograd.grad(path_flow_loss(guided, clips, cfg, 0), list(weights.values()))
    reached = {name for name, gradient in zip(weights, gradients, strict=True) if gradient.abs().sum() > 0}
    assert {name for name in weights if name.startswith(PATH_ENCODER)} <= reached
    pathless = cfg.model_copy(update={"path_dropout": 0.999999})
    loss = path_flow_loss(guided, clips, pathless, 0)
    moved = path_flow_loss(guided, encode_path_clips(guided, cfg.model_copy(update={"seed": 0})), pathless, 0)
    assert torch.autograd.grad(loss, list(weights.values()), allow_unused=True)[-1].abs().sum() == 0
    torch.testing.assert_close(loss, moved)


def test_an_encoder_is_what_it_was_saved_as(tmp_path: Path) -> None:
    encoder = PathEncoder(16, num_points=3, num_octaves=2, hidden=8)
    encoder.save_pretrained(tmp_path)
    again, info = PathEncoder.from_pretrained(tmp_path, torch_dtype=torch.float32)
    paths = torch.rand(2, 3, 2, generator=seeded(1))
    assert torch.equal(again(paths), encoder(paths))
    assert info == {"missing_keys": []}


# ---------------------------------------------------------------------------------------------------------- end to end

TRAIN = """
clip: {{num_frames: 5, height: 32, width: 32}}
model: {model}
num_clips: 8
batch_size: 4
steps: 2
optimizer: {{lr: 1.0e-3}}
eval_clips: 2
eval_steps: 2
"""


def test_trained_distilled_sampled_evaluated_and_exported(
    command: Callable[..., Any], tiny_wan: Path, config_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "paths.yaml").write_text(TRAIN.format(model=tiny_wan))
    base, run = tmp_path / "base", tmp_path / "run"
    code, _, err = command("train", "paths", "--config", tmp_path / "paths.yaml", "--output", base)
    assert code == 0, err
    assert json.loads((base / "training.json").read_text())["metrics"].keys() == {
        "adherence_2_steps", "on_path_2_steps", "adherence_4_steps", "on_path_4_steps",
    }  # fmt: skip
    assert isinstance(load_backbone(base), PathWanBackbone)

    prompts = "prompts={kind: shapes, paths: 1}"
    settings = ("--set", f"model={base}", "--set", prompts, "--set", "training.steps=1")
    broken = command("distill", "--config", config_file, "--output", run, *settings, "--set", f"model={tiny_wan}")
    assert (broken.code, run.exists()) == (2, False)
    assert "this model does not know '@'" in broken.err
    code, _, err = command(
        "distill", "--config", config_file, "--output", run, *settings, "--set", "compute.cache_text=true"
    )
    assert code == 0, err
    student = load_backbone(base).load_role(run / "student")
    assert isinstance(student, PathWanBackbone)
    assert (velocity(student, PROMPT) - velocity(student, CAPTION)).abs().max() > 5e-5

    made = command("sample", "--model", run, "--prompt", PROMPT, "--output", tmp_path / "clips")
    assert made.code == 0, made.err
    wrong = command("sample", "--model", run, "--prompt", f"{CAPTION} @ 1,1", "--output", tmp_path / "none")
    assert (wrong.code, (tmp_path / "none").exists()) == (2, False)
    assert "a motion path has 2 to 64 points, not 1" in wrong.err
    code, out, err = command("evaluate", run)
    assert code == 0, err
    assert "on the path" in out
    code, out, err = command("export", "model", run, "--format", "diffusers", "--output", tmp_path / "stock")
    assert code == 0, err
    assert isinstance(load_backbone(tmp_path / "stock"), PathWanBackbone)  # stock diffusers has just sampled it


def test_the_packaged_distillation_follows_paths() -> None:
    cfg = load_config(DistillConfig, "tiny-paths", group="distill")
    assert cfg.prompts == ShapesPromptsConfig(paths=4)
    assert set(cfg.reward.blind_to) == {"slow", "fast", "left", "right", "up", "down"}  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------- as committed

ROOT = Path(__file__).parents[2]


def test_committed_students_keep_the_control_and_the_docs_quote_it() -> None:
    study = json.loads((ROOT / "benchmarks" / "results" / "first_model" / "motion_paths.json").read_text())
    arms, pairs = study["arms"], study["pairs"]
    text = (ROOT / "docs" / "motion_paths.md").read_text(encoding="utf-8")
    for name, row in arms.items():
        cells = [f"{row[key]['mean']:.3f} ± {row[key]['ci95']:.3f}" for key in ("path_distance", "on_path")]
        assert f"| {name} | {row['nfe']} | {' | '.join(cells)} |" in text
    for pair in ("rats - refl", "rats_x4 - rats"):
        assert f"{pairs[pair]['on_path']['mean']:.3f} ± {pairs[pair]['on_path']['ci95']:.3f}" in text
    without = arms["teacher, no path"]["path_distance"]
    for name in ("teacher", "base", "imitation", "rats", "rats_x4", "refl", "rats_pulled", "refl_pulled"):
        found = arms[name]["path_distance"]
        assert found["mean"] + found["ci95"] < without["mean"] - without["ci95"]
        assert arms[name]["clips without a shape"] == 0
    assert abs(arms["imitation"]["on_path"]["mean"] - arms["teacher"]["on_path"]["mean"]) < 0.02
    assert pairs["rats - refl"]["on_path"]["mean"] > pairs["rats - refl"]["on_path"]["ci95"]
