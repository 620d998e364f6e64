"""The Python API: load a student or a reward, distill, evaluate. `import rats_video` loads it when asked for.

Clips are float32 tensors `[T, 3, H, W]`: T frames, red, green and blue, H x W pixels, in [0, 1], on the CPU. A user's
mistake raises `UserError`, whose text is one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from rats_video.arguments import check_count, in_python
from rats_video.assets import ASSETS, is_embedded
from rats_video.commands.device import explain_memory, pick_device
from rats_video.commands.distill import run_distill
from rats_video.commands.evaluate import run_evaluate
from rats_video.commands.sample import BATCH_SIZE
from rats_video.commands.sample_pictures import Pictures, make_clips
from rats_video.commands.students import DEFAULT_STUDENT, LoadedStudent, SampleChoices, find_student, load_chosen
from rats_video.config.explain import KIND, explain
from rats_video.config.load import as_overrides
from rats_video.datasets.prompts.split import check_prompt
from rats_video.errors import UserError
from rats_video.evaluation.tables import ArmRow, read_rows
from rats_video.inference.requests import in_batches, list_requests
from rats_video.inference.video import write_clip
from rats_video.quiet import quiet_libraries
from rats_video.rewards.reward import build_reward, reward_kinds
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.types import ClipSpec, Reward

__all__ = ["Run", "Student", "UserError", "distill", "evaluate", "load_reward"]

PathLike = str | Path
OnStep = Callable[[int, Mapping[str, float]], None]

quiet_libraries()


@dataclass(frozen=True)
class Student:
    """A few-step student, or a pipeline that nobody distilled, ready to sample; made by `Student.load`."""

    loaded: LoadedStudent

    @classmethod
    @in_python()
    def load(
        cls,
        model: PathLike = DEFAULT_STUDENT,
        *,
        device: str = "auto",
        base: PathLike | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Student:
        """Load a student as `rats-video sample --model` does.

        Args:
            model: a run, a student or a pipeline: a folder, USER/NAME on the model hub, or the name of an embedded
                one.
            device: `auto` (the GPU if there is one), `cpu`, `cuda` or `cuda:N`.
            base: where the student's base pipeline is now; None = where it was.
            num_frames: of a clip, in place of what it was trained at.
            height: in pixels, likewise.
            width: in pixels, likewise.

        Raises:
            UserError: there is none, or it cannot make clips of this size.
        """
        asked = {"num_frames": num_frames, "height": height, "width": width}
        for name, value in asked.items():
            check_count(name, value, optional=True)
        size = {name: value for name, value in asked.items() if value is not None}
        choices = SampleChoices(None if base is None else Path(base), size)
        return cls(load_chosen(find_student(model), pick_device(device), choices))

    @property
    def clip(self) -> ClipSpec:
        """The size of its clips: `num_frames`, `height` and `width` in pixels, `fps` frames a second."""
        return self.loaded.clip

    @in_python()
    def sample(
        self,
        prompt: str | Sequence[str],
        nfe: int | None = None,
        *,
        seed: int = 0,
        image: PathLike | None = None,
        last_image: PathLike | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Tensor:
        """Make clips: the same frames as `rats-video sample` makes of the same prompts and seed.

        Args:
            prompt: what the clip shows; or B prompts.
            nfe: network evaluations a clip; None = 4, or a plain pipeline's own.
            seed: of the starting noise, whose i-th is that of the i-th prompt.
            image: the picture that each clip starts from, scaled to cover it and cut; for models that take one.
            last_image: the picture that each clip ends at, likewise.
            batch_size: clips made together.

        Returns:
            Pixels `[T, 3, H, W]` in [0, 1], or `[B, T, 3, H, W]` of B prompts; float32 on the CPU.

        Raises:
            UserError: the model cannot follow the prompt, or take the picture.
        """
        prompts = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else [prompt]
        if not prompts:
            raise UserError("no prompt", where="prompt", fix="say what the clip shows")
        check_count("nfe", nfe, optional=True)
        check_count("seed", seed, 0)
        for name, path in {"image": image, "last_image": last_image}.items():
            if path is not None and not isinstance(path, PathLike):
                raise UserError(f"must be a path, got {type(path).__name__}", where=name, fix="save it as a picture")
        check_count("batch_size", batch_size)
        nfe = nfe or self.loaded.default_nfe
        spec = self.loaded.spec(nfe)
        for text in prompts:
            if not isinstance(text, str):
                raise UserError(f"must be text, got {text!r}", where="prompt")
            check_prompt(text, self.loaded.student, where="prompt")
        first, last = (None if path is None else str(path) for path in (image, last_image))
        pictures = Pictures(self.loaded, None)
        requests = pictures.usable(
            [replace(request, image=first, last_image=last) for request in list_requests(prompts, nfe=nfe, seed=seed)]
        )
        with explain_memory(lambda: f"use a batch_size below {batch_size}"):
            batches = in_batches(requests, batch_size)
            clips = torch.cat([make_clips(self.loaded, batch, spec, pictures)[0].float().cpu() for batch in batches])
        return clips[0] if isinstance(prompt, str) else clips

    @in_python()
    def save(self, frames: Tensor, path: PathLike) -> None:
        """Write frames `[T, 3, H, W]` in [0, 1] as an mp4 (H.264) at the student's frames a second; one as a PNG, too.

        Raises:
            UserError: the name ends in neither `.mp4` nor, for one frame, `.png`; or `frames` are no such tensor.
        """
        path = Path(path)
        if not isinstance(frames, Tensor):
            raise UserError(f"must be a tensor, got {type(frames).__name__}", where="frames", fix="torch.as_tensor it")
        if frames.ndim != 4:
            raise UserError(
                f"must be [T, 3, H, W], got {list(frames.shape)}", where="frames", fix="save one clip at a time"
            )
        is_picture = len(frames) == 1
        if path.suffix not in ({".mp4", ".png"} if is_picture else {".mp4"}):
            what = "1 frame is written as .mp4 or .png" if is_picture else f"{len(frames)} frames are written as .mp4"
            near = path.with_suffix(".png" if is_picture else ".mp4").name
            raise UserError(what, where=str(path), fix=f"name it {near}")
        try:
            write_clip(frames, path, fps=self.clip.fps, remarks={})
        except ValueError as error:
            raise UserError(str(error).removeprefix("frames "), where="frames") from error


@in_python()
def load_reward(name: PathLike, *, device: str = "auto", clip: ClipSpec | None = None, **settings: Any) -> Reward:
    """Load a reward, frozen: `reward(videos, prompts)` gives `RewardScores`.

    `videos` are `[B, T, 3, H, W]` in [0, 1] on `device`, `prompts` are B. Of the scores, higher is better: `clip` is
    `[B]`, `frames` `[B, T]` or None, `parts` named `[B]`. Most rewards carry gradient to the pixels
    (`rats-video rewards list`).

    Args:
        name: a kind of reward, such as `pickscore`; or a folder that `rats-video train reward` wrote, or the name of an
            embedded one, such as `shapes-reward`.
        device: `auto` (the GPU if there is one), `cpu`, `cuda` or `cuda:N`.
        clip: size of the clips, for rewards that must know their frames a second; see `Student.clip`.
        settings: of the kind, as under `reward:` in a configuration, such as `path="models/PickScore_v1"`.

    Raises:
        UserError: there is no such reward, its weights are not at hand, or a setting is wrong.
    """
    kinds, text = reward_kinds(), str(name)
    if text not in kinds and "/" not in text and not is_embedded(text) and not Path(text).exists():
        names = [*kinds, *sorted(folder.name for folder in ASSETS.glob("*-reward*"))]
        near = difflib.get_close_matches(text, names, n=1)
        fix = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}; or give a folder"
        raise UserError(f"no such reward: {text}", where="load_reward", fix=fix)
    tree = {KIND: text, **settings} if text in kinds else {KIND: "word", "path": text, **settings}
    member, where = kinds[str(tree[KIND])], "load_reward"
    try:
        cfg: Any = member.model_validate(tree)
    except ValidationError as error:
        raise explain(error, member, tree, [(where, tree)]) from error
    return build_reward(cfg, pick_device(device), where=where, clip=clip)


@dataclass(frozen=True)
class Run:
    """A finished distillation: its folder, which all `rats-video` commands take."""

    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The log row of each step, as `metrics.jsonl` holds it: `step`, `loss`, `reward/student` and others."""
        path = RunFolder(self.folder).metrics
        if not path.is_file():
            raise UserError("not a run: it has no metrics.jsonl", where=str(self.folder))
        return read_metrics(path)

    def student(self, *, device: str = "auto") -> Student:
        """Load the student that it ended with."""
        return Student.load(self.folder, device=device)


