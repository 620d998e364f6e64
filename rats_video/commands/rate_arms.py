"""The clips that people rate: sampled from the runs, or those that `sample` made, matched by prompt and noise."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rats_video.commands.device import explain_memory, pick_device
from rats_video.commands.folders import make_folder
from rats_video.commands.prompts import EXAMPLE_PROMPTS
from rats_video.commands.runs import config_near
from rats_video.commands.sample import sample_files
from rats_video.commands.students import LoadedStudent, SampleChoices, find_student, load_chosen
from rats_video.commands.teacher import judged_teacher
from rats_video.datasets.prompts.files import read_rows
from rats_video.datasets.prompts.split import load_prompts
from rats_video.errors import UserError, warn
from rats_video.evaluation.tables import TEACHER
from rats_video.inference.audio import read_sound
from rats_video.inference.manifest import MANIFEST, SampledClip, read_clips
from rats_video.inference.requests import Request, list_requests
from rats_video.inference.video import read_clip, write_clip
from rats_video.rating.record import CHECK_EVERY, CHECKS, CLIPS, Asked, RatedClips, Rating, ShownPair
from rats_video.runtime import Runtime
from rats_video.seeds import seeded

_NUM_PROMPTS = 16
_GRAIN = 0.35  # of full brightness: nobody prefers it
_NOISE = ("prompt", "seed", "noise", "image", "last_image")
"""What clips of one prompt and noise have in common."""


@dataclass(frozen=True)
class RateOptions:
    """How clips are made, and of what."""

    nfe: int | None
    prompts: Sequence[str]
    prompts_file: Path | None
    num_videos: int | None
    seed: int
    device: str
    batch_size: int

    @property
    def are_given(self) -> bool:
        """True if the command line says which clips."""
        return bool(self.prompts) or self.prompts_file is not None


def make_rating(runs: Sequence[Path], options: RateOptions, asked: Asked, output: Path) -> Rating:
    """Make every arm's clips in OUTPUT/clips, and the damaged copies of the attention checks; writes rating.json last.

    Raises:
        UserError: there is no clip that all arms have, they differ in size, or a run cannot be sampled.
    """
    arms = {name: find_student(run, where="RUN") for name, run in zip(arm_names(runs), runs, strict=True)}
    _check_arms(arms)
    sampled = {name: read_clips(folder) for name, folder in arms.items() if (folder / MANIFEST).is_file()}
    if len(arms) == len(sampled) == 1:
        raise UserError("nothing to compare these clips with", where=str(runs[0]), fix="name another run or folder")
    wanted = _of_manifest(next(iter(sampled.values()))) if sampled and not options.are_given else []
    found: dict[str, Mapping[int, SampledClip]] = {}
    with explain_memory(lambda: f"use a --batch-size below {options.batch_size}"):
        for name, folder in arms.items():
            if name in sampled:
                _copy_clips(sampled[name], folder, output / CLIPS / name)
                found[name] = sampled[name]
                continue
            models = _models(name, folder, options, with_teacher=len(arms) == 1)
            wanted = wanted or _requests(folder, models[name][0], options)
            for arm, (model, nfe) in models.items():
                sample_files(
                    model, [replace(request, nfe=nfe) for request in wanted], Runtime(model.base.device),
                    output=output / CLIPS / arm, batch_size=options.batch_size, prompts_file=options.prompts_file,
                )  # fmt: skip
                found[arm] = read_clips(output / CLIPS / arm)
    clips = _matched(found)[: options.num_videos]
    for each in clips:
        _check_size(each, output)
        for file in each.files.values():
            (output / file).with_suffix(".txt").write_text(each.prompt + "\n", encoding="utf-8")
    rating = Rating(
        asked=asked, arms=tuple(found), clips=tuple(clips), checks=tuple(_checks(clips, output)),
        has_sound=_have_sound(clips, output),
    )  # fmt: skip
    rating.save(output)
    return rating


def _check_arms(arms: Mapping[str, Path]) -> None:
    """Refuse an arm that is not there, or is there twice."""
    seen: dict[Path, str] = {}
    for name, folder in arms.items():
        if not folder.is_dir():
            fix = "give a run, a student or a pipeline: a folder, or USER/NAME on the hub"
            raise UserError(f"no such folder: {folder}", where="RUN", fix=fix)
        if (first := seen.setdefault(folder.resolve(), name)) != name:
            raise UserError(f"{first} and {name} are the same folder: {folder}", where="RUN", fix="name it once")


def arm_names(runs: Sequence[Path]) -> list[str]:
    """The runs' names for people and for folders, all different."""
    names: list[str] = []
    for run in runs:
        own = re.sub(r"[^\w-]+", "-", run.expanduser().absolute().name, flags=re.ASCII).strip("-") or "arm"
        others = itertools.count(2)
        name = own
        while name in names:
            name = f"{own}-{next(others)}"
        names.append(name)
    return names


def _copy_clips(clips: Mapping[int, SampledClip], source: Path, target: Path) -> None:
    make_folder(target)
    for clip in clips.values():
        try:
            shutil.copyfile(source / clip.file, target / clip.file)
        except OSError as error:
            fix = "the same `sample` again makes what is missing"
            raise UserError(f"cannot copy: {error.strerror}", where=str(source / clip.file), fix=fix) from error


