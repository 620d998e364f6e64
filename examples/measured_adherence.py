r"""A reward without gradient: the share of the prompt's five words that its pixels show.

export RATS_VIDEO_TRUST_CODE=1
rats-video distill --config tiny --set 'reward={kind: custom, target: "examples.measured_adherence:adherence"}' \
                   --set 'method.policy={samples: 8, noise: 0.5}' --output runs/measured
"""

from rats_video.datasets.shapes.measure import measure_shapes


def adherence(videos, prompts):
    """Videos `[B, T, 3, height, width]` in [0, 1] and B prompts to scores `[B]` in [0, 1]."""
    return measure_shapes(videos, prompts).adherence


adherence.differentiable = False  # the loss cannot follow its gradient: method.policy raises it
