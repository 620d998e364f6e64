"""`demo`: the page of a run or a student."""

from __future__ import annotations

import importlib.util
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from rats_video.commands.device import explain_memory, pick_device
from rats_video.commands.prompts import EXAMPLE_PROMPTS
from rats_video.commands.runs import config_near, config_of
from rats_video.commands.students import DEFAULT_STUDENT, find_student, load_student
from rats_video.commands.teacher import judged_teacher
from rats_video.datasets.prompts.settings import ShapesPromptsConfig
from rats_video.datasets.prompts.split import load_prompts
from rats_video.errors import Interrupted, UserError
from rats_video.inference.demo import DemoModels
from rats_video.inference.demo_page import build_page, launch_page
from rats_video.rewards.reward import build_reward

_SMALL = 100e6  # parameters; a smaller teacher is fast enough to show
_NUM_EXAMPLES = 4


def run_demo(
    *, model: Path | None, base: Path | None = None, port: int, device: str, echo: Callable[[str], None]
) -> NoReturn:
    """Serve the page until it is stopped.

    Args:
        model: a run, or a student, whose run's reward is then shown; None takes the embedded one.
        base: where the student's base pipeline is now; None = where it was.
        port: on this machine.
        device: as `--device`.
        echo: gets the address of the page.

    Raises:
        Interrupted: when it is stopped, by Ctrl-C.
        UserError: gradio is missing, the port is taken, or there is no student.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio, which is not here", fix="pip install 'rats-video[demo]'")
    with tempfile.TemporaryDirectory(prefix="rats-video-") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}  # before it is imported
        with explain_memory(lambda: "the page needs a GPU that holds the model; --device cpu is slow"):
            studio, examples = load_studio(model, pick_device(device), base)
            # The first clip of a process takes longer than any other, and would misstate the student's speed.
            studio.make("student", studio.accept(examples[0], studio.trained[0], 0), lambda: None)
        parameters = sum(weight.numel() for weight in studio.base.denoiser.parameters())
        page = build_page(studio, examples, name=(model or Path(DEFAULT_STUDENT)).name, teacher=parameters < _SMALL)
        launch_page(page, port, takes_pictures=studio.takes_pictures)
        try:
            echo(f"http://127.0.0.1:{port} (this machine only; Ctrl-C ends it)")
            signal.pause()
        except KeyboardInterrupt as stop:
            raise Interrupted("the page is closed") from stop
        finally:
            page.close(verbose=False)
    raise AssertionError


def load_studio(
    model: Path | None, device: torch.device, base: Path | None = None
) -> tuple[DemoModels, tuple[str, ...]]:
    """Student, teacher and reward, and prompts that fit them."""
    loaded = load_student(find_student(model or DEFAULT_STUDENT), device, base)
    cfg = config_of((), loaded.card.model) if model is None else config_near(model, loaded.card.model)
    reward = None if cfg is None else build_reward(cfg.reward, device, where="reward", clip=loaded.clip)
    studio = DemoModels(
        loaded.student, loaded.base, loaded.clip, loaded.card.shift, loaded.card.num_steps,
        judged_teacher(cfg, loaded), reward, loaded.card.sampler,
    )  # fmt: skip
    shapes = cfg is None or isinstance(cfg.prompts, ShapesPromptsConfig)
    return studio, EXAMPLE_PROMPTS if cfg is None or shapes else load_prompts(cfg.prompts).heldout[:_NUM_EXAMPLES]
