"""The model card: contents, origin, code to sample it, measurements, limits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import rats_video
from rats_video.assets import is_embedded
from rats_video.errors import UserError
from rats_video.evaluation.tables import aligned, metric_title
from rats_video.export.base import ExportedStudent, Form
from rats_video.export.usage import fenced, sigma_string
from rats_video.files import RECORD
from rats_video.reading import read_json
from rats_video.training.guard import finite_mean
from rats_video.training.run_folder import read_sessions

TAG = "rats-video"
LIMITS = (
    "What the base cannot draw it cannot draw either, and the base's licence and biases hold for it.",
    "It was trained to please a learned reward: look for what such a reward does not see.",
    "Guidance, other samplers, other sizes and other numbers of calls were not trained for.",
)


@dataclass(frozen=True)
class Training:
    """A run's records of itself, as far as there are any.

    Args:
        config: its resolved configuration.
        environment: versions and hardware.
        table: lines of its evaluation.
        guard: what its guard saw.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    table: Sequence[str] = ()
    guard: Mapping[str, Any] = field(default_factory=dict)


def model_card(
    exported: ExportedStudent, form: Form, name: str, training: Training, *, scale: float, measured: Sequence[str]
) -> str:
    """The card of an export called `name`; `measured` are paragraphs on how it was checked."""
    card, base = exported.card, exported.base_id
    counts = ", ".join(map(str, card.num_steps))
    source = "" if exported.pictures is None else ", from a picture"
    parts = [
        f"# {escape(base)} in {counts} calls ({form.name})",
        f"{escape(base)}, distilled by [RATS](https://arxiv.org/abs/2604.14910) to sample in {counts} network calls "
        f"without guidance{source}. This is {form.summary}."
        + ("" if scale == 1 else f" Taken {scale:g} times, not whole."),
        form.programs(exported),
        "## Sampling",
        *([fenced(command, "sh")] if (command := form.install(exported)) else []),
        form.sampling(exported, name),
        *([f"Mind: {note}."] if (note := form.note(exported)) else []),
        *_noise_levels(exported),
        "## What was checked",
        *measured,
        "## How it was trained",
        *_training(exported, training),
        *_results(training, scale),
        "## Limits",
        "\n".join(f"- {limit}" for limit in (*LIMITS, *form.limits)),
    ]
    return _front_matter(exported, form) + "\n\n".join(parts) + "\n"


def _front_matter(exported: ExportedStudent, form: Form) -> str:
    fields: dict[str, Any] = {
        "base_model": exported.base_id, "library_name": "diffusers", "pipeline_tag": exported.task,
        "tags": [TAG, "few-step", exported.task, *form.tags],
        "base_model_relation": form.relation or ("adapter" if exported.is_lora else "finetune"),
    }  # fmt: skip
    fields |= _license(exported)
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n\n"


