"""`sample`: one mp4 a prompt, or a PNG of one frame, from a list or a pipe; clips that exist already are kept."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Self

from rats_video.commands.device import explain_memory, start_runtime
from rats_video.commands.folders import clean_interrupt, make_folder
from rats_video.commands.prompts import EXAMPLE_PROMPTS
from rats_video.commands.sample_pictures import Pictures, make_clips
from rats_video.commands.students import DEFAULT_STUDENT, LoadedStudent, SampleChoices, find_student, load_chosen
from rats_video.datasets.prompts.files import read_rows
from rats_video.datasets.prompts.split import check_prompt
from rats_video.errors import UserError
from rats_video.files import json_digest, weights_digest
from rats_video.inference.manifest import Journal, SampledClip, clear, is_whole, locked, read_clips, write_manifest
from rats_video.inference.requests import Request, in_batches, list_requests, piped_requests
from rats_video.inference.sampler import SamplerSpec
from rats_video.inference.student import EULER
from rats_video.inference.style import Style
from rats_video.inference.video import slugify, write_clip
from rats_video.progress import ProgressBar
from rats_video.runtime import Runtime

BATCH_SIZE = 16
PIPE = Path("-")


class ClipFolder:
    """Context that makes one student's clips in a folder, or finds them there.

    Args:
        loaded: the student.
        pictures: that its clips start from.
        output: the folder, which must be there.
        rank: of this process.
    """

    def __init__(self, loaded: LoadedStudent, pictures: Pictures, output: Path, rank: int) -> None:
        self._loaded, self._pictures, self._output = loaded, pictures, output
        self._student = identity(loaded)
        self._journal = Journal(output, rank)
        self._specs: dict[int, SamplerSpec] = {}
        self.clips: dict[int, SampledClip] = {}

    def __enter__(self) -> Self:
        self.clips = read_clips(self._output)
        self._journal.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)

    def spec(self, nfe: int) -> SamplerSpec:
        """The student's sampler; warns the first time where it was trained for other counts."""
        if nfe not in self._specs:
            self._specs[nfe] = self._loaded.spec(nfe)
        return self._specs[nfe]

    def path(self, request: Request) -> Path:
        """The file of a request's clip."""
        return self._output / self._describe(request, 0.0).file

    def has(self, request: Request) -> bool:
        """True if the clip exists and is complete.

        Raises:
            UserError: the folder records another clip in its place.
        """
        found = self.clips.get(request.index)
        if found is None:
            return False
        asked = self._describe(request, found.seconds)
        differ = [
            name for name in SampledClip.model_fields if getattr(found, name) != getattr(asked, name) and name != "file"
        ]
        if differ:
            raise UserError(
                f"holds clip {request.index} of another {' and '.join(differ)}", where=str(self._output),
                fix="--overwrite replaces what is there, or give another --output",
            )  # fmt: skip
        return is_whole(self._output / found.file, self._loaded.clip.num_frames)

    def make(self, requests: Sequence[Request]) -> Iterator[SampledClip]:
        """Sample requests of one NFE and kind of picture together; yields each clip once its file is written."""
        for (nfe, *_), together in groupby(sorted(requests, key=_together), key=_together):
            batch, spec, clip = list(together), self.spec(nfe), self._loaded.clip
            began = time.perf_counter()
            videos, sound = make_clips(self._loaded, batch, spec, self._pictures)
            seconds = (time.perf_counter() - began) / len(batch)
            for row, (request, frames) in enumerate(zip(batch, videos, strict=True)):
                made = self._describe(request, round(seconds, 4))
                path = self._output / made.file
                write_clip(
                    frames.cpu(), path, fps=clip.fps, remarks=self._remarks(made),
                    sound=None if sound is None else sound.take(slice(row, row + 1)),
                )  # fmt: skip
                self._journal.add(made)
                self.clips[made.index] = made
                yield made

    def _remarks(self, made: SampledClip) -> dict[str, str]:
        """How a clip was made, for a picture to carry."""
        spec, student = self.spec(made.nfe), self._loaded.student
        sigmas = ", ".join(f"{sigma:.6g}" for sigma in student.sigmas(spec.num_steps, spec.shift).tolist())
        about = {"prompt": made.prompt, "seed": str(made.seed), "model": f"{self._loaded.model.name} ({made.student})"}
        sampler = {} if spec.sampler == EULER else {"sampler": spec.sampler}
        return {**about, "sigmas": sigmas, "guidance_scale": f"{spec.guidance_scale:g}", **sampler}

    def _describe(self, request: Request, seconds: float) -> SampledClip:
        name = f"{request.index:03d}-{slugify(request.id or request.prompt)}-nfe{request.nfe}-seed{request.seed}"
        name += ".png" if self._loaded.clip.num_frames == 1 else ".mp4"
        num_steps = self.spec(request.nfe).num_steps
        row = {**asdict(request), **self._pictures.digests(request), "file": name, "num_steps": num_steps}
        return SampledClip(**row, student=self._student, seconds=seconds)


