"""The side-by-side video: pixels stay the model's own, labels are there and stay inside."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rats_video.inference import side_by_side
from rats_video.inference.panel import Panel
from rats_video.inference.side_by_side import compose_comparison
from rats_video.inference.video import read_mp4, write_mp4

PROMPT = "a fast red circle moving left on a gray background"


def make_panel(seed: int = 0, *, title: str = "teacher", size: tuple[int, int, int] = (3, 16, 16)) -> Panel:
    num_frames, height, width = size
    frames = torch.rand(num_frames, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return Panel(title=title, frames=frames, num_steps=50, nfe=100, seconds=1.5249, reward=-0.16)


def find(canvas: Tensor, block: Tensor) -> tuple[int, int]:
    """The one place `(top, left)` where `block` `[3, h, w]` lies in `canvas` `[3, H, W]`, to the bit."""
    _, height, width = block.shape
    corner = (canvas == block[:, :1, :1]).all(dim=0)
    places = [
        (int(top), int(left))
        for top, left in corner.nonzero()
        if torch.equal(canvas[:, top : top + height, left : left + width], block)
    ]
    assert len(places) == 1
    return places[0]


def test_stats_line() -> None:
    assert make_panel().stats == "50 steps · 100 NFE · 1.52 s · reward -0.16"
    panel = Panel("student", torch.zeros(1, 3, 8, 8), num_steps=1, nfe=1, seconds=151.6, reward=None)
    assert panel.stats == "1 step · 1 NFE · 152 s"
    assert Panel("", panel.frames, 4, 4, 0.0, reward=-0.001).stats.endswith("reward 0.00")


@pytest.mark.parametrize(
    ("size", "scale"), [((3, 16, 16), 16), ((2, 64, 64), 4), ((2, 100, 60), 3), ((1, 256, 300), 1)]
)
def test_pixels_are_the_models_own(size: tuple[int, int, int], scale: int) -> None:
    panels = [make_panel(seed, size=size) for seed in range(3)]
    video = compose_comparison(panels, prompt=PROMPT)
    assert video.dtype == torch.float32
    assert (video.shape[0], video.shape[1]) == (size[0], 3)
    assert video.shape[2] % 2 == video.shape[3] % 2 == 0
    assert 0 <= video.min() <= video.max() <= 1
    corners = []
    for panel in panels:
        enlarged = panel.frames.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        corners.append(find(video[0], enlarged[0]))
        top, left = corners[-1]
        assert torch.equal(video[:, :, top : top + size[1] * scale, left : left + size[2] * scale], enlarged)
    assert len({top for top, _ in corners}) == 1
    lefts = [left for _, left in corners]
    gaps = [right - left - size[2] * scale for left, right in itertools.pairwise(lefts)]
    assert gaps[0] == gaps[1]
    assert 2 <= gaps[0] <= 8


def test_min_height_decides_the_scale() -> None:
    low = compose_comparison([make_panel()], prompt=PROMPT, min_height=1)
    high = compose_comparison([make_panel()], prompt=PROMPT, min_height=33)
    find(low[0], make_panel().frames[0])
    find(high[0], make_panel().frames[0].repeat_interleave(3, 1).repeat_interleave(3, 2))


def lit(region: Tensor) -> Tensor:
    """Where text is: far brighter than the bars. `[H, W]` of bool."""
    return region.amax(dim=0) > 0.4


def split(video: Tensor, num_panels: int, size: int) -> tuple[Tensor, list[Tensor]]:
    """The prompt bar and each panel's label bar, from the first frame, for square panels of `size` pixels."""
    frame = video[0]
    background = frame[:, 0, 0]
    bar_rows = (
        (frame[:, :, 6] != background[:, None]).any(dim=0).nonzero().flatten()
    )  # inside panel 0, left of its text
    top = int(bar_rows[0])
    bottom = video.shape[2] - size - 4
    bars = [frame[:, top : bottom - 1, 4 + i * (size + 4) : 4 + i * (size + 4) + size] for i in range(num_panels)]
    return frame[:, :top], bars


