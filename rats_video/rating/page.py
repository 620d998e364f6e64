"""The rating page in one file: its own style and script, and no clip."""

from __future__ import annotations

from importlib import resources

from rats_video.rating.votes import MOST_NAME
from rats_video.web import small_page

_BODY = f"""<link rel="icon" href="data:,">
<header><h1>Which clip is better?</h1><p id="progress" aria-live="polite"></p></header>
<main>
<form id="start">
  <label for="person">Your name</label>
  <input id="person" maxlength="{MOST_NAME}" autocomplete="off" required autofocus>
  <button>Start</button>
  <ul>
    <li>You see two clips of the same prompt. Choose the one that you like better and that shows what the prompt says.
    <li><kbd>1</kbd> the first, <kbd>2</kbd> the second, <kbd>0</kbd> no difference, <kbd>U</kbd> undo.
    <li>If the clips have sound, you hear one at a time, by turns. <kbd>S</kbd> plays the other.
    <li>Stop whenever you like. Under the same name you go on where you stopped.
  </ul>
</form>
<section id="trial" aria-label="Two clips" hidden>
  <p id="prompt"></p>
  <p id="hint" hidden>Listen to both: you hear one at a time, by turns. To hear one now, click it, or press
    <kbd>S</kbd> for the other.</p>
  <div id="clips">
    <figure>
      <video id="clip1" muted playsinline aria-label="Clip 1"></video>
      <img id="image1" alt="Clip 1" hidden>
      <figcaption>1</figcaption>
    </figure>
    <figure>
      <video id="clip2" muted playsinline aria-label="Clip 2"></video>
      <img id="image2" alt="Clip 2" hidden>
      <figcaption>2</figcaption>
    </figure>
  </div>
</section>
<p id="end" hidden></p>
<p id="alert" role="alert" hidden></p>
</main>
<footer id="choices" hidden>
  <button data-choice="left"><kbd>1</kbd> First</button>
  <button data-choice="same"><kbd>0</kbd> No difference</button>
  <button data-choice="right"><kbd>2</kbd> Second</button>
  <button id="undo"><kbd>U</kbd> Undo</button>
</footer>
"""


def rating_page() -> str:
    """The page as HTML; what a person sees comes from the server that served it, and from nowhere else."""
    files = resources.files("rats_video.rating")
    style, script = (files.joinpath(name).read_text(encoding="utf-8") for name in ("rate.css", "rate.js"))
    return small_page(
        "rats-video: rate", style, _BODY, script, "media-src blob:; connect-src 'self'; img-src data: blob:"
    )