@in_python()
def distill(
    config: PathLike = "tiny",
    output: PathLike = "runs/tiny",
    *,
    settings: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
    seed: int | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> Run:
    """Distill a student, as `rats-video distill` does.

    Args:
        config: the name of a packaged configuration, or a YAML file.
        output: folder of the run.
        settings: changes of the configuration by dotted key, such as `{"training.steps": 100}`.
        on_step: called after each step with its number, from 1, and what is logged of it, as `Run.metrics`. What it
            raises ends the training; `resume` goes on from the last checkpoint.
        seed: of all randomness; None = the configuration's.
        device: `auto` (the GPU if there is one), `cpu`, `cuda` or `cuda:N`.
        resume: go on with the run in `output`, exactly.
        overwrite: replace it.

    Raises:
        UserError: the configuration is wrong, or `output` holds something.
        Interrupted: by Ctrl-C, after the step that it came in, with a checkpoint.
    """
    check_count("seed", seed, 0, optional=True)
    changes = as_overrides(settings or {})
    if resume and overwrite:
        raise UserError("cannot be used with overwrite", where="resume", fix="give one of them")
    run_distill(
        config=str(config), overrides=changes, output=Path(output), seed=seed, device=device, resume=resume,
        overwrite=overwrite, on_step=on_step,
    )  # fmt: skip
    return Run(Path(output))


@in_python()
def evaluate(
    run: Run | PathLike,
    *,
    nfe: int | Sequence[int] | None = None,
    num_clips: int | None = None,
    seed: int = 0,
    output: PathLike | None = None,
    device: str = "auto",
) -> list[ArmRow]:
    """Score teacher, base model and student on held-out prompts from the same noise, as `rats-video evaluate` does.

    Args:
        run: a finished distillation.
        nfe: network evaluations a clip to measure at; None = the run's configuration.
        num_clips: to score of each; None = the run's configuration.
        seed: of the starting noise.
        output: folder for the table and the figure; None = `evaluation` in the run.
        device: `auto` (the GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Returns:
        One row an arm: `arm`, `nfe`, `num_clips`, and `metrics` by name, each with its `mean` and `ci95`, half the
        width of its 95% interval over prompts.

    Raises:
        UserError: there is no finished run.
    """
    folder = run.folder if isinstance(run, Run) else Path(run)
    counts = None if nfe is None else tuple(nfe) if isinstance(nfe, Sequence) else (nfe,)
    for count in counts or ():
        check_count("nfe", count)
    check_count("num_clips", num_clips, optional=True)
    check_count("seed", seed, 0)
    written = RunFolder(folder).evaluation if output is None else Path(output)
    run_evaluate(run=folder, base=None, nfe=counts, num_clips=num_clips, seed=seed, output=written, device=device)
    return read_rows(written / "evaluation.json")
