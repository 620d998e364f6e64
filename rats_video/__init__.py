"""rats-video: few-step text-to-video students by Reward-Aware Trajectory Shaping (arXiv 2604.14910)."""

__version__ = "0.1.0"
