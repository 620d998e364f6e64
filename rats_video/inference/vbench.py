"""Clips as VBench's official scorer expects them: `PROMPT-0.mp4` to `PROMPT-4.mp4`, in a folder of clips alone.

The scorer (https://github.com/Vchitect/VBench) finds a clip by the name `{prompt_en}-{index}.mp4` and takes the
ending of all from the first file it meets, so that any other file in the folder may hide every clip from it.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rats_video.config.fields import Config, NonNegativeInt
from rats_video.datasets.prompts.files import PromptRow, check_plain, read_rows
from rats_video.errors import UserError, printable
from rats_video.files import write_json
from rats_video.reading import read_text

DIMENSIONS = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    "aesthetic_quality", "imaging_quality", "object_class", "multiple_objects", "human_action", "color",
    "spatial_relationship", "scene", "temporal_style", "appearance_style", "overall_consistency",
)  # fmt: skip
OF_ANY_PROMPT = (
    "subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
    "imaging_quality",
)  # fmt: skip
"""VBench's dimensions that it measures of any prompt."""
SHARED = {
    "subject_consistency": ("motion_smoothness", "dynamic_degree"),
    "scene": ("background_consistency",),
    "overall_consistency": ("aesthetic_quality", "imaging_quality"),
}
"""Dimensions that VBench measures on another one's prompts, by that one: five of the 16 have no list of their own.

By VBench_full_info.json of github Vchitect/VBench 45e79ec, in which each prompt of these three has all.
"""
FLICKER = "temporal_flickering"
SAMPLES = 5
FLICKER_SAMPLES = 25  # of which VBench's own filter keeps 5 that stand still
_LONGEST_NAME = 255  # bytes, of a file on Linux


@dataclass(frozen=True)
class VBenchPrompt:
    """A prompt and the dimensions that it tests; none where its list does not say."""

    prompt: str
    dimensions: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """The number of clips that VBench asks for."""
        return FLICKER_SAMPLES if FLICKER in self.dimensions else SAMPLES


class VBenchClip(Config):
    """One clip, by what its pixels depend on beside the model."""

    file: str
    prompt: str
    index: NonNegativeInt
    seed: int


class VBenchRecord(Config):
    """The origin of a folder's clips, written beside it before the first of them."""

    model: str
    weights: str
    num_steps: int
    nfe: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    negative_prompt: str = ""
    shift: float
    clip: dict[str, float]
    seed: int
    clips: tuple[VBenchClip, ...]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, self.model_dump())

    def joined(self, path: Path) -> VBenchRecord:
        """This record with the clips of the one at `path` as well, if there is one.

        Raises:
            UserError: that one is of another model or other settings, or cannot be read.
        """
        if not path.exists():
            return self
        fix = "give another --vbench-layout, or delete it with its clips"
        try:
            before = VBenchRecord.model_validate_json(read_text(path))
        except (OSError, ValueError) as error:
            raise UserError("is damaged, or not of this version", where=str(path), fix=fix) from error
        named = [key for key in VBenchRecord.model_fields if key not in {"model", "clips"}]
        if differ := [key for key in named if getattr(before, key) != getattr(self, key)]:
            raise UserError(f"tells of clips of another {' and '.join(differ)}", where=str(path), fix=fix)
        clips = {clip.file: clip for clip in (*before.clips, *self.clips)}
        return self.model_copy(update={"clips": tuple(clips.values())})


