"""`export model` as a user runs it: the embedded student, the card, and what goes wrong leaving nothing behind."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import math
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from tiny_student import save_lora_student

from rats_video.assets import ASSETS
from rats_video.backbones.wan import WanBackbone
from rats_video.commands.students import load_student
from rats_video.config.load import write_resolved
from rats_video.errors import UserError
from rats_video.export.base import Clips
from rats_video.export.card import escape
from rats_video.export.kinds import FORMS
from rats_video.export.usage import fenced
from rats_video.export.verify import Difference, check
from rats_video.inference.sampler import SamplerSpec, clip_noise, sample_videos

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def run(loaded: WanBackbone, tiny_wan: Path, make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run with what a run leaves: configuration, environment, evaluation, guard."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    (folder / "evaluation").mkdir(parents=True)
    write_resolved(make_config("model=" + str(tiny_wan)), folder / "config.resolved.yaml")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13", "device": "cpu: <b>*fast*</b>"}))
    (folder / "evaluation" / "evaluation.md").write_text("| arm | reward |\n| --- | ---: |\n| student | 0.5 |\n")
    looks = [{"step": 2, "drift": 0.1, "alarms": [], "scores": {"reward": [1.0, 2.0]}}]
    (folder / "guard.json").write_text(json.dumps({"best": 2, "teacher": {"reward": [0.0, 0.5]}, "looks": looks}))
    save_lora_student(loaded, tiny_wan, 4, folder / "student")
    return folder


def refused(outcome: Any, expected: str) -> None:
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in outcome.err
    assert expected in outcome.err


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_as_distill_leaves_it(command: Command, config_file: Path, tmp_path: Path) -> None:
    begun = command("distill", "--config", config_file, "--output", tmp_path / "run", "--device", "cpu")
    assert begun.code == 0, begun.err
    done = command("export", "model", tmp_path / "run", "--format", "merged")
    assert done.code == 0, done.err
    card = (tmp_path / "run" / "export" / "merged" / "README.md").read_text()
    assert f"torch {torch.__version__}" in card
    assert platform.node() not in card
    assert "command" not in card


# ----------------------------------------------------------------------------------------------- the embedded student


@pytest.fixture(scope="module")
def embedded(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded")
    for kind in ("diffusers", "int8"):
        options = ["--format", kind, "--output", folder / kind, "--num-clips", 2]
        code, out, err = command("export", "model", "tiny-wan-student", *options)
        assert (code, err) == (0, ""), err
        (folder / f"{kind}.txt").write_text(out)
    return folder


@torch.no_grad()
def test_stock_pipeline_gives_our_samplers_frames(embedded: Path) -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(embedded / "diffusers")
    pipeline.set_progress_bar_config(disable=True)
    student = load_student(ASSETS / "tiny-wan-student", torch.device("cpu"))
    prompt, noise = (
        "a fast red circle moving left on a gray background",
        clip_noise(student.student, student.clip, 9, 0),
    )
    (ours,) = sample_videos(student.student, [prompt], student.clip, SamplerSpec(4, 3.0), seed=9)
    theirs = pipeline(
        prompt, num_inference_steps=4, guidance_scale=1.0, latents=noise, num_frames=17, height=64, width=64,
        output_type="pt",
    ).frames  # fmt: skip
    torch.testing.assert_close(theirs, ours.videos, atol=1e-5, rtol=0)
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def test_loss_by_quantising_is_measured(embedded: Path) -> None:
    """Two held-out clips: in pixels, in adherence and in both rewards; what is printed is what the card says."""
    printed, card = (embedded / "int8.txt").read_text(), (embedded / "int8" / "README.md").read_text()
    before, after = map(float, re.findall(r"denoiser: (\S+) MiB before, (\S+) MiB after", printed)[0])
    assert 1.7 < after < before / 2
    assert 30 < float(re.findall(r"PSNR (\S+) dB", printed)[0]) < 90
    for measure in ("trained reward", "held-out reward", "adherence"):
        (row,) = re.findall(rf"\| {measure} +\|.*", printed)
        student, quantised = (float(cell) for cell in row.split("|")[2:4])
        assert abs(student - quantised) < 0.1
        assert row in card


def test_card_of_the_embedded_student(embedded: Path) -> None:
    text = (embedded / "diffusers" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert (head["base_model"], head["library_name"], head["license"]) == ("tiny-wan", "diffusers", "apache-2.0")
    assert head["pipeline_tag"] == "text-to-video"
    assert "1.00000000, 0.89999998, 0.75000000, 0.50000000, 0.00000000" in text
    record = json.loads((ASSETS / "tiny-wan-student" / "training.json").read_text())
    assert "This is for diffusers alone" in text
    assert "--format comfyui" not in text  # which cannot load this one
    assert f"{record['config']['training']['steps']} optimizer steps" in text
    assert re.search(rf"\| adherence +\| +{record['metrics']['adherence']:.3f} \|", text)


# ------------------------------------------------------------------------------------------------------------ a run's


def test_card_of_a_run(command: Command, run: Path, tiny_wan: Path) -> None:
    (tiny_wan / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: [x]\n---\n# Tiny\n")
    code, out, err = command("export", "model", run, "--format", "lora")
    (tiny_wan / "README.md").unlink()
    assert (code, err) == (0, "")
    assert out.startswith(f"lora: {run / 'export' / 'lora'}\n")
    text = (run / "export" / "lora" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert (head["license"], head["license_name"], head["base_model_relation"]) == ("other", "mine", "adapter")
    assert "| student | 0.5 |" in text
    assert re.search(r"\| trained reward \| +0\.25 \| +1\.5 \|", text)
    assert r"\<b\>\*fast\*\</b\>" in text
    settings = text.split("```yaml\n")[1]
    assert f"model: {tiny_wan.name}\n" in settings
    assert str(tiny_wan.parent) not in settings  # no path of this machine's
    assert out.splitlines()[1] in text


def test_run_and_its_student_are_the_same(command: Command, run: Path, tmp_path: Path) -> None:
    for source in (run, run / "student"):
        output = tmp_path / source.name
        assert command("export", "model", source, "--format", "merged", "--no-verify", "--output", output).code == 0
        assert "not compared with our sampler" in (output / "README.md").read_text()
    files = [(tmp_path / name / "transformer" / "config.json").read_bytes() for name in ("mine", "student")]
    assert files[0] == files[1]


def test_nothing_is_sampled_without_verification(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("commands.export_clips.sample_videos", "export.verify.sample_stock"):
        monkeypatch.setattr(f"rats_video.{name}", lambda *_, **__: pytest.fail("sampled"))
    options = ["--format", "diffusers", "--no-verify", "--output", tmp_path / "out"]
    assert command("export", "model", run, *options).code == 0


# ---------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("run", ["--format", "gguf"], "'gguf' is not one of 'diffusers', 'lora', 'comfyui'"),
        ("run", [], "Missing option '--format'"),
        ("run", ["--format", "merged", "--scale", "-1"], "'--scale'"),
        ("run", ["--format", "lora", "--scale", "0.5"], "--scale: a LoRA is scaled where it is loaded"),
        ("run", ["--format", "merged", "--device", "cuda:99"], "--device: cuda:99 is not here"),
        ("nowhere", ["--format", "merged"], "nowhere/student: no student here"),
        ("tiny-wan-student", ["--format", "lora"], "--format lora: this student is no LoRA"),
        ("tiny-wan", ["--format", "merged"], "no student here"),
        ("run", ["--format", "merged", "--output", "taken"], "taken: is a file"),
        ("run", ["--format", "merged", "--output", "taken/below"], "taken/below: cannot write the export"),
        ("run", ["--format", "merged", "--output", "full"], "full: already exists and is not empty (add --overwrite"),
    ],
)
def test_bad_input_is_one_line(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    source: str, options: list[str], expected: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    options = options if "--output" in options else [*options, "--output", "new"]
    refused(command("export", "model", run if source == "run" else source, *options), expected)
    assert names(tmp_path) == ["full", "taken"]
    assert names(tmp_path / "full") == ["mine"]


def test_output_may_not_hold_what_it_is_made_from(command: Command, run: Path) -> None:
    for output in (run, run / "student", run.parent):
        outcome = command("export", "model", run, "--format", "merged", "--output", output, "--overwrite")
        refused(outcome, f"{output}: holds {run}")
    assert (run / "student" / "rats.json").is_file()


def test_torchao_missing(command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else find(name, *a))
    outcome = command("export", "model", run, "--format", "int8", "--output", tmp_path / "new")
    refused(outcome, "quantising needs torchao (pip install 'rats-video[quant]'")


def test_wrong_noise_levels_are_found_and_nothing_is_kept(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published trap: a scheduler that shifts twice. With --overwrite, what was there stays."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    monkeypatch.setattr("diffusers.FlowMapEulerDiscreteScheduler", FlowMatchEulerDiscreteScheduler)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")
    options = ["--format", "diffusers", "--output", tmp_path / "out", "--overwrite"]
    refused(command("export", "model", run, *options), "the stock pipeline does not sample what the student does")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_full_disk_leaves_nothing(command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rats_video.backbones.lora.save_file", full)
    outcome = command("export", "model", run, "--format", "lora", "--output", tmp_path / "out")
    refused(outcome, f"{tmp_path / 'out'}: cannot write the export: No space left on device")
    assert names(tmp_path) == []


def test_damaged_record_of_a_run(command: Command, run: Path, tmp_path: Path) -> None:
    whole = (run / "guard.json").read_text()
    (run / "guard.json").write_text("{")
    outcome = command("export", "model", run, "--format", "merged", "--no-verify", "--output", tmp_path / "out")
    (run / "guard.json").write_text(whole)
    refused(outcome, f"{run / 'guard.json'}: is damaged")
    assert names(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------- its parts


def test_the_command_offers_each_form() -> None:
    """cli/export.py names them once more, because Typer needs them without torch."""
    from rats_video.cli.export import model

    names, _option = get_args(get_type_hints(model, include_extras=True)["kind"])
    assert get_args(names) == tuple(form.name for form in FORMS)


def test_escape_and_fence() -> None:
    assert escape("- a_b\n<i>x</i> [l](u) `c`") == r"\- a\_b \<i\>x\</i\> \[l\]\(u\) \`c\`"
    assert fenced("a\n```\nb", "text") == "````text\na\n```\nb\n````"


def test_difference() -> None:
    clip, latents = torch.zeros(1, 2, 3, 4, 4), torch.full((1, 4), 2.0)
    same = Clips(clip, latents)
    assert str(Difference.of(same, same)) == (
        "relative difference of the latents 0; largest pixel difference 0, mean 0, PSNR inf dB"
    )
    other = clip.clone()
    other[0, 0, 0, 0, 0] = 0.5
    found = Difference.of(same, Clips(other, torch.tensor([[2.0, 2, 2, 1]])))
    assert (found.latents, found.largest, found.mean) == (0.25, 0.5, 0.5 / 96)
    assert found.psnr == pytest.approx(25.843, abs=1e-3)  # 10 log10(96 / 0.25)


@pytest.mark.parametrize(
    ("dtype", "loses", "latents", "psnr", "good"),
    [
        (torch.float32, False, 1e-5, 80.0, True),  # rounding in A14B, whose pixels were 1.7e-4 apart
        (torch.float32, False, 0.01, 80.0, False),  # another frame rate
        (torch.float32, False, 1e-5, 20.0, False),  # another VAE
        (torch.float32, False, math.nan, 80.0, False),
        (torch.bfloat16, False, 0.034, 40.0, True),  # rounding
        (torch.bfloat16, False, 0.4, 40.0, False),  # other noise levels
        (torch.bfloat16, True, 0.4, 40.0, True),  # eight bits
        (torch.bfloat16, True, 0.1, 14.0, False),
    ],
)
def test_what_is_still_the_student(dtype: torch.dtype, *, loses: bool, latents: float, psnr: float, good: bool) -> None:
    difference = Difference(latents, largest=0.1, mean=0.01, psnr=psnr)
    with contextlib.nullcontext() if good else pytest.raises(UserError, match="does not sample what the student does"):
        check(difference, dtype, loses=loses, where="--format merged")
