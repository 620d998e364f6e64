"""Validation clips for the eye: a sheet of each step, and a page of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rats_video.files import replacing
from rats_video.web import COLORS, as_text, small_page

FRAMES, LEAST_WIDTH, GAP = 6, 96, 2  # of a sheet: a clip's frames, pixels of the smallest one

CSS = (
    COLORS
    + """\
body { font: 15px/1.4 system-ui, sans-serif; margin: 0; padding: 16px; }
h1 { font-size: 1.4rem; margin: 0 0 12px; }
div { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 6px; border-bottom: 1px solid var(--line); }
th[scope=row] { position: sticky; left: 0; background: Canvas; width: 12rem; min-width: 8rem; font-weight: normal;
  overflow-wrap: anywhere; }
video { display: block; width: 160px; background: #0f172a; border-radius: 6px; }
video.heard { outline: 3px solid #38bdf8; }
small { display: block; color: var(--dim); font-variant-numeric: tabular-nums; }
"""
)
JS = """
for (const each of document.querySelectorAll("video")) each.addEventListener("pointerenter", () => {
  for (const other of each.closest("tr").querySelectorAll("video")) { other.currentTime = 0; other.play(); }
});
for (const each of document.querySelectorAll("video[data-sound]")) each.addEventListener("click", () => {
  const heard = each.muted;
  for (const other of document.querySelectorAll("video")) {
    other.muted = other !== each || !heard;
    other.classList.toggle("heard", !other.muted);
  }
  each.currentTime = 0;
  each.play();
});
"""


def write_sheet(path: Path, clips: Sequence[Tensor | None]) -> None:
    """One PNG: a row a clip, some of its frames from first to last.

    Args:
        path: the file.
        clips: bytes `[T, 3, H, W]`, all of one size; a clip that is None leaves its row black.
    """
    from PIL import Image

    known = [clip for clip in clips if clip is not None]
    shape = known[0].shape if known else torch.Size([1, 3, LEAST_WIDTH, LEAST_WIDTH])
    chosen = torch.linspace(0, shape[0] - 1, min(FRAMES, shape[0])).round().long()
    zoom = -(-LEAST_WIDTH // shape[-1])
    rows = [_row(torch.zeros(shape, dtype=torch.uint8) if clip is None else clip, chosen, zoom) for clip in clips]
    with replacing(path, "contact sheet") as aside:
        Image.fromarray(torch.cat(rows)[:-GAP].contiguous().numpy()).save(aside, format="png")


def _row(clip: Tensor, chosen: Tensor, zoom: int) -> Tensor:
    """Frames beside each other, with a white gap after each and below: `[height + GAP, width, 3]`."""
    frames = clip[chosen].repeat_interleave(zoom, dim=-1).repeat_interleave(zoom, dim=-2)
    framed = torch.nn.functional.pad(frames, (0, GAP, 0, GAP), value=255)
    return torch.cat(list(framed.permute(0, 2, 3, 1)), dim=1)[:, :-GAP]


def write_page(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a page beside the clips: a row a prompt, a column a step; a row plays under the pointer.

    Args:
        path: the file.
        rows: as the index lists them, see `validation.read_looks`.
    """
    prompts = list(dict.fromkeys(clip["prompt"] for row in rows for clip in row["clips"]))
    heads = "".join(f'<th scope="col">step {row["step"]}' for row in rows)
    lines = "\n".join(
        f'<tr><th scope="row">{as_text(prompt)}' + "".join(_cell(row, prompt) for row in rows) for prompt in prompts
    )
    has_sound = any(clip.get("sound") for row in rows for clip in row["clips"])
    hint = "<p>A row plays under the pointer. Click a clip to hear it, again to mute it.</p>" if has_sound else ""
    body = f"""<h1>The student's clips while it trained</h1>
{hint}<div><table><tr><td>{heads}
{lines}
</table></div>"""
    page = small_page("Clips while training", CSS, body, JS, "media-src 'self' file:")
    with replacing(path, "page") as aside:
        aside.write_text(page, encoding="utf-8")


def _cell(row: Mapping[str, Any], prompt: str) -> str:
    clip = next((clip for clip in row["clips"] if clip["prompt"] == prompt), None)
    if clip is None:
        return "<td>"
    scores = "".join(
        f"<small>{as_text(name.replace('_', ' '))} {value:.3g}</small>"
        for name, value in clip["scores"].items()
        if value is not None and "/" not in name
    )
    source = escape(clip["file"] or "", quote=True)
    heard = " data-sound" if clip.get("sound") else ""
    video = f'<video src="{source}"{heard} muted loop playsinline preload="metadata"></video>'
    return f"<td>{video if source else 'not finite'}{scores}"
