"""rats-video: few-step text-to-video students by Reward-Aware Trajectory Shaping (arXiv 2604.14910)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rats_video.api import Run, Student, UserError, distill, evaluate, load_reward

__version__ = "0.1.0"
__all__ = ["Run", "Student", "UserError", "distill", "evaluate", "load_reward"]


def __getattr__(name: str) -> Any:
    """The Python API, loaded when first asked for: it needs torch, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'rats_video' has no attribute {name!r}")
    from rats_video import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
