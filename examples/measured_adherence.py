"""A reward without gradient: how many of the prompt's five words the pixels show. See `measured_adherence.yaml`."""

from rats_video.datasets.shapes_measure import measure_shapes


def adherence(videos, prompts):
    """Videos `[B, T, 3, height, width]` in [0, 1] and B prompts to scores `[B]` in [0, 1]."""
    return measure_shapes(videos, prompts).adherence


adherence.differentiable = False
