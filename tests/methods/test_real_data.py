"""Real clips in a distillation: what their loss is, and that nothing else decides it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_cache import SIZE, write_cache
from torch import Tensor, nn

from rats_video.backbones.identity import text_digest, vae_digest
from rats_video.backbones.wan import WanBackbone
from rats_video.condition import Condition, GivenFrames
from rats_video.diffusion.schedule import sigma_grid
from rats_video.distillation.method import build_rats
from rats_video.distillation.real_data import build_real_data
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.methods.rats import Rats
from rats_video.methods.real_data import RealClips, real_data_loss
from rats_video.runtime import ALONE, Runtime
from rats_video.training.batches import draw_batch
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.training.update import accumulate_gradient, add_real_data
from rats_video.types import ClipSpec

TERM = "method.real_data={{path: {}, weight: 0.5, batch_size: 4, prompt_dropout: 0.3}}"
LORA = ("student.weights.kind=lora", "student.weights.rank=2", "student.weights.alpha=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_wan: Path, loaded: WanBackbone, clip: ClipSpec) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write(folder, tiny_wan, loaded, clip)
    return folder


def write(folder: Path, tiny_wan: Path, loaded: WanBackbone, clip: ClipSpec, **changes: Any) -> None:
    text = loaded.encode_text([""])
    given = {
        "shapes": {SIZE: loaded.latent_shape(clip)}, "text_dim": text.embeds.shape[2],
        "text_length": text.embeds.shape[1], "vae": vae_digest(tiny_wan), "text": text_digest(tiny_wan),
    }  # fmt: skip
    write_cache(folder, {SIZE: 6}, **{**given, **changes})


class Line(nn.Module):
    """A student of one weight: its velocity is `weight * (noise - x0)` of the clips it knows."""

    def __init__(self, clips: RealClips, weight: float) -> None:
        super().__init__()
        self.weight, self.clips = nn.Parameter(torch.tensor(weight)), clips

    def velocity(self, latents: Tensor, sigma: Tensor, _: Condition) -> Tensor:
        noised = (1 - sigma[0]) * self.clips.latents + sigma[0] * self.clips.noise
        torch.testing.assert_close(latents, noised)
        return self.weight * (self.clips.noise - self.clips.latents)


@pytest.mark.parametrize(("place", "length"), [(0.0, 1 - 0.9), (0.26, 0.9 - 0.75), (0.6, 0.75 - 0.5), (0.99, 0.5)])
def test_known_losses_and_their_gradient(place: float, length: float) -> None:
    shape = (2, 3, 2, 4, 4)
    clips = RealClips(torch.zeros(shape), Condition(torch.zeros(2, 1, 1)), torch.full(shape, 2.0), place)
    for weight in (0.5, 1.0, 1.5):
        student: Any = Line(clips, weight)
        loss = real_data_loss(student, clips, sigma_grid(4, 3.0))
        assert loss.tolist() == pytest.approx([(length * 2 * (weight - 1)) ** 2] * 2, rel=1e-4, abs=1e-10)
        loss.mean().backward()
        assert float(student.weight.grad) == pytest.approx(2 * (length * 2) ** 2 * (weight - 1), rel=1e-4, abs=1e-7)


def test_given_frames_cost_nothing() -> None:
    shape = (2, 3, 2, 4, 4)
    given = GivenFrames.hold_first(torch.zeros(2, 3, 1, 4, 4), 2)
    clips = RealClips(torch.zeros(shape), Condition(torch.zeros(2, 1, 1), given=given), torch.full(shape, 2.0), 0.0)

    def velocity(latents: Tensor, _: Tensor, condition: Condition) -> Tensor:
        assert torch.equal(latents[:, :, 0], torch.zeros(2, 3, 4, 4))
        return condition.at_rest(torch.zeros_like(latents))

    student: Any = SimpleNamespace(velocity=velocity)
    loss = real_data_loss(student, clips, sigma_grid(4, 3.0))
    assert loss.tolist() == pytest.approx([((1 - 0.9) * 2) ** 2 / 2] * 2, rel=1e-4)  # of one frame in two


def make(cfg: DistillConfig, loaded: WanBackbone) -> Rats:
    return build_rats(cfg, *build_roles(cfg, loaded.with_own_denoiser()))


def gradient(rats: Rats, parts: int, steps: range = range(1)) -> Tensor:
    assert rats.real_data is not None
    for step in steps:
        add_real_data(rats, rats.real_data, 4, step, parts, {"loss": 0.0})
    assert all(weight.grad is None for weight in rats.teacher.backbone.weights.values())
    return torch.cat(
        [
            torch.zeros(weight.numel()) if weight.grad is None else weight.grad.flatten()
            for weight in rats.student.weights.values()
        ]
    )


@pytest.mark.parametrize("weights", [(), (*LORA, "teacher.kind=ema", "teacher.num_steps=4", "teacher.decay=0.5")])
def test_parts_and_processes_add_up_to_the_whole(
    loaded: WanBackbone, make_config: Callable[..., DistillConfig], folder: Path, weights: tuple[str, ...],
    tiny_wan: Path,
) -> None:  # fmt: skip
    cfg = make_config(TERM.format(folder), *weights)
    own = WanBackbone.from_pretrained(tiny_wan) if weights else loaded
    rats = build_rats(cfg, *build_roles(cfg, own if weights else own.with_own_denoiser()))
    whole = gradient(rats, 1)
    assert whole.norm() > 0

    def again(parts: int, runtimes: tuple[Runtime, ...]) -> Tensor:
        total = torch.zeros_like(whole)
        for runtime in runtimes:
            for weight in rats.student.weights.values():
                weight.grad = None
            object.__setattr__(rats, "real_data", build_real_data(cfg, rats.student, runtime))
            total += gradient(rats, parts)
        return total / len(runtimes)

    two = tuple(Runtime(torch.device("cpu"), rank=rank, trainers=2) for rank in range(2))
    for parts, runtimes in ((2, (ALONE,)), (3, (ALONE,)), (1, two), (2, two)):
        assert float((again(parts, runtimes) - whole).norm() / whole.norm()) < 1e-5


def train(cfg: DistillConfig, loaded: WanBackbone, prompts: tuple[str, ...], folder: Path) -> tuple[Any, Any]:
    folder.mkdir(exist_ok=True)
    rats = make(cfg, loaded)
    train_loop(rats, cfg, prompts, RunFolder(folder))
    rows = [{**row, "seconds": 0.0} for row in read_metrics(folder / "metrics.jsonl")]
    return {name: weight.detach().clone() for name, weight in rats.student.weights.items()}, rows


def test_resumed_is_uninterrupted_and_weight_0_is_without(
    loaded: WanBackbone, make_config: Callable[..., DistillConfig], captions: tuple[str, ...], folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    term = TERM.format(folder)

    def run(name: str, *options: str) -> tuple[Any, Any]:
        return train(make_config(*options), loaded, captions, tmp_path / name)

    whole, rows = run("whole", term, "training.steps=4")
    run("halves", term, "training.steps=2")
    halves, again = run("halves", term, "training.steps=4")
    assert rows == again
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert all(row["real_data/loss"] > 0 for row in rows)
    plain, plain_rows = run("plain", "training.steps=4")
    zero, zero_rows = run("zero", term.replace("weight: 0.5", "weight: 0"), "training.steps=4")
    assert plain_rows == zero_rows
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    assert rows[0]["loss"] == pytest.approx(plain_rows[0]["loss"] + 0.5 * rows[0]["real_data/loss"], rel=1e-6)
    assert any(not torch.equal(plain[name], whole[name]) for name in plain)


def test_the_term_leaves_the_step_alone(
    loaded: WanBackbone, make_config: Callable[..., DistillConfig], captions: tuple[str, ...], folder: Path
) -> None:
    cfg = make_config(TERM.format(folder))
    rats = make(cfg, loaded)
    batch = draw_batch(rats.student, cfg, captions, 0)
    before = accumulate_gradient(rats.step, batch, 1)
    add_real_data(rats, rats.real_data, 4, 0, 1, before)  # type: ignore[arg-type]
    assert accumulate_gradient(rats.step, batch, 1) == before


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"vae": "x"}, "was prepared with another VAE"),
        ({"text": "x"}, "was prepared with another text encoder"),
        ({"shapes": {SIZE: (2, 2, 4, 4)}}, "its latents are (2, 2, 4, 4), the model's"),
    ],
)
def test_a_cache_of_another_model_is_one_line(
    command: Callable[..., Any], config_file: Path, tmp_path: Path, tiny_wan: Path, loaded: WanBackbone,
    clip: ClipSpec, changes: dict[str, Any], what: str,
) -> None:  # fmt: skip
    write(tmp_path / "cache", tiny_wan, loaded, clip, **changes)
    outcome = distill(command, config_file, tmp_path)
    assert outcome.code == 2
    assert f"{tmp_path / 'cache'}: {what}" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ("clip.fps=16", "its clips have 8 frames a second, the run's 16"),
        ("clip.num_frames=9", "it has no train clips of 9 x 32 x 32"),
        ("method.real_data.path=/nowhere", "/nowhere: no prepared clips here (make them: rats-video prepare)"),
        ("method.real_data.digest=x", "its clips are not those that this configuration was written with"),
        ("method.real_data.wait=1", "method.real_data.wait"),
    ],
)
def test_mistakes_are_one_line(
    command: Callable[..., Any], config_file: Path, folder: Path, tmp_path: Path, option: str, what: str
) -> None:
    outcome = distill(command, config_file, tmp_path, "--set", option, cache=folder)
    assert outcome.code == 2
    assert what in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run").exists()


def distill(
    command: Callable[..., Any], config_file: Path, folder: Path, *options: str, cache: Path | None = None
) -> Any:
    path = cache or folder / "cache"
    return command(
        "distill", "--config", config_file, "--output", folder / "run", "--set", f"method.real_data={{path: {path}}}",
        *options,
    )  # fmt: skip


def test_a_run_goes_on_with_its_own_clips_alone(
    command: Callable[..., Any], config_file: Path, tmp_path: Path, tiny_wan: Path, loaded: WanBackbone, clip: ClipSpec
) -> None:
    write(tmp_path / "cache", tiny_wan, loaded, clip)
    assert distill(command, config_file, tmp_path).code == 0
    assert distill(command, config_file, tmp_path, "--resume", "--set", "training.steps=3").code == 0
    lines = (tmp_path / "cache" / "clips.jsonl").read_text(encoding="utf-8")
    (tmp_path / "cache" / "clips.jsonl").write_text("\n".join(lines.splitlines()[:-1]), encoding="utf-8")
    outcome = distill(command, config_file, tmp_path, "--resume")
    assert outcome.code == 2
    assert "holds a run of another configuration: method.real_data.digest" in outcome.err
