"""What every kind of reward tells of itself."""

from __future__ import annotations

from typing import ClassVar, Literal

from rats_video.config.schema import Config


class RewardKind(Config):
    """What `rats-video rewards list` tells of a kind; the first line of its docstring says what it scores.

    Attributes:
        per: what one score is given to.
        source: where its weights come from.
        folders: the keys that name folders of weights.
    """

    per: ClassVar[Literal["frame", "clip"]]
    source: ClassVar[str]
    folders: ClassVar[tuple[str, ...]] = ("path",)


class BaseReward(RewardKind):
    """One that ships with the package.

    Attributes:
        differentiable: whether gradient reaches the pixels; otherwise it cannot be a direct loss.
    """

    differentiable: ClassVar[bool] = True
