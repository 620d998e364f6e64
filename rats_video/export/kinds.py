"""The forms of export, listed once."""

from __future__ import annotations

from rats_video.export.base import Form
from rats_video.export.comfyui import ComfyUI
from rats_video.export.diffusers import Diffusers
from rats_video.export.lora import Lora
from rats_video.export.merged import Merged
from rats_video.export.quantized import Fp8, Int8

FORMS: tuple[Form, ...] = (Diffusers(), Lora(), ComfyUI(), Merged(), Int8(), Fp8())


def find_form(name: str) -> Form:
    """The form of that name, as `--format` gives it."""
    return next(form for form in FORMS if form.name == name)
