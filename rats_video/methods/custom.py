"""A method of the user's own: a class of any module that can be imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rats_video.errors import UserError
from rats_video.methods.base import BaseMethod, BaseMethodConfig, Critic, LogRow
from rats_video.methods.context import MethodContext
from rats_video.methods.finite import SKIPPED
from rats_video.types import PromptBatch
from rats_video.user_code import Blame, Options, Target, load_code


class CustomMethodConfig(BaseMethodConfig):
    """Loss = that of the user's own class, which is called with the fields of `MethodInputs` and the options.

    The simplest one is a dataclass that extends `BaseMethod`. It must have `step(batch)`, which gives the loss, a 0-d
    tensor with gradient to the student, and a dict of numbers to log. It may have `critics` and `update_ema`, as in
    `Method`, and as attributes of the class:

    - `uses_gradient`: True if the reward's own gradient is in the loss, so that the run checks that there is one;
    - `evaluations(num_steps, student, teacher, guided)`, a static method: the network evaluations a clip and update, as
      in `BaseMethodConfig`. Without it the cost is taken to be one rollout of the student.
    """

    kind: Literal["custom"]
    target: Target = Field(description="`package.module:Name`; modules of the current directory are found too")
    options: Options = Field({}, description="named arguments of the class, beside those that every method gets")

    @cached_property
    def code(self) -> tuple[Any, Path]:
        """The class and the file of its code; raises UserError if it is not trusted, or not there."""
        return load_code(self.target, kind="method", where="method")

    @property
    def uses_gradient(self) -> bool:
        """The class says so."""
        return bool(getattr(self.code[0], "uses_gradient", False))

    def blame(self, what: str) -> Blame:
        """Names the class in errors of its code."""
        return Blame(f"method {self.target}", self.code[1], what)

    def wrong(self, what: str, fix: str) -> UserError:
        """The error of a class that gives something else than it should."""
        return UserError(what, where=f"method {self.target}", fix=fix)

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:
        """The class's own number, else those of the student's rollout."""
        if not hasattr(self.code[0], "evaluations"):
            return student
        with self.blame("evaluations fails"):
            found = self.code[0].evaluations(num_steps, student, teacher, guided)
        if not isinstance(found, int | float):
            raise self.wrong(f"evaluations gave a {type(found).__name__}", "return a number")
        return found

    def build(self, context: MethodContext) -> CustomMethod:
        """The user's object on the run's roles."""
        found, source = self.code
        if not callable(found):
            name = self.target.partition(":")[2]
            raise UserError(f"{name} in {source} cannot be called", where="method.target", fix="name a class")
        inputs = context.inputs()
        with self.blame("cannot be built"):
            method = found(**inputs, **self.options)
        if not callable(getattr(method, "step", None)):
            raise self.wrong(f"a {type(method).__name__} has no step", "give it step(batch) -> loss, row")
        return CustomMethod(**inputs, config=self, method=method)


@dataclass(frozen=True, kw_only=True)
class CustomMethod(BaseMethod):
    """Checks what the user's object returns, and names it when it fails."""

    config: CustomMethodConfig
    method: Any

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """Loss of one batch, and what to log of it.

        Raises:
            UserError: the code raises anything, or returns something else than a loss and a row.
        """
        with self.config.blame("fails"):
            found = self.method.step(batch)
        match found:
            case (Tensor(ndim=0, requires_grad=True) as loss, Mapping() as row):
                pass
            case (Tensor() as loss, Mapping()):
                gradient = "with" if loss.requires_grad else "without"
                raise self._wrong(f"a loss {list(loss.shape)} {gradient} gradient")
            case _:
                raise self._wrong(f"a {type(found).__name__}")
        numbers = {}
        for name, value in ({SKIPPED: 0.0, "loss": loss} | dict(row)).items():
            if not isinstance(value, int | float) and not (isinstance(value, Tensor) and value.ndim == 0):
                raise self._wrong(f"{name!r}, a {type(value).__name__}, to log")
            numbers[str(name)] = float(value.detach() if isinstance(value, Tensor) else value)
        return loss, numbers

    def _wrong(self, what: str) -> UserError:
        fix = "return the loss, a 0-d tensor with gradient to the student, and a dict of numbers to log"
        return self.config.wrong(f"step returned {what}", fix)

    @property
    def critics(self) -> Mapping[str, Critic]:
        """The user's, if there are any."""
        return getattr(self.method, "critics", {})

    def update_ema(self, updates: int, *, resumed: bool = False) -> None:
        """The user's, if there is one; else an EMA teacher is updated."""
        update = getattr(self.method, "update_ema", super().update_ema)
        with self.config.blame("update_ema fails"):
            update(updates, resumed=resumed)