def _models(
    name: str, folder: Path, options: RateOptions, *, with_teacher: bool
) -> dict[str, tuple[LoadedStudent, int]]:
    """A run, student or pipeline, and if it is to be its own opponent its teacher; with the calls of a clip."""
    loaded = load_chosen(folder, pick_device(options.device), SampleChoices())
    models = {name: (loaded, options.nfe or loaded.default_nfe)}
    if with_teacher:
        if loaded.is_plain:
            raise UserError("nothing to compare this pipeline with", where=str(folder), fix="name another run")
        spec = judged_teacher(config_near(folder, loaded.card.model), loaded)
        card = replace(
            loaded.card, num_steps=(spec.num_steps,), shift=spec.shift, guidance_scale=spec.guidance_scale,
            guidance_scale_2=spec.guidance_scale_2,
        )  # fmt: skip
        teacher = replace(
            loaded, card=card, student=loaded.base, beside=(TEACHER, spec.negative_prompt),
            negative_prompt=spec.negative_prompt,
        )  # fmt: skip
        models[TEACHER if name != TEACHER else f"its-{TEACHER}"] = (teacher, spec.nfe)
    return models


def _of_manifest(clips: Mapping[int, SampledClip]) -> list[Request]:
    """The same clips again, of another model."""
    if any(clip.image for clip in clips.values()):
        fix = "sample the run from the same list, and name that folder too"
        raise UserError("clips that start from pictures cannot be made again from their manifest", where="RUN", fix=fix)
    return [Request(clip.index, clip.prompt, clip.nfe, clip.seed, clip.noise) for clip in clips.values()]


def _requests(folder: Path, model: LoadedStudent, options: RateOptions) -> list[Request]:
    """The clips to make: as the command says, or of the run's held-out prompts."""
    if options.prompts_file is not None:
        return list_requests(read_rows(options.prompts_file), nfe=1, seed=options.seed, count=options.num_videos)
    prompts, count = list(options.prompts), options.num_videos
    if not prompts:
        cfg = config_near(folder, model.card.model)
        prompts = list(EXAMPLE_PROMPTS if cfg is None else load_prompts(cfg.prompts).heldout)
        count = count or min(len(prompts), _NUM_PROMPTS)
    return list_requests(prompts, nfe=1, seed=options.seed, count=count)


def _matched(found: Mapping[str, Mapping[int, SampledClip]]) -> list[RatedClips]:
    """The prompts and noises that all arms have a clip of, in the order of the first arm."""
    arms = {
        name: {tuple(getattr(clip, key) for key in _NOISE): clip for _, clip in sorted(clips.items())}
        for name, clips in found.items()
    }
    first, *others = arms.values()
    shared = [key for key in first if all(key in other for other in others)]
    if not shared:
        counts = ", ".join(f"{name} has {len(clips)}" for name, clips in arms.items())
        fix = "sample all of them with the same --prompts and --seed"
        raise UserError(f"no prompt and noise that all have a clip of: {counts}", where="RUN", fix=fix)
    return [
        RatedClips(prompt=str(key[0]), files={arm: f"{CLIPS}/{arm}/{clips[key].file}" for arm, clips in arms.items()})
        for key in shared
    ]


def _check_size(clips: RatedClips, output: Path) -> None:
    """Refuse clips that cannot be read or differ in size, which would tell one arm from another."""
    sizes = {}
    for arm, file in clips.files.items():
        frames, fps = read_clip(output / file)
        sizes[arm] = f"{len(frames)} frames of {frames.shape[3]} x {frames.shape[2]} at {fps:g} a second"
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{arm} {size}" for arm, size in sizes.items())
        fix = "sample them with the same --num-frames, --height and --width"
        raise UserError(f"clips of one prompt differ in size: {said}", where="RUN", fix=fix)


def _have_sound(clips: Sequence[RatedClips], output: Path) -> bool:
    """True if all clips have a sound; warns where only some have."""
    silent = [file for each in clips for file in each.files.values() if read_sound(output / file) is None]
    total = sum(len(each.files) for each in clips)
    if 0 < len(silent) < total:
        warn(f"{len(silent)} of {total} clips have no sound: all are shown without, which is fair", where="rate")
    return not silent


def _checks(clips: Sequence[RatedClips], output: Path) -> list[ShownPair]:
    """One check for every `CHECK_EVERY` pairs, at least two: by turns a clip and its damaged copy, and a clip twice."""
    arms = clips[0].files
    num_pairs = len(clips) * math.comb(len(arms), 2)
    shown = [(each.files[arm], each.prompt) for arm in arms for each in clips]
    checks = []
    for number, (file, prompt) in enumerate(shown[: max(2, math.ceil(num_pairs / CHECK_EVERY))]):
        if number % 2:
            checks.append(ShownPair(left=file, right=file, prompt=prompt, answer="same"))
            continue
        damaged = f"{CHECKS}/{number:03d}{Path(file).suffix}"
        frames, fps = read_clip(output / file)
        grain = torch.randn(frames.shape, generator=seeded(0, 24, number))
        noisy, sound = (frames + _GRAIN * grain).clamp(0, 1), read_sound(output / file)
        write_clip(noisy, output / damaged, fps=fps, remarks={}, sound=sound)
        checks.append(ShownPair(left=file, right=damaged, prompt=prompt, answer="left"))
    return checks