def _together(request: Request) -> tuple[int, bool, bool]:
    """What requests of one batch have in common."""
    return request.nfe, request.image is None, request.last_image is None


def identity(loaded: LoadedStudent) -> str:
    """16 hex digits that tell one student from another: by weights, noise levels, clip size, base and LoRAs."""
    return json_digest([weights_digest([loaded.folder]), loaded.card.as_json(), *loaded.beside])[:16]


def run_sample(
    *,
    model: Path | None,
    base: Path | None,
    size: Mapping[str, int],
    loras: Sequence[str],
    offload: bool,
    tiled: bool,
    nfe: int | None,
    prompts: Sequence[str],
    prompts_file: Path | None,
    image: Path | None,
    last_image: Path | None,
    negative_prompt: str,
    guidance_scale: float | None,
    guidance_scale_2: float | None,
    num_videos: int | None,
    seed: int,
    output: Path,
    device: str,
    batch_size: int,
    overwrite: bool,
    echo: Callable[[str], None],
) -> None:
    """Write one clip a prompt; `echo` gets what was made, or each file once it is there if prompts come from a pipe."""
    piped = prompts_file == PIPE
    runtime = start_runtime(device)
    if piped and (num_videos or runtime.trainers > 1):
        option = "--num-videos" if num_videos else "--gpus"
        raise UserError("a pipe has one clip a line, and one process that reads it", where=option, fix="leave it out")
    if prompts_file is not None and (image or last_image):
        raise UserError("is for all --prompt", where="--image" if image else "--last-image",
                        fix="a list names its pictures in a column `image`")  # fmt: skip
    given = list(prompts) if prompts_file is None or piped else read_rows(prompts_file)
    styles = tuple(map(Style.parse, loras))
    choices = SampleChoices(
        base, size, styles, offload=offload, tiles=tiled, negative_prompt=negative_prompt,
        guidance_scale=guidance_scale, guidance_scale_2=guidance_scale_2,
    )  # fmt: skip
    loaded = load_chosen(find_student(model or DEFAULT_STUDENT), runtime.device, choices)
    nfe = nfe or loaded.default_nfe
    with explain_memory(lambda: f"use a --batch-size below {batch_size}"):
        if piped:
            sample_pipe(
                loaded, sys.stdin.fileno(), nfe=nfe, seed=seed, output=output, batch_size=batch_size,
                overwrite=overwrite, echo=echo,
            )  # fmt: skip
        else:
            requests = list_requests(given or EXAMPLE_PROMPTS, nfe=nfe, seed=seed, count=num_videos)
            if prompts_file is None:
                first, last = (None if path is None else str(path) for path in (image, last_image))
                requests = [replace(request, image=first, last_image=last) for request in requests]
            for line in sample_files(
                loaded, requests, runtime, output=output, batch_size=batch_size, overwrite=overwrite,
                prompts_file=prompts_file,
            ):  # fmt: skip
                echo(line)
    runtime.close()