def read_vbench_prompts(path: Path, dimensions: Sequence[str] = ()) -> list[VBenchPrompt]:
    """The prompts of a list, or of a folder of VBench's with one list a dimension; each once, with all its dimensions.

    Args:
        path: a list as docs/prompts.md describes them, or VBench's `prompts_per_dimension`.
        dimensions: only the prompts that test one of these; all if empty.

    Raises:
        UserError: it cannot be read, a prompt cannot be a file name, or none is left.
    """
    lists = [path]
    if path.is_dir():
        lists = [file for file in sorted(path.glob("*.txt")) if file.stem in DIMENSIONS]
        if not lists:
            raise UserError("no list named after a dimension in it", where=str(path), fix=f"like {FLICKER}.txt")
    found: dict[str, VBenchPrompt] = {}
    for file in lists:
        for row in read_rows(file):
            check_name(row.prompt, where=str(file))
            one = found.get(row.prompt, VBenchPrompt(row.prompt))
            tests = dict.fromkeys((*one.dimensions, *_dimensions(file, row)))
            found[row.prompt] = replace(one, dimensions=tuple(tests))
    if unknown := sorted(set(dimensions) - {name for each in found.values() for name in each.dimensions}):
        raise UserError(
            f"no prompt in {path} tests {', '.join(unknown)}", where="--dimensions",
            fix="VBench_full_info.json says what each prompt tests" if path.suffix != ".json" else "check the spelling",
        )  # fmt: skip
    return [each for each in found.values() if not dimensions or set(dimensions) & set(each.dimensions)]


def check_name(prompt: str, *, where: str) -> None:
    """Refuse a prompt whose clips cannot have the names that the scorer looks for."""
    check_plain(prompt, where=where)
    what = None
    if "/" in prompt or "\n" in prompt:
        what = "holds what no file name can hold"
    elif prompt.startswith("."):
        what = "would make a hidden file"
    elif len(_file(prompt, FLICKER_SAMPLES - 1).encode()) > _LONGEST_NAME:
        what = f"is too long for a file name of {_LONGEST_NAME} bytes"
    if what:
        shown = prompt if len(prompt) < 60 else f"{prompt[:57]}..."
        raise UserError(
            f"the prompt {printable(shown)!r} {what}, and VBench's scorer finds clips by that name alone",
            where=where, fix="leave it out, or change it",
        )  # fmt: skip


def vbench_clips(prompts: Sequence[VBenchPrompt], seed: int) -> list[VBenchClip]:
    """Every clip to make; its own seed hangs on the prompt, its index and `seed`, and on no other prompt."""
    return [
        VBenchClip(
            file=_file(each.prompt, index), prompt=each.prompt, index=index, seed=_seed(seed, each.prompt, index)
        )
        for each in prompts
        for index in range(each.samples)
    ]


def official_commands(folder: Path, prompts: Sequence[VBenchPrompt], wanted: Sequence[str] = ()) -> list[str]:
    """The shell lines that score a folder of clips with VBench's own program.

    Args:
        folder: of clips alone.
        prompts: what they show.
        wanted: dimensions; all that the prompts test if empty.
    """
    tested = {name for each in prompts for name in each.dimensions}
    dimensions = [name for name in DIMENSIONS if name in tested and (not wanted or name in wanted)]
    where = shlex.quote(str(folder))
    if not dimensions:
        return [_loop(OF_ANY_PROMPT, f"--videos_path {where} --mode=custom_input")]
    lines = (
        [_loop(rest, f"--videos_path {where}")] if (rest := [name for name in dimensions if name != FLICKER]) else []
    )
    if FLICKER in dimensions:
        still = folder.with_name(f"{folder.name}-static")
        lines += [
            f"vbench static_filter --videos_path {where} --result_path {shlex.quote(str(still))}",
            f"vbench evaluate --dimension {FLICKER} --videos_path {shlex.quote(str(still / 'filtered_videos'))}",
        ]
    return lines


def _loop(dimensions: Sequence[str], options: str) -> str:
    if len(dimensions) == 1:
        return f"vbench evaluate --dimension {dimensions[0]} {options}"
    return f"for d in {' '.join(dimensions)}; do vbench evaluate --dimension $d {options}; done"


def _dimensions(file: Path, row: PromptRow) -> tuple[str, ...]:
    if row.dimension or file.suffix != ".txt" or file.stem not in DIMENSIONS:
        return row.dimension
    return (file.stem, *SHARED.get(file.stem, ()))


def _file(prompt: str, index: int) -> str:
    return f"{prompt}-{index}.mp4"


def _seed(seed: int, prompt: str, index: int) -> int:
    digest = hashlib.sha256(f"{seed}:{index}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
