"""`evaluate --vbench-layout`: a student's clips, and its teacher's, for VBench's official scorer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from rats_video.commands.device import explain_memory, start_runtime
from rats_video.commands.folders import clean_interrupt, locked_output, make_folder
from rats_video.commands.runs import load_run
from rats_video.commands.sample import identity
from rats_video.commands.students import LoadedStudent, load_student
from rats_video.datasets.prompts.split import check_prompt
from rats_video.errors import UserError
from rats_video.evaluation.sweep import EvaluatedModel
from rats_video.files import tidy, weights_digest
from rats_video.inference.manifest import is_whole
from rats_video.inference.sampler import clip_noise, fresh_noise, sample_batch
from rats_video.inference.vbench import (
    VBenchClip,
    VBenchPrompt,
    VBenchRecord,
    official_commands,
    read_vbench_prompts,
    vbench_clips,
)
from rats_video.inference.video import write_mp4
from rats_video.progress import ProgressBar
from rats_video.runtime import Runtime


def run_vbench(
    *,
    run: Path,
    base: Path | None,
    prompts: Path,
    dimensions: Sequence[str],
    nfe: int | None,
    with_teacher: bool,
    seed: int,
    output: Path,
    device: str,
) -> list[str]:
    """Make the missing clips of OUTPUT/student and, if asked for, OUTPUT/teacher; returns the lines to show.

    It can be stopped at any moment; the next call makes the rest.
    """
    folder, cfg = load_run(run)
    asked = read_vbench_prompts(prompts, dimensions)
    runtime = start_runtime(device)
    loaded = load_student(run, runtime.device, base)
    files = sorted(prompts.glob("*.txt")) if prompts.is_dir() else [prompts]
    for each in asked:
        check_prompt(each.prompt, loaded.student, where=str(prompts), files=files)
    options = cfg.evaluation
    arms = [EvaluatedModel("student", loaded.student, loaded.spec(nfe or loaded.card.num_steps[0]))]
    if with_teacher:
        arms.append(EvaluatedModel("teacher", loaded.base, cfg.judged_teacher))
    with (
        explain_memory(lambda: f"set evaluation.batch_size below {options.batch_size} in {folder.config}"),
        contextlib.ExitStack() as stack,
    ):
        if runtime.is_main:
            make_folder(output)
            stack.enter_context(locked_output(output))
            tidy(output)
        runtime.barrier()
        lines = [
            line
            for arm in arms
            for line in vbench_files(arm, loaded, asked, runtime, seed=seed, output=output, batch=options.batch_size)
        ]
    runtime.close()
    if not runtime.is_main:
        return []
    commands = [line for arm in arms for line in official_commands(output / arm.name, asked, dimensions)]
    return [*lines, "score them with VBench's own program (pip install vbench):", *commands]


def vbench_files(
    arm: EvaluatedModel,
    loaded: LoadedStudent,
    prompts: Sequence[VBenchPrompt],
    runtime: Runtime,
    *,
    seed: int,
    output: Path,
    batch: int,
) -> list[str]:
    """Write the clips of one model that OUTPUT/NAME lacks, and OUTPUT/NAME.json, which says what made them.

    Raises:
        UserError: the folder holds other clips, or anything else.
        Interrupted: by Ctrl-C; says how to go on.
    """
    folder, record = output / arm.name, output / f"{arm.name}.json"
    clips = vbench_clips(prompts, seed)
    _check_folder(folder, record)
    made_by = _record(arm, loaded, clips, seed).joined(record)
    runtime.barrier()  # no process writes before all have read
    if runtime.is_main:
        make_folder(folder)
        made_by.save(record)
    runtime.barrier()
    mine = [clips[i] for i in runtime.shard(len(clips))]
    todo = [clip for clip in mine if not is_whole(folder / clip.file, loaded.clip.num_frames)]
    with ProgressBar(arm.name, len(mine), start=len(mine) - len(todo)) as progress, clean_interrupt(output):
        for start in range(0, len(todo), batch):
            together = todo[start : start + batch]
            _make(arm, loaded, together, folder, runtime.rank)
            progress.advance(len(together))
    new = sum(runtime.gather(len(todo)))
    return [f"{arm.name}: {len(clips)} clips at {arm.spec.nfe} NFE, {new} of them new: {folder}"]


def _make(arm: EvaluatedModel, loaded: LoadedStudent, clips: Sequence[VBenchClip], folder: Path, rank: int) -> None:
    noise = torch.cat([clip_noise(arm.backbone, loaded.clip, clip.seed, 0) for clip in clips])
    fresh = fresh_noise(noise, [(clip.seed, 0) for clip in clips])
    videos, _ = sample_batch(arm.backbone, [clip.prompt for clip in clips], noise, arm.spec, fresh=fresh)
    aside = folder.with_name(f"{folder.name}-{rank}.mp4")  # what is half-written must not lie among the clips
    for clip, frames in zip(clips, videos, strict=True):
        write_mp4(frames.cpu(), aside, fps=loaded.clip.fps)
        try:
            aside.replace(folder / clip.file)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise UserError(f"cannot write the video: {error.strerror}", where=str(folder / clip.file)) from error


def _check_folder(folder: Path, record: Path) -> None:
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    fix = "give another --vbench-layout"
    if held and not record.is_file():
        raise UserError(f"holds files, and no {record.name} says what made them", where=str(folder), fix=fix)
    if strange := [name for name in held if not name.endswith(".mp4")]:
        raise UserError(
            f"holds {strange[0]!r}; VBench's scorer may then find no clip", where=str(folder), fix="move it away"
        )


def _record(arm: EvaluatedModel, loaded: LoadedStudent, clips: Sequence[VBenchClip], seed: int) -> VBenchRecord:
    is_student = arm.backbone is loaded.student
    return VBenchRecord(
        model=str(loaded.folder) if is_student else loaded.card.model,
        weights=identity(loaded) if is_student else weights_digest([loaded.model])[:16],
        num_steps=arm.spec.num_steps,
        nfe=arm.spec.nfe,
        guidance_scale=arm.spec.guidance_scale,
        guidance_scale_2=arm.spec.guidance_scale_2,
        negative_prompt=arm.spec.negative_prompt,
        shift=arm.spec.shift,
        clip=asdict(loaded.clip),
        seed=seed,
        clips=tuple(clips),
    )
