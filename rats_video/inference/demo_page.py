"""The demo page: a prompt, a few knobs, and the student beside its teacher."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

from rats_video.errors import UserError
from rats_video.inference.demo import MAX_PICTURE, MAX_PROMPT, MAX_SEED, TOO_LARGE, DemoClip, DemoModels, Role
from rats_video.inference.demo_style import CSS

if TYPE_CHECKING:
    import gradio as gr

QUEUE = 8  # visitors who may wait
# Not Gradio's own upload, which keeps files and serves them: the picture comes within the request, and goes with it.
_PICTURE = """<label>First picture, if you like
<input type="file" accept="image/png,image/jpeg,image/webp,image/bmp,image/tiff"></label>
${value.startsWith("data:image/") ? `<img src="${value}" alt="The clip starts from this picture">
<button type="button">Remove</button>` : ""}"""
_READ_PICTURE = f"""
element.addEventListener("change", (event) => {{
  const file = event.target.files[0];
  if (!file) return;
  if (file.size > {MAX_PICTURE}) {{ props.value = "{TOO_LARGE}"; return; }}
  const reader = new FileReader();
  reader.onload = () => {{ props.value = reader.result; }};
  reader.readAsDataURL(file);
}});
element.addEventListener("click", (event) => {{ if (event.target.tagName === "BUTTON") props.value = ""; }});
"""
# A browser plays no sound before it is asked to; of two clips one is heard.
_HEAR_ONE = """
element.addEventListener("volumechange", (event) => {
  if (event.target.muted) return;
  for (const other of document.querySelectorAll("#clips video")) if (other !== event.target) other.muted = true;
}, true);
"""


def build_page(studio: DemoModels, examples: Sequence[str], *, name: str, teacher: bool) -> gr.Blocks:
    """Lay the page out.

    Args:
        studio: what makes the clips.
        examples: prompts to offer.
        name: of the student, for the heading.
        teacher: whether the teacher is asked for at first.
    """
    import gradio as gr

    fewest, most = studio.nfe_range
    with gr.Blocks(title="rats-video", analytics_enabled=False) as page:
        gr.HTML(_heading(studio, name), elem_id="heading")
        with gr.Row(elem_id="ask"):
            prompt = gr.Textbox(
                examples[0],
                label="Prompt",
                lines=1,
                max_lines=3,
                max_length=MAX_PROMPT,
                autofocus=True,
                scale=5,
                min_width=280,
            )
            go = gr.Button("Generate", variant="primary", scale=1, min_width=120, elem_id="generate")
        status = gr.HTML(_status("Press Enter in the prompt, or Generate."), elem_id="status")
        # Above the rest: on a phone they would lie below the fold, and Generate seem to do nothing.
        with gr.Row(elem_id="clips"):
            cards = [
                gr.HTML(visible=False, elem_id=f"{role}-card", js_on_load=_HEAR_ONE) for role in ("student", "teacher")
            ]
        with gr.Row(elem_id="examples"):
            for text in examples:
                example = gr.Button(text, size="sm", variant="secondary", min_width=0, scale=0)
                example.click(partial(str, text), None, prompt, show_progress="hidden", api_visibility="private")
        picture = gr.HTML(
            "", html_template=_PICTURE, js_on_load=_READ_PICTURE, elem_id="picture", visible=studio.takes_pictures
        )
        with gr.Row(elem_id="knobs", equal_height=True):
            nfe = gr.Slider(
                fewest, most, studio.trained[0], step=1, label="Network calls of the student",
                info=f"trained for {', '.join(map(str, studio.trained))}", min_width=240, buttons=[],
            )  # fmt: skip
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=140)
            with gr.Column(min_width=240):
                fresh = gr.Checkbox(value=False, label="A new seed each time", container=False)
                beside = gr.Checkbox(
                    value=teacher, label="Teacher beside student", container=False,
                    info=f"{studio.teacher.num_steps} guided steps, {studio.teacher.nfe} calls, from the same noise",
                )  # fmt: skip
        gr.on(
            [go.click, prompt.submit], _handler(studio),
            [prompt, nfe, seed, fresh, beside, picture], [status, seed, *cards],
            concurrency_limit=1, trigger_mode="once", show_progress="full", show_progress_on=[status],
            api_visibility="private",
        )  # fmt: skip
    page.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)
    return page


def launch_page(page: gr.Blocks, port: int, *, takes_pictures: bool) -> None:
    """Serve the page on this machine alone, and come back at once.

    Args:
        page: from `build_page`.
        port: on this machine.
        takes_pictures: whether a request may be as large as a picture.

    Raises:
        UserError: the port is taken.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    from rats_video.inference.demo_guard import MAX_BODY, PageGuard

    theme = gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", radius_size="lg",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],  # Gradio's own come from the web
    )  # fmt: skip
    max_body = MAX_BODY + (4 * MAX_PICTURE // 3 if takes_pictures else 0)  # base64
    try:
        page.launch(
            server_name="127.0.0.1", server_port=port, share=False, prevent_thread_lock=True, quiet=True,
            show_error=False, allowed_paths=[], max_file_size=1, footer_links=[], ssr_mode=False, mcp_server=False,
            pwa=False, run_history=False, enable_monitoring=False, theme=theme, css=CSS,
            app_kwargs={"middleware": [Middleware(PageGuard, max_body=max_body)]},
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot listen on port {port}", where="--port", fix="give another") from error


def _handler(studio: DemoModels) -> Any:
    """The action of Generate, as Gradio calls it."""
    import gradio as gr

    def generate(
        prompt: object,
        nfe: object,
        seed: object,
        fresh: object,
        beside: object,
        picture: object,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  # how Gradio gives one
    ) -> Iterator[tuple[Any, ...]]:
        try:
            wish = studio.accept(prompt, nfe, random.randint(0, MAX_SEED) if fresh else seed, picture)
        except UserError as error:
            none = gr.HTML(visible=False)  # the clips of another prompt
            yield _status(str(error), alert=True), gr.skip(), none, none
            return
        roles: tuple[Role, ...] = ("student", "teacher") if beside else ("student",)
        steps = {role: studio.spec(role, wish.nfe).num_steps for role in roles}
        total, done = sum(steps.values()), 0
        made: list[DemoClip] = []
        for role in roles:

            def advance() -> None:
                nonlocal done
                progress((done, total), desc=role, unit="steps")  # noqa: B023  # called in this turn only
                done += 1

            made.append(studio.make(role, wish, advance))
            cards = [gr.HTML(_card(each, studio.clip.width / studio.clip.height), visible=True) for each in made]
            cards += [gr.HTML(visible=False)] * (2 - len(cards))
            yield _status(_verdict(made)), wish.seed, *cards

    return generate


def _heading(studio: DemoModels, name: str) -> str:
    clip, counts = studio.clip, ", ".join(map(str, studio.trained))
    return (
        f"<h1>rats-video</h1><p><b>{escape(name)}</b>: a few-step student, trained for {counts} network calls. "
        f"{clip.num_frames} frames of {clip.width} x {clip.height} pixels.</p>"
    )


def _status(text: str, *, alert: bool = False) -> str:
    role = "alert" if alert else "status"
    return f'<p class="{role}" role="{role}">{escape(text)}</p>'


def _verdict(made: Sequence[DemoClip]) -> str:
    """The student's cost beside the teacher's."""
    if len(made) < 2:
        return ""
    student, teacher = made
    return (
        f"{student.nfe} calls instead of {teacher.nfe}: the student took {student.seconds:.2f} s, "
        f"its teacher {teacher.seconds:.2f} s, from the same noise."
    )


def _card(made: DemoClip, ratio: float) -> str:
    """A clip of that width by height, with what it cost; the file is in the page, so that the server keeps none."""
    data = "data:video/mp4;base64," + base64.b64encode(made.mp4).decode()
    facts = [("seconds", f"{made.seconds:.2f} s"), ("network calls", str(made.nfe))]
    facts += [] if made.reward is None else [("reward", f"{made.reward:.3f}")]
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    title = made.role.capitalize()
    hint = "<p>Muted at first: its speaker button turns the sound on.</p>" if made.has_sound else ""
    return (
        f'<figure class="clip"><figcaption>{title}<a href="{data}" download="{made.role}.mp4">Save</a></figcaption>'
        f'<video src="{data}" style="--ratio: {ratio:.4g}" aria-label="{title}\'s clip" '
        "controls autoplay loop muted playsinline></video>"
        f"{hint}<dl>{rows}</dl></figure>"
    )
