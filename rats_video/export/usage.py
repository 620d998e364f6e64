"""The code in a model card: complete, to be copied and run."""

from __future__ import annotations

from rats_video.backbones.experts import LOW_NOISE
from rats_video.backbones.lora import LORA_FILE
from rats_video.export.base import ExportedStudent, base_source

_SNIPPET = """\
import torch
from diffusers import {classes}
{imports}
folder = {name!r}  # this folder, from where you are
{setup}
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
frames = pipe(
    {prompt},
    {call},
    {size},
    generator=torch.Generator().manual_seed(0), output_type="pil",
).frames[0]
frames[0].save("clip.webp", save_all=True, append_images=frames[1:], duration={duration}, loop=0)
"""
_DTYPE = 'dtype = {{"default": torch.{dtype}, "vae": torch.float32}}\n'


def snippet(subject: ExportedStudent, kind: str, name: str) -> str:
    """Python that samples one clip from an export called `name` in the working folder."""
    scheduler = type(subject.recipe.scheduler).__name__
    whole = kind in {"diffusers", "int8", "fp8"}
    imports, base = ("", "") if whole else base_source(subject.card.model)
    classes = [subject.pipeline]
    classes += [] if whole else [scheduler]
    classes += sorted(set(subject.networks.values())) if kind == "merged" else []
    match kind:
        case "lora":
            setup = _lora(subject, base)
        case "merged":
            setup = _merged(subject, base)
        case _:
            setup = f"pipe = {subject.pipeline}.from_pretrained(folder, dtype=dtype)"
    return _SNIPPET.format(
        classes=", ".join(sorted(classes)), imports=imports, name=name, prompt=repr(subject.prompts[0]),
        setup=_DTYPE.format(dtype=subject.card.dtype) + setup,
        call=", ".join(f"{key}={value!r}" for key, value in subject.recipe.call.items()),
        size=", ".join(f"{key}={value!r}" for key, value in subject.recipe.size.items()),
        duration=round(1000 / subject.card.clip["fps"]),
    )  # fmt: skip


def _scheduler(subject: ExportedStudent) -> str:
    kind = type(subject.recipe.scheduler).__name__
    return f'    scheduler={kind}.from_pretrained(folder, subfolder="scheduler"),\n'


def _on_base(subject: ExportedStudent, base: str, parts: str) -> str:
    return f"pipe = {subject.pipeline}.from_pretrained(\n    {base}, dtype=dtype,\n{parts})"


def _merged(subject: ExportedStudent, base: str) -> str:
    networks = "".join(
        f"    {part}={kind}.from_pretrained(folder, subfolder={part!r}, dtype=torch.{subject.card.dtype}),\n"
        for part, kind in subject.networks.items()
    )
    return _on_base(subject, base, networks + _scheduler(subject))


def _lora(subject: ExportedStudent, base: str) -> str:
    lines = [
        _on_base(subject, base, _scheduler(subject)),
        f"pipe.load_lora_weights(folder, weight_name={LORA_FILE!r})",
    ]
    if LOW_NOISE in subject.networks:
        lines.append(f"pipe.{LOW_NOISE}.load_lora_adapter(folder, prefix={LOW_NOISE!r}, weight_name={LORA_FILE!r})")
    return "\n".join(lines)
