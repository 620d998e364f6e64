"""The code in a model card: complete, to be copied and run."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rats_video.export.base import ExportedStudent
from rats_video.export.pictures import EXAMPLE, LAST_EXAMPLE
from rats_video.export.stock import TOKENIZER, misread_tokenizers
from rats_video.inference.student import EULER

_SNIPPET = """\
import torch
from diffusers import {classes}
{imports}
folder = {name!r}  # this folder, from where you are; of the hub: hf download USER/NAME --local-dir {name!r}
dtype = {{"default": torch.{dtype}, "vae": torch.float32}}
{setup}{opening}
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
{made} = pipe(
    prompt={prompt},{pictures}
    {call},
    {size},
    generator=torch.Generator().manual_seed(0), output_type="pil",
){taken}
{save}
"""


def whole_snippet(exported: ExportedStudent, name: str) -> str:
    """A code block that samples one clip from a whole pipeline called `name` in the working folder."""
    return _snippet(exported, name, f"pipe = {exported.pipeline}.from_pretrained(folder, dtype=dtype)")


def base_snippet(
    exported: ExportedStudent, name: str, *, parts: str = "", classes: Sequence[str] = (), then: Sequence[str] = ()
) -> str:
    """The same from the base's pipeline with the export's scheduler.

    Args:
        exported: the student.
        name: of the export's folder.
        parts: lines that replace further parts of the pipeline.
        classes: of diffusers, that these lines name.
        then: lines that follow the pipeline's.
    """
    imports, base = "", exported.base_source
    scheduler = type(exported.stock.scheduler).__name__
    if misread := misread_tokenizers(exported.base):
        imports += f"from transformers import {TOKENIZER}\n"
        parts += "".join(f"    {name}={TOKENIZER}.from_pretrained({base}, subfolder={name!r}),\n" for name in misread)
    parts += f'    scheduler={scheduler}.from_pretrained(folder, subfolder="scheduler"),\n'
    setup = f"pipe = {exported.pipeline}.from_pretrained(\n    {base}, dtype=dtype,\n{parts})"
    return _snippet(exported, name, "\n".join([setup, *then]), [scheduler, *classes], imports)


def _snippet(exported: ExportedStudent, name: str, setup: str, classes: Sequence[str] = (), imports: str = "") -> str:
    imports = ("" if exported.pictures is None else "from PIL import Image, ImageOps\n") + imports
    imports = ("from diffusers.utils import encode_video\n" if exported.has_sound else "") + imports
    made, taken, save = _saving(exported)
    text = _SNIPPET.format(
        made=made, taken=taken, save=save,
        classes=", ".join(sorted([exported.pipeline, *classes])), imports=imports, name=name, setup=setup,
        dtype=exported.card.dtype, prompt=repr(exported.prompts[0]),
        opening="".join(f"\n{line}" for line in _opening(exported)), pictures=_pictures(exported),
        call=", ".join(f"{key}={value!r}" for key, value in exported.stock.call.items()),
        size=", ".join(f"{key}={value!r}" for key, value in exported.asked_size.items()),
    )  # fmt: skip
    return fenced(text, "python")


def _saving(exported: ExportedStudent) -> tuple[str, str, str]:
    """The name of what the pipeline makes, what is taken of it, and the line that saves it."""
    if exported.makes == "image":
        return "images", ".images[0]", 'images.save("image.png")'
    fps = exported.card.clip["fps"]
    if not exported.has_sound:
        shown = f"duration={round(1000 / fps)}, loop=0"
        return "frames", ".frames[0]", f'frames[0].save("clip.webp", save_all=True, append_images=frames[1:], {shown})'
    sound = "audio=made.audio[0].float().cpu(), audio_sample_rate=pipe.vocoder.config.output_sampling_rate"
    return "made", "", f'encode_video(made.frames[0], fps={fps:g}, output_path="clip.mp4",\n    {sound})'


def _opening(exported: ExportedStudent) -> list[str]:
    """Lines that seed a scheduler that draws noise, and open the pictures and fit them as in training."""
    seed = "torch.manual_seed(0)  # the scheduler draws noise at each step, and not by `generator`"
    seeds = [] if exported.card.sampler == EULER else [seed]
    if exported.pictures is None:
        return seeds
    size = f"({exported.size['width']}, {exported.size['height']})"
    files = {"picture": EXAMPLE} | ({} if exported.pictures.last is None else {"last_picture": LAST_EXAMPLE})
    return [
        *seeds,
        "# yours go here; they are scaled to cover the clip, and equal parts are cut off two sides",
        *(
            f'{name} = ImageOps.fit(ImageOps.exif_transpose(Image.open(folder + "/{file}")).convert("RGB"), {size})'
            for name, file in files.items()
        ),
    ]


def _pictures(exported: ExportedStudent) -> str:
    if exported.pictures is None:
        return ""
    return " image=picture," if exported.pictures.last is None else " image=picture, last_image=last_picture,"


def fenced(text: str, language: str) -> str:
    """A block of code that nothing in it can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def sigma_string(sigmas: Sequence[float]) -> str:
    """Noise levels for ComfyUI's ManualSigmas: "1.00000000, 0.75000000, 0.00000000"; six decimals cost LTX 4.7e-5."""
    return ", ".join(f"{sigma:.8f}" for sigma in sigmas)
