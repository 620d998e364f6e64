"""Fine-tuning on prepared clips: its loss, its noise levels, its averages; resumed, in parts, over processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from caches import write_cache
from torch import Tensor

from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.wan import WanBackbone
from rats_video.condition import Condition
from rats_video.datasets.prepared.cache import ClipCache
from rats_video.datasets.prepared.loader import ClipLoader
from rats_video.errors import Interrupted, UserError
from rats_video.pretraining import finetune
from rats_video.pretraining.finetune import (
    FinetuneConfig,
    accumulate_loss,
    draw_levels,
    evenly,
    fine_tune,
    flow_matching_losses,
    swap,
)
from rats_video.runtime import ALONE, Runtime
from rats_video.seeds import seeded
from rats_video.training.metrics import read_metrics
from rats_video.types import ClipSpec

SIZES = [ClipSpec(5, 32, 32, 8.0), ClipSpec(9, 32, 64, 8.0)]
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_wan: Path, captions: tuple[str, ...]) -> ClipCache:
    folder = tmp_path_factory.mktemp("cache")
    return ClipCache(
        write_cache(folder, tiny_wan, WanBackbone.from_pretrained(tiny_wan), captions[:9], clips=SIZES, num_heldout=3)
    )


def config(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate({
        "model": "m", "batch_size": 4, "steps": 4, "checkpoint_every": 1, "optimizer": {"lr": 1e-3}, "ema_decay": 0.5,
        "validation": {"every": 2, "num_clips": 2, "num_videos": 1, "num_steps": 1, "guidance_scale": 2.0}, **changes,
    })  # fmt: skip


class Answering:
    """A network that answers with the exact velocity, changed."""

    def __init__(self, velocity: Tensor) -> None:
        self.answer, self.seen = velocity, torch.zeros(0)

    def velocity(self, latents: Tensor, _sigma: Tensor, _text: Condition) -> Tensor:
        self.seen = latents
        return self.answer


def test_loss_is_zero_for_the_exact_velocity_and_square_of_its_error_clip_by_clip() -> None:
    x0, noise = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
    sigma, text = torch.tensor([0.25, 1.0]), Condition(torch.zeros(2, 1, 1))
    exact: Any = Answering(noise - x0)
    assert flow_matching_losses(exact, x0, noise, sigma, text).tolist() == [0, 0]
    torch.testing.assert_close(exact.seen[0], 0.75 * x0[0] + 0.25 * noise[0])
    assert torch.equal(exact.seen[1], noise[1])
    off = (noise - x0 + torch.tensor([2.0, 3.0]).view(2, 1, 1, 1, 1)).requires_grad_()
    losses = flow_matching_losses(Answering(off), x0, noise, sigma, text)  # type: ignore[arg-type]
    torch.testing.assert_close(losses, torch.tensor([4.0, 9.0]))
    losses.sum().backward()
    assert off.grad is not None
    torch.testing.assert_close(off.grad[1], torch.full_like(off[1], 2 * 3 / off[1].numel()).detach())


@pytest.mark.parametrize(("noise", "middle"), [("uniform", 0.5), ("logit_normal", 0.728)])
def test_levels_are_shifted_and_of_the_density_asked_for(noise: str, middle: float) -> None:
    """Shift s takes level u to s u / (1 + (s - 1) u); a normal variable is within log 3 of 0 in 0.728 of all cases."""
    plain = draw_levels(config(noise=noise, shift=1.0), 20_000, seeded(1))
    shifted = draw_levels(config(noise=noise, shift=3.0), 20_000, seeded(1))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert plain.min() >= 0
    assert plain.max() <= 1
    inner = ((plain > 0.25) & (plain < 0.75)).float().mean()
    assert float(inner) == pytest.approx(middle, abs=0.02)
    assert abs(plain.median() - 0.5) < 0.02


def trained(cfg: FinetuneConfig, model: Path, cache: ClipCache, folder: Path) -> tuple[WanBackbone, Weights]:
    base = WanBackbone.from_pretrained(model, with_text=False)
    torch.manual_seed(0)
    role = base.with_adapter("teacher", cfg.weights) if isinstance(cfg.weights, LoraConfig) else base
    fine_tune(cfg, role, cache, folder)
    return base, {name: weight.detach().clone() for name, weight in role.weights.items()}


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ends the training as Ctrl-C does once that many steps are done."""
    plain: Callable[..., Iterator[Any]] = finetune.resumable_steps

    def short(title: str, total: int, *args: Any, **options: Any) -> Iterator[Any]:
        for step, progress in plain(title, total, *args, **options):
            if step == steps:
                raise Interrupted("stopped")
            yield step, progress

    monkeypatch.setattr(finetune, "resumable_steps", short)


