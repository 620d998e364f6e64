"""A family of the user's own: a subclass of `PipelineBackbone` in any module that can be imported."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rats_video.backbones.base import PipelineBackbone
from rats_video.config.fields import Config
from rats_video.errors import UserError
from rats_video.user_code import Blame, Options, Target, load_code, source_file

WHERE = "backbone"
NAMES = ("family", "pipelines", "lora_targets", "text_limit")
CALLS = ("__init__", "_encode", "_velocity", "_to_vae", "_from_vae", "_decode")


class CustomBackboneConfig(Config):
    """A class of the user's own module."""

    kind: Literal["custom"]
    target: Target = Field(description="`package.module:Name`; modules of the current directory are found too")
    options: Options = Field({}, description="named arguments of the class, beside the pipeline's parts")

    def sources(self) -> list[Path]:
        """The files of its module's folder: what it computes depends on them."""
        return sorted(source_file(self.target, where=WHERE).parent.glob("*.py"))

    def families(self) -> Sequence[type[PipelineBackbone]]:
        """The class alone, imported if the user trusts it.

        Raises:
            UserError: it is not trusted, cannot be imported or is no whole family.
        """
        found, source = load_code(self.target, kind=WHERE, where=WHERE)
        if not (inspect.isclass(found) and issubclass(found, PipelineBackbone)):
            raise UserError(
                f"{self.target} is no family", where=f"{WHERE}.target",
                fix="name a subclass of rats_video.backbones.base.PipelineBackbone",
            )  # fmt: skip
        missing = [name for name in NAMES if not hasattr(found, name)] + sorted(found.__abstractmethods__)
        if missing:
            raise UserError(f"{self.target} lacks {', '.join(missing)}", where=f"{WHERE}.target")
        own = {name: _blamed(getattr(found, name), f"{WHERE} {self.target}", source) for name in CALLS}
        return (type(found.__name__, (found,), {**own, "options": self.options}),)


def _blamed(call: Any, where: str, source: Path) -> Any:
    """The same function, whose exceptions name the user's code."""

    @functools.wraps(call)
    def blamed(*args: Any, **options: Any) -> Any:
        with Blame(where, source, "fails"):
            return call(*args, **options)

    return blamed