def _license(exported: ExportedStudent) -> dict[str, str]:
    """The base's licence as the head of its own card states it, where there is one."""
    if is_embedded(exported.card.model):
        return {"license": "apache-2.0"}
    path = exported.base / "README.md"
    known = read_front_matter(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")
    return {key: str(known[key]) for key in ("license", "license_name", "license_link") if key in known}


def read_front_matter(text: str) -> dict[str, Any]:
    """The YAML at the head of a model card; nothing where there is none."""
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _noise_levels(exported: ExportedStudent) -> list[str]:
    card, size = exported.card, exported.size
    rows = [[str(steps), sigma_string(levels)] for steps, levels in exported.sigmas.items()]
    pixels, rate = f"{size['height']} x {size['width']} pixels", f"{card.clip['fps']:g} frames a second"
    clips = f"{size['num_frames']} frames of {pixels}, {rate}" if exported.makes == "video" else f"images of {pixels}"
    trained = (
        f"It was trained at {clips}, without guidance, at these noise levels (shift {card.shift:g}). "
        "At others it is another model."
    )
    if card.sampler == "renoise":
        trained += (
            " Each call predicts a clean clip, on which fresh noise is put for the next: Euler is another sampler."
        )
    return [trained, "\n".join(aligned([["calls", "noise levels"], *rows]))]


def _training(exported: ExportedStudent, training: Training) -> list[str]:
    card, config = exported.card, _portable(training.config)
    weights = "a LoRA" if exported.is_lora else "all weights"
    lines = [f"- {card.steps} optimizer steps, seed {card.seed}, base in {card.dtype}; {weights} of the denoiser"]
    lines += [f"- over {escape(Path(lora.path).name)}, a LoRA, at scale {lora.scale:g}" for lora in card.base_loras]
    for key in ("reward", "heldout_reward", "teacher"):
        if isinstance(settings := config.get(key), dict):
            shown = ", ".join(
                f"{name} {value}" for name, value in settings.items() if isinstance(value, str | int | float)
            )
            lines.append(f"- {key.replace('_', ' ')}: {escape(shown)}")
    versions = ", ".join(f"{name} {value}" for name, value in training.environment.items())
    if versions:
        lines.append(f"- with {escape(versions)}")
    lines.append(f"- exported by rats-video {rats_video.__version__}")
    if not config:
        return ["\n".join(lines), "Its configuration was not recorded beside it."]
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return ["\n".join(lines), f"<details><summary>Configuration</summary>\n\n{fenced(text, 'yaml')}\n\n</details>"]


def _results(training: Training, scale: float) -> list[str]:
    parts = []
    table = [line for line in training.table if line.startswith("|")]
    if table:
        title = "On held-out prompts" + ("" if scale == 1 else ", of the student taken whole")
        parts += ["## Evaluation", f"{title}:", "\n".join(table)]
    if guard := _guard_table(training.guard):
        parts += ["What the guard against reward hacking saw on held-out clips, as means:", "\n".join(guard)]
    return parts


def _guard_table(guard: Mapping[str, Any]) -> list[str]:
    looks = {look["step"]: look["scores"] for look in guard.get("looks", [])}
    kept = looks.get(guard.get("best"), {})
    if not kept:
        return []
    rows = [[metric_title(name), *(f"{finite_mean(of[name]):.3g}" for of in (guard["teacher"], kept))]
            for name in kept if name in guard["teacher"]]  # fmt: skip
    return aligned([["measure", "teacher", f"student of step {guard['best']}"], *rows])


def _portable(tree: Any) -> Any:
    """A configuration without the places of one machine: of an absolute path only the name is kept."""
    match tree:
        case dict():
            return {key: _portable(value) for key, value in tree.items()}
        case list() | tuple():
            return [_portable(value) for value in tree]
        case str() if tree.startswith(("/", "~")):
            return Path(tree).name
        case _:
            return tree


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"^[-+]|[\\`*_{}\[\]<>()#!|~&$]", r"\\\g<0>", " ".join(text.split()))


def read_training(run: Path, student: Path) -> Training:
    """The records of `run`, or the embedded student's own."""
    record = _json(student / RECORD)
    rows = [[metric_title(name), f"{value:.3f}"] for name, value in record.get("metrics", {}).items()]
    metrics = aligned([["measure", "student"], *rows]) if rows else []
    config = run / "config.resolved.yaml"
    table = run / "evaluation" / "evaluation.md"
    return Training(
        config=yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else record.get("config", {}),
        environment=_environment(run / "environment.json") or record.get("environment", {}),
        table=table.read_text(encoding="utf-8").splitlines() if table.is_file() else metrics,
        guard=_json(run / "guard.json"),
    )


def _environment(path: Path) -> dict[str, Any]:
    """Versions and hardware of the run's last session, without the machine's name and the command."""
    try:
        newest = read_sessions(path)[-1:]
    except ValueError as error:
        raise _damaged(path) from error
    return {name: value for session in newest for name, value in session.items() if name not in {"host", "command"}}


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path)) if path.is_file() else {}
    except (TypeError, ValueError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> UserError:
    return UserError("is damaged: no JSON object", where=str(path), fix="mend it or move it away")
