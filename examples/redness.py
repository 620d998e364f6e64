"""A reward of your own, with gradient and a score a frame.

export RATS_VIDEO_TRUST_CODE=1
rats-video distill --config tiny --set 'reward={kind: custom, target: "examples.redness:Redness"}' --output runs/red
"""


class Redness:
    """The red of each frame less the mean of its green and blue."""

    def __init__(self, weight=1.0):
        self.weight = weight

    def __call__(self, videos, prompts):
        """Videos `[B, T, 3, height, width]` in [0, 1] and B prompts to frame scores `[B, T]` in [-weight, weight]."""
        red, green, blue = videos.unbind(dim=2)
        return self.weight * (red - (green + blue) / 2).mean(dim=(2, 3))
