"""SkyReels-V2 text-to-video, a family that rats-video does not know: its denoiser is called as Wan's is.

export RATS_VIDEO_TRUST_CODE=1
rats-video distill --config mine --set 'backbone={kind: custom, target: "own_backbone:SkyReels"}'

Here `mine` is a configuration whose `model` is a folder of SkyReels-V2, and the command starts where Python can import
this module. A student's folder names the class, too: `sample`, `evaluate` and `export` find it in the same way.
"""

from rats_video.backbones.wan import WanBackbone


class SkyReels(WanBackbone):
    """Wan's VAE, text encoder and blocks, and a denoiser that diffusers gives a class of its own."""

    family = "SkyReels-V2"
    pipelines = ("SkyReelsV2Pipeline",)
    can_share_tokens = False
    original_names = ()

    @classmethod
    def component_classes(cls):
        """The class of each part."""
        from diffusers import SkyReelsV2Transformer3DModel

        parts = {name: kind for name, kind in super().component_classes().items() if name != "transformer_2"}
        return {**parts, "transformer": SkyReelsV2Transformer3DModel}
