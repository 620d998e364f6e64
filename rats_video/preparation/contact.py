"""The contact sheet: one page, complete in itself, that shows what was kept and why the rest was not."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rats_video.datasets.prepared.cache import CONTACT, ClipRecord, Skipped
from rats_video.files import replacing
from rats_video.preparation.units import thumbs_path
from rats_video.progress import format_seconds
from rats_video.web import COLORS, as_text, small_page

MOST_CLIPS = 200  # 1 MB of thumbnails
EXAMPLES = 5  # of each reason

CSS = (
    COLORS
    + """\
body { font: 15px/1.4 system-ui, sans-serif; max-width: 1200px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.4rem; margin: 0 0 4px; }
h2 { font-size: 1.1rem; margin: 32px 0 8px; }
p { margin: 0 0 12px; color: var(--dim); }
input { font: inherit; width: 100%; box-sizing: border-box; padding: 10px 12px; border: 1px solid var(--line);
  border-radius: 8px; margin-bottom: 16px; }
main { display: grid; gap: 12px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
figure[hidden] { display: none; }
img { display: block; width: 100%; max-height: 160px; object-fit: contain; background: #0f172a; }
figcaption { padding: 8px 12px; overflow-wrap: anywhere; }
small { display: block; color: var(--dim); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; }
td:first-child { font-variant-numeric: tabular-nums; }
"""
)
JS = """
const figures = [...document.querySelectorAll("figure")];
document.querySelector("input").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const each of figures) each.hidden = !words.every(word => each.textContent.toLowerCase().includes(word));
});
"""


def write_contact(
    folder: Path, records: Sequence[ClipRecord], reasons: Mapping[str, Sequence[Skipped]], headline: str
) -> None:
    """Write CACHE/contact.html, with `MOST_CLIPS` clips at most, taken at even distances.

    Args:
        folder: the cache, whose units hold the thumbnails.
        records: all clips.
        reasons: what was skipped.
        headline: one line on the whole.
    """
    count = min(len(records), MOST_CLIPS)
    chosen = [records[index * len(records) // count] for index in range(count)]
    figures = "\n".join(_figure(record, _thumb(folder, record)) for record in chosen)
    shown = f"{count} of them" if count < len(records) else "All of them"
    body = f"""<h1>{as_text(headline[:1].upper() + headline[1:])}</h1>
<p>{shown}: first, middle and last frame, as the model will see them.</p>
<input type="search" placeholder="Filter by caption, file or size" aria-label="Filter">
<main>
{figures}
</main>
{_table(reasons)}"""
    page = small_page("Prepared clips", CSS, body, JS, "img-src data:")
    with replacing(folder / CONTACT, "contact sheet") as aside:
        aside.write_text(page, encoding="utf-8")


def _figure(record: ClipRecord, jpeg: bytes | None) -> str:
    image = ""
    if jpeg:
        image = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
    facts = [record.source]
    if record.num_frames:
        span = f"{format_seconds(record.start)} + {record.end - record.start:.2f} s"
        facts += [span, f"{record.num_frames} x {record.height} x {record.width}"]
    facts += [record.split] if record.split == "heldout" else []
    told = " \N{MIDDLE DOT} ".join(map(as_text, facts))
    caption = as_text(record.caption) or "<i>no caption</i>"
    return f"<figure>{image}<figcaption>{caption}<small>{told}</small></figcaption></figure>"


def _thumb(folder: Path, record: ClipRecord) -> bytes | None:
    """The clip's thumbnail, if its unit has one."""
    path = thumbs_path(folder, int(record.shard.partition("-")[0]))
    try:
        with safe_open(path, framework="pt") as file:
            return bytes(file.get_tensor(record.key).tolist())
    except (OSError, SafetensorError):  # a prompt has none
        return None


def _table(reasons: Mapping[str, Sequence[Skipped]]) -> str:
    if not reasons:
        return "<h2>Nothing was skipped</h2>"
    rows = "\n".join(
        f"<tr><td>{len(found)}<td>{as_text(reason)}<td>{'<br>'.join(_examples(found))}"
        for reason, found in reasons.items()
    )
    total = sum(map(len, reasons.values()))
    return (
        f'<h2>Skipped: {total}</h2>\n<div class="scroll"><table>'
        f"<tr><th>How many<th>Why<th>For example\n{rows}\n</table></div>"
    )


def _examples(found: Sequence[Skipped]) -> Iterator[str]:
    for each in found[:EXAMPLES]:
        yield as_text(each.name) + (f"<small>{as_text(each.detail)}</small>" if each.detail else "")
