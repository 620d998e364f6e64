"""The batch that a plan is made of."""

from __future__ import annotations

from rats_video.backbones.base import PipelineBackbone
from rats_video.datasets.prompts.settings import ShapesPromptsConfig
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.settings import DistillConfig
from rats_video.training.batches import draw_batch
from rats_video.types import PromptBatch


def longest_prompt(cfg: DistillConfig, *, has_tokenizer: bool) -> str:
    """Of the run's prompts; without a tokenizer all prompts are alike."""
    return max(load_prompts(cfg.prompts if has_tokenizer else ShapesPromptsConfig()).train, key=len)


def planned_batch(
    cfg: DistillConfig, backbone: PipelineBackbone, prompt: str, clips: int, num_steps: int
) -> PromptBatch:
    """So many clips of one prompt, for a student of that many steps."""
    cfg = cfg.model_copy(update={
        "student": cfg.student.model_copy(update={"num_steps": (num_steps,)}),
        "training": cfg.training.model_copy(update={"batch_size": clips}),
    })  # fmt: skip
    return draw_batch(backbone, cfg, [prompt], 0)
