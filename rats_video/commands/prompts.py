"""The prompts that a command is given, or those it falls back on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rats_video.backbones.base import PipelineBackbone
from rats_video.datasets.prompts.files import read_prompts
from rats_video.datasets.prompts.split import check_prompt

EXAMPLE_PROMPTS = (
    "a fast red circle moving left on a gray background",
    "a slow blue square moving up on a white background",
    "a fast yellow triangle moving right on a black background",
)


def checked_prompts(
    given: Sequence[str], file: Path | None, fallback: Sequence[str], backbone: PipelineBackbone
) -> list[str]:
    """The prompts given, those of the file, or else the fallback; refuses prompts that the model cannot follow."""
    prompts = list(given) or (list(read_prompts(file)) if file else list(fallback))
    for prompt in prompts:
        check_prompt(prompt, backbone, files=[] if file is None else [file])
    return prompts


def cycle(prompts: Sequence[str], count: int | None) -> list[str]:
    """`count` prompts, taken in turn; None takes each once."""
    return [prompts[i % len(prompts)] for i in range(len(prompts) if count is None else count)]