def test_every_bar_holds_text_in_the_same_place_in_every_frame() -> None:
    panels = [make_panel(title="teacher"), make_panel(1, title="student")]
    video = compose_comparison(panels, prompt=PROMPT)
    prompt_bar, labels = split(video, 2, 256)
    assert lit(prompt_bar).sum() > 200
    assert all(lit(label).sum() > 300 for label in labels)
    assert not torch.equal(labels[0], labels[1])
    header = video[:, :, : prompt_bar.shape[1] + labels[0].shape[1]]
    assert torch.equal(header, header[:1].expand_as(header))


@pytest.mark.parametrize("title", ["t", "W" * 200, "a student with many, many words in its name, " * 3, "学生 é — ok"])
@pytest.mark.parametrize("seconds", [0.01, 123456.0])
def test_text_stays_inside_its_panel(title: str, seconds: float) -> None:
    panels = [
        Panel(title, torch.zeros(1, 3, 16, 16), num_steps=1000, nfe=2000, seconds=seconds, reward=-123.45) for _ in "ab"
    ]
    prompt_bar, labels = split(compose_comparison(panels, prompt="long words " * 50), 2, 256)
    for region in (prompt_bar, *labels):
        mask = lit(region)
        assert mask.any()
        assert not mask[:, :5].any()
        assert not mask[:, -5:].any()
        assert not mask[:2].any()
        assert not mask[-2:].any()


def test_stats_wrap_rather_than_lose_a_number() -> None:
    assert side_by_side._fit_stats([make_panel().stats], 300, 13) == (
        13,
        (("50 steps · 100 NFE · 1.52 s · reward -0.16",),),
    )
    _, (lines,) = side_by_side._fit_stats([make_panel().stats], 160, 13)
    assert lines == ("50 steps · 100 NFE", "1.52 s · reward -0.16")
    size, (column,) = side_by_side._fit_stats([make_panel().stats], 60, 13)
    assert column == ("50 steps", "100 NFE", "1.52 s", "reward -0.16")
    assert max(side_by_side._length(line, size) for line in column) <= 60


def test_the_longest_prompt_that_fits_is_kept() -> None:
    size, text = side_by_side._fit("word " * 100, 200, 14, bold=False)
    assert re.fullmatch(r"(word )*w?o?r?d?…", text)
    assert 185 < side_by_side._length(text, size) <= 200
    assert side_by_side._fit("short", 200, 14, bold=False) == (14, "short")
    assert side_by_side._fit("word", 2, 14, bold=True)[1] == ""


def test_text_the_font_lacks_is_folded() -> None:
    assert side_by_side._drawable("a café —\n“naïve” 3×4 · 猫 … ﬁn") == "a cafe - “naive” 3x4 · ? … fin"  # noqa: RUF001


def test_the_bundled_font_has_every_character_we_draw() -> None:
    font = side_by_side._font(16)
    missing = bytes(font.getmask("猫"))
    for character in (*side_by_side._DRAWABLE, *map(chr, range(0x21, 0x7F))):
        assert bytes(font.getmask(character)) != missing, character


def test_half_precision_and_gradients_are_accepted() -> None:
    panel = make_panel()
    half = Panel("student", panel.frames.half().requires_grad_(), 4, 4, 0.06, None)
    video = compose_comparison([panel, half], prompt="")
    assert not video.requires_grad
    assert video.dtype == torch.float32


def test_refuses_panels_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        compose_comparison([], prompt=PROMPT)
    with pytest.raises(ValueError, match=r"share one shape .* got \[\[3, 3, 16, 16\], \[4, 3, 16, 16\]\]"):
        compose_comparison([make_panel(), make_panel(size=(4, 16, 16))], prompt=PROMPT)
    with pytest.raises(ValueError, match="share one shape"):
        compose_comparison([Panel("x", torch.zeros(3, 16, 16), 1, 1, 1.0, None)], prompt=PROMPT)


def test_composed_video_encodes(tmp_path: Path) -> None:
    video = compose_comparison([make_panel(), make_panel(1)], prompt=PROMPT)
    write_mp4(video, tmp_path / "comparison.mp4", fps=8)
    decoded, _ = read_mp4(tmp_path / "comparison.mp4")
    assert decoded.shape == video.shape
