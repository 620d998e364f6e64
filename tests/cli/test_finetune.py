"""`train teacher --data`, driven as a user would: what it leaves, what it says, and what it refuses."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import break_digest, write_cache
from safetensors.torch import load_file

from rats_video.backbones.identity import text_digest, vae_digest
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.wan import WanBackbone
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

Command = Callable[..., Any]
CONFIG = """
model: {model}
batch_size: 4
steps: 3
optimizer: {{lr: 2.0e-3}}
ema_decay: 0.0
validation: {{every: 2, num_clips: 3, num_videos: 1, num_steps: 2, guidance_scale: 2.0}}
"""
CLIP = ClipSpec(5, 32, 32, 8.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_wan: Path, captions: tuple[str, ...]) -> Path:
    backbone = WanBackbone.from_pretrained(tiny_wan)
    return write_cache(tmp_path_factory.mktemp("data") / "cache", tiny_wan, backbone, captions[:9], clips=[CLIP],
                       num_heldout=3)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, tiny_wan: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG.format(model=tiny_wan))
    return path


def losses(output: Path) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((output / "training.json").read_text())["metrics"]
    return metrics


def test_all_weights(command: Command, config: Path, data: Path, tiny_wan: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    code, out, err = command("train", "teacher", "--data", data, "--config", config, "--output", output)
    assert code == 0, err
    told = losses(output)
    assert told["change"] == pytest.approx(told["heldout_loss_after"] - told["heldout_loss_before"])
    assert f"{told['heldout_loss_before']:.4f} before, {told['heldout_loss_after']:.4f} after" in out
    assert "3 sources" in out
    pipeline = output / "pipeline"
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        compared = filecmp.dircmp(tiny_wan / part, pipeline / part)
        assert [*compared.left_only, *compared.right_only, *compared.diff_files] == []
    assert vae_digest(pipeline) == vae_digest(tiny_wan)
    assert text_digest(pipeline) == text_digest(tiny_wan)
    before, after = (
        load_file(folder / "transformer/diffusion_pytorch_model.safetensors") for folder in (tiny_wan, pipeline)
    )
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
    assert not (output / "checkpoints").exists()
    assert (output / "training.png").is_file()

    # What it says is next works as it stands, and the same clips are sampled by stock diffusers' transformer.
    sample = next(line for line in out.splitlines() if "rats-video sample" in line)
    assert f"--model {pipeline} --nfe 4 " in sample
    code, _, err = command(
        "sample", "--model", pipeline, "--nfe", 4, "--prompt", "a red circle", "--output", tmp_path / "s"
    )
    assert code == 0, err
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert "num_steps" in json.dumps(manifest)
    code, _, err = command("sample", "--model", pipeline, "--nfe", 3, "--output", tmp_path / "odd")
    assert (code, err) == (2, "error: --nfe 3: guidance takes two calls a step (give an even number)\n")

    again = command("train", "teacher", "--data", data, "--config", config, "--output", output, "--resume")
    assert (again.code, again.out) == (0, f"done before: {output}\n")


def test_adapter_is_saved_and_merged(
    command: Command, config: Path, data: Path, tiny_wan: Path, tmp_path: Path
) -> None:
    from diffusers import WanPipeline

    output = tmp_path / "lora"
    options = ("--set", "weights.kind=lora", "--set", "weights.rank=2", "--set", "weights.alpha=4")
    code, _, err = command("train", "teacher", "--data", data, "--config", config, "--output", output, *options)
    assert code == 0, err
    merged, base = load_backbone(output / "pipeline"), load_backbone(tiny_wan)
    adapted = base.load_role(output / "lora", "teacher")
    noise, sigma = base.sample_noise(1, CLIP, seeded(1)), torch.tensor([0.7])
    text = base.encode_text(["a red circle"])
    with torch.no_grad():
        ours, theirs = merged.velocity(noise, sigma, text), adapted.velocity(noise, sigma, text)
        plain = load_backbone(tiny_wan).velocity(noise, sigma, text)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours - plain).abs().max() > 1e-4
    assert not [key for key in merged.weights if "lora" in key]
    stock = WanPipeline.from_pretrained(output / "pipeline")
    assert all(torch.equal(weight, stock.transformer.get_parameter(name)) for name, weight in merged.weights.items())


def test_what_made_it_worse_is_said(command: Command, config: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "worse"
    options = ("--set", "optimizer.lr=3.0", "--set", "steps=4")
    code, out, err = command("train", "teacher", "--data", data, "--config", config, "--output", output, *options)
    assert code == 0, err
    assert losses(output)["change"] > losses(output)["change_ci95"]
    assert ": WORSE: fewer steps, a lower optimizer.lr, or more clips\n" in out


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"vae": "0" * 64}, "was prepared with another VAE"),
        ({"text": "0" * 64}, "was prepared with another text encoder"),
        ({"complete": False}, "its preparation did not come to its end"),
    ],
)
def test_cache_of_another_model_is_refused_before_anything_is_touched(
    command: Command, config: Path, data: Path, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    other, output = tmp_path / "other", tmp_path / "out"
    shutil.copytree(data, other)
    break_digest(other, **changes)
    code, out, err = command("train", "teacher", "--data", other, "--config", config, "--output", output)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {other}: {line}")
    assert err.count("\n") == 1
    assert not output.exists()


def without(data: Path, split: str, folder: Path, **settings: object) -> Path:
    """A copy of a cache without the clips of one split, made with these settings."""
    shutil.copytree(data, folder)
    lines = (folder / "clips.jsonl").read_text().splitlines(keepends=True)
    (folder / "clips.jsonl").write_text("".join(line for line in lines if f'"split": "{split}"' not in line))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"] |= settings
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("missing", "what", "fix"),
    [
        ("train", "to train on", "with a smaller heldout share: --set heldout=0 trains on all of them"),
        (
            "heldout", "held out for validation",
            "with another heldout share or seed: --set heldout=0 trains on all, unvalidated",
        ),
    ],
)  # fmt: skip
def test_a_cache_needs_clips_of_both_kinds(
    command: Command, config: Path, data: Path, tmp_path: Path, missing: str, what: str, fix: str
) -> None:
    other, output = without(data, missing, tmp_path / "other", heldout=0.05), tmp_path / "out"
    code, _, err = command("train", "teacher", "--data", other, "--config", config, "--output", output)
    assert (code, err) == (2, f"error: {other}: it has no clips {what} (prepare more videos, or {fix})\n")
    assert not output.exists()


def test_nothing_held_out_on_purpose(command: Command, config: Path, data: Path, tmp_path: Path) -> None:
    cache, output = without(data, "heldout", tmp_path / "cache", heldout=0.0), tmp_path / "out"
    code, out, err = command("train", "teacher", "--data", cache, "--config", config, "--output", output)
    assert code == 0, err
    said = "no clips are held out, so nothing can tell whether training helps or only repeats them"
    assert err.count(f"warning: {cache}: {said}\n") == 1
    assert out.startswith("no clips were held out: look at what it makes\n")
    record = json.loads((output / "training.json").read_text())
    assert (record["metrics"], record["heldout"]) == ({}, {"clips": [], "before": [], "after": []})
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "heldout_loss" in row) for row in rows] == [(1, False), (2, False), (3, False)]
    assert (output / "training.png").is_file()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--set", "validation.sigmas=[]"], "validation.sigmas"),
        (["--set", "steps=0"], "steps"),
        (["--set", "compute.offload=block"], "all weights train"),
        (["--set", "clip.height=3"], "clip"),
        (["--set", "weights.kind=lora", "--set", "weights.targets=[nothing]"], "no layer of the denoiser is called"),
        (["--resume", "--overwrite"], "cannot be used with"),
    ],
)
def test_mistakes_are_one_line(
    command: Command, config: Path, data: Path, tmp_path: Path, options: list[str], line: str
) -> None:
    output = tmp_path / "out"
    code, out, err = command("train", "teacher", "--data", data, "--config", config, "--output", output, *options)
    assert (code, out) == (2, "")
    assert line in err
    assert "Traceback" not in err
    assert not output.exists() or not list(output.iterdir())


def test_folder_without_clips_is_refused(command: Command, config: Path, tmp_path: Path) -> None:
    code, _, err = command("train", "teacher", "--data", tmp_path, "--config", config, "--output", tmp_path / "out")
    assert (code, err) == (2, f"error: {tmp_path}: no prepared clips here (make them: rats-video prepare)\n")


def test_another_configuration_is_not_gone_on_with(command: Command, config: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ("train", "teacher", "--data", data, "--config", config, "--output", output)
    assert command(*options).code == 0
    code, _, err = command(*options, "--resume", "--set", "optimizer.lr=0.5", "--set", "micro_batch_size=1")
    assert code == 2
    assert "optimizer.lr differ" in err  # and not how much is done at a time