def sample_files(
    loaded: LoadedStudent,
    requests: Sequence[Request],
    runtime: Runtime,
    *,
    output: Path,
    batch_size: int = BATCH_SIZE,
    overwrite: bool = False,
    prompts_file: Path | None = None,
) -> list[str]:
    """Make the clips that `output` does not hold yet, and the manifest of all; returns the lines to show.

    Stopped at any moment and called again, it makes the rest. An error names the line of `prompts_file`.

    Raises:
        UserError: a prompt is wrong, or the folder holds other clips and `overwrite` is off.
        Interrupted: by Ctrl-C; says how to go on.
    """
    for prompt in dict.fromkeys(request.prompt for request in requests):
        check_prompt(prompt, loaded.student, files=[] if prompts_file is None else [prompts_file])
    pictures = Pictures(loaded, prompts_file)
    if not (usable := pictures.usable(requests)):
        raise pictures.refused[0]
    mine = [usable[i] for i in runtime.shard(len(usable))]
    with _claimed(output, runtime, overwrite=overwrite), ClipFolder(loaded, pictures, output, runtime.rank) as folder:
        todo = [request for request in mine if not folder.has(request)]
        done = before = len(mine) - len(todo)
        began = time.monotonic()
        with ProgressBar("sample", len(mine), start=before) as progress, clean_interrupt(output):
            for batch in in_batches(todo, batch_size):
                done += sum(1 for _ in folder.make(batch))
                progress.advance(len(batch), **{"clips/s": (done - before) / (time.monotonic() - began)})
        clips = runtime.gather_shards([folder.clips[request.index] for request in mine])
        if runtime.is_main:
            write_manifest(output, (folder.clips | {clip.index: clip for clip in clips}).values())
    if pictures.refused:
        what = f"{len(pictures.refused)} rows were left out, the first: {pictures.refused[0]}"
        raise UserError(f"{what}; {summary(clips, output)}", where=str(prompts_file))
    return [summary(clips, output)]


def sample_pipe(
    loaded: LoadedStudent,
    descriptor: int,
    *,
    nfe: int,
    seed: int,
    output: Path,
    batch_size: int,
    overwrite: bool,
    echo: Callable[[str], None],
) -> None:
    """Make a clip of each line as it arrives, batching those that have arrived together; `echo` gets each file.

    A wrong line is skipped with a warning, and keeps its number.

    Raises:
        UserError: at the end, if lines were skipped or there was none; or as `sample_files` does.
        Interrupted: by Ctrl-C.
    """
    alone, refused = Runtime(loaded.base.device), list[UserError]()
    pictures = Pictures(loaded, Path("stdin"))
    arriving = piped_requests(descriptor, loaded.student, nfe=nfe, seed=seed, refused=refused)
    with (
        _claimed(output, alone, overwrite=overwrite),
        ClipFolder(loaded, pictures, output, 0) as folder,
        clean_interrupt(output),
    ):
        for arrived in in_batches(arriving, batch_size):
            batch = pictures.usable(arrived)
            todo = [request for request in batch if not folder.has(request)]
            for request in batch:
                if request not in todo:
                    echo(str(folder.path(request)))
            for clip in folder.make(todo):
                echo(str(output / clip.file))
        write_manifest(output, folder.clips.values())
    if refused := [*refused, *pictures.refused]:
        raise UserError(f"{len(refused)} lines were left out, the first: {refused[0]}", where="--prompts -")


def summary(clips: Sequence[SampledClip], output: Path) -> str:
    """One line: the number of clips, their calls, the seconds of one."""
    seconds = sum(clip.seconds for clip in clips) / len(clips)
    counts = ", ".join(str(nfe) for nfe in sorted({clip.nfe for clip in clips}))
    return f"{len(clips)} clip{'s' if len(clips) != 1 else ''} at {counts} NFE, {seconds:.2f} s each: {output}"


@contextlib.contextmanager
def _claimed(output: Path, runtime: Runtime, *, overwrite: bool) -> Iterator[None]:
    """Have the folder for ourselves, without what it tells of if it is to be overwritten."""
    make_folder(output)
    with locked(output) if runtime.is_main else contextlib.nullcontext():
        if overwrite and runtime.is_main:
            clear(output)
        runtime.barrier()
        yield