@pytest.mark.parametrize("weights", [{"kind": "full"}, {"kind": "lora", "rank": 2, "alpha": 4}])
def test_resumed_is_uninterrupted_bit_for_bit(
    weights: dict[str, Any], tiny_wan: Path, cache: ClipCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(weights=weights, prompt_dropout=0.3)
    base, whole = trained(cfg, tiny_wan, cache, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            trained(cfg, tiny_wan, cache, tmp_path / "parts")
    _, resumed = trained(cfg, tiny_wan, cache, tmp_path / "parts")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    rows, again = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert rows == again
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert ["heldout_loss" in row for row in rows] == [False, True, False, False]
    samples = sorted(path.parent.name for path in tmp_path.glob("whole/samples/*/*.mp4"))
    assert samples == ["step-000000", "step-000002", "step-000004"]
    before = WanBackbone.from_pretrained(tiny_wan).weights
    changed = [name for name, weight in base.denoiser.named_parameters() if ".lora_" not in name]
    same = [torch.equal(base.denoiser.get_parameter(name), before[name.replace(".base_layer", "")]) for name in changed]
    assert all(same) == (weights["kind"] == "lora")  # an adapter leaves the base as it was


def test_parts_of_a_batch_add_up(backbone: WanBackbone, cache: ClipCache) -> None:
    gradients = []
    for micro in (None, 1, 3):
        cfg = config(micro_batch_size=micro)
        batch = ClipLoader(cache, batch_size=4, seed=0).batch(0)
        backbone.denoiser.zero_grad(set_to_none=True)
        loss = accumulate_loss(cfg, backbone, batch, 0, ALONE)
        gradients.append([torch.tensor(loss), *(weight.grad for weight in backbone.weights.values())])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-5)


def test_two_processes_make_the_gradient_of_one(backbone: WanBackbone, cache: ClipCache) -> None:
    cfg, gradients = config(), []
    for count in (1, 2):
        total = [torch.zeros_like(weight) for weight in backbone.weights.values()]
        for rank in range(count):
            runtime = Runtime(torch.device("cpu"), rank, trainers=count)
            rows = runtime.rows(4)
            batch = ClipLoader(cache, batch_size=4, seed=0, rows=rows, prompt_dropout=0.5).batch(1)
            backbone.denoiser.zero_grad(set_to_none=True)
            accumulate_loss(cfg, backbone, batch, 1, runtime)
            for kept, weight in zip(total, backbone.weights.values(), strict=True):
                assert weight.grad is not None
                kept.add_(weight.grad / count)
        gradients.append(total)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


def test_result_is_the_average(tiny_wan: Path, cache: ClipCache, tmp_path: Path) -> None:
    """With one step the average is decay * start + (1 - decay) * end, the decay at first a tenth."""
    one = {"steps": 1, "validation": {"every": 9, "num_videos": 0}}
    start = WanBackbone.from_pretrained(tiny_wan).weights
    _, end = trained(config(**one, ema_decay=0), tiny_wan, cache, tmp_path / "plain")
    _, mean = trained(config(**one, ema_decay=0.5), tiny_wan, cache, tmp_path / "mean")
    assert any(not torch.equal(end[name], weight) for name, weight in start.items())
    for name, weight in mean.items():
        torch.testing.assert_close(weight, 0.1 * start[name].detach() + 0.9 * end[name], atol=1e-6, rtol=0)


def test_swap_and_choice() -> None:
    one, other = {"a": torch.tensor([1.0])}, {"a": torch.tensor([2.0]), "b": torch.tensor([3.0])}
    swap(one, other)
    assert (one["a"].item(), other["a"].item(), other["b"].item()) == (2, 1, 3)
    records: Any = list(range(10))
    assert evenly(records, 3) == [0, 3, 6]
    assert evenly(records, 30) == records
    assert evenly([], 3) == []


def test_loss_that_is_not_finite_ends_it(tiny_wan: Path, cache: ClipCache, tmp_path: Path) -> None:
    base = WanBackbone.from_pretrained(tiny_wan, with_text=False)
    with torch.no_grad():
        next(iter(base.weights.values())).fill_(math.nan)
    cfg = config(validation={"every": 9, "num_videos": 0})
    with pytest.raises(UserError, match=r"^optimizer\.lr: the loss of step 1 is nan"):
        fine_tune(cfg, base, cache, tmp_path)


def test_cogvideox_is_trained_at_its_own_levels() -> None:
    """Its noise levels are part of the model: between two of them it never saw a clip."""
    from rats_video.backbones.cogvideox import CogVideoXBackbone

    levels = torch.tensor([0.1, 0.4, 1.0])
    model: Any = SimpleNamespace(_levels=levels)
    model._timesteps = lambda sigma: CogVideoXBackbone._timesteps(model, sigma)
    near = CogVideoXBackbone.nearest_levels(model, torch.tensor([0.0, 0.3, 0.69, 0.9]))
    torch.testing.assert_close(near, torch.tensor([0.1, 0.4, 0.4, 1.0]))
