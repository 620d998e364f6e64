"""A graph of ComfyUI's nodes, in the two forms that ComfyUI reads: what its server runs, and what its page shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The sockets and widgets of each node in turn, and its outputs; a widget has no type. Read from ComfyUI 0.10.0, commit
# 9d273d3a: nodes.py and comfy_extras/nodes_{custom_sampler,flux,hunyuan,lt,model_advanced,video,wan}.py.
_SIZE = dict.fromkeys(("width", "height", "length", "batch_size"))
_CONDITIONED = ("CONDITIONING", "CONDITIONING", "LATENT")
OPTIONAL = {
    "start_image", "end_image", "clip_vision_output", "clip_vision_start_image", "clip_vision_end_image",
}  # fmt: skip
"""Sockets that may stay empty."""
NODES: Mapping[str, tuple[Mapping[str, str | None], tuple[str, ...]]] = {
    "UNETLoader": ({"unet_name": None, "weight_dtype": None}, ("MODEL",)),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": None, "strength_model": None}, ("MODEL",)),
    "CheckpointLoaderSimple": ({"ckpt_name": None}, ("MODEL", "CLIP", "VAE")),
    "CLIPLoader": ({"clip_name": None, "type": None, "device": None}, ("CLIP",)),
    "DualCLIPLoader": ({"clip_name1": None, "clip_name2": None, "type": None, "device": None}, ("CLIP",)),
    "FluxGuidance": ({"conditioning": "CONDITIONING", "guidance": None}, ("CONDITIONING",)),
    "VAELoader": ({"vae_name": None}, ("VAE",)),
    "CLIPTextEncode": ({"clip": "CLIP", "text": None}, ("CONDITIONING",)),
    "LTXVConditioning": (
        {"positive": "CONDITIONING", "negative": "CONDITIONING", "frame_rate": None}, ("CONDITIONING", "CONDITIONING"),
    ),
    "LoadImage": ({"image": None}, ("IMAGE", "MASK")),
    "ImageScale": (
        {"image": "IMAGE", "upscale_method": None, "width": None, "height": None, "crop": None}, ("IMAGE",),
    ),
    "CLIPVisionLoader": ({"clip_name": None}, ("CLIP_VISION",)),
    "CLIPVisionEncode": ({"clip_vision": "CLIP_VISION", "image": "IMAGE", "crop": None}, ("CLIP_VISION_OUTPUT",)),
    "WanImageToVideo": (
        {
            "positive": "CONDITIONING", "negative": "CONDITIONING", "vae": "VAE",
            "clip_vision_output": "CLIP_VISION_OUTPUT", "start_image": "IMAGE", **_SIZE,
        },
        _CONDITIONED,
    ),
    "WanFirstLastFrameToVideo": (
        {
            "positive": "CONDITIONING", "negative": "CONDITIONING", "vae": "VAE",
            "clip_vision_start_image": "CLIP_VISION_OUTPUT", "clip_vision_end_image": "CLIP_VISION_OUTPUT",
            "start_image": "IMAGE", "end_image": "IMAGE", **_SIZE,
        },
        _CONDITIONED,
    ),
    "LTXVImgToVideo": (
        {
            "positive": "CONDITIONING", "negative": "CONDITIONING", "vae": "VAE", "image": "IMAGE", **_SIZE,
            "strength": None,
        },
        _CONDITIONED,
    ),
    "EmptyHunyuanLatentVideo": ({"width": None, "height": None, "length": None, "batch_size": None}, ("LATENT",)),
    "EmptyLTXVLatentVideo": ({"width": None, "height": None, "length": None, "batch_size": None}, ("LATENT",)),
    "Wan22ImageToVideoLatent": ({"vae": "VAE", "start_image": "IMAGE", **_SIZE}, ("LATENT",)),
    "KSamplerSelect": ({"sampler_name": None}, ("SAMPLER",)),
    "ManualSigmas": ({"sigmas": None}, ("SIGMAS",)),
    "SplitSigmas": ({"sigmas": "SIGMAS", "step": None}, ("SIGMAS", "SIGMAS")),
    "SamplerCustom": (
        {
            "model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "sampler": "SAMPLER",
            "sigmas": "SIGMAS", "latent_image": "LATENT", "add_noise": None, "noise_seed": None, "cfg": None,
        },
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "CreateVideo": ({"images": "IMAGE", "fps": None}, ("VIDEO",)),
    "SaveVideo": ({"video": "VIDEO", "filename_prefix": None, "format": None, "codec": None}, ()),
}  # fmt: skip
SEED = "noise_seed"  # the page has one more widget behind it: what becomes of the seed after a run
WIDTH, HEIGHT, ROWS = 360, 260, 4  # of a node's place on the page


@dataclass(frozen=True)
class Output:
    """One of the outputs of a node."""

    node: int
    slot: int


@dataclass
class Graph:
    """Nodes in an order in which each comes after those that it takes from."""

    nodes: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def add(self, kind: str, **inputs: Any) -> tuple[Output, ...]:
        """Add a node, whose inputs are plain values and outputs of earlier ones; returns its own."""
        sockets, outputs = NODES[kind]
        assert sockets.keys() - OPTIONAL <= inputs.keys() <= sockets.keys()
        self.nodes.append((kind, inputs))
        return tuple(Output(len(self.nodes), slot) for slot in range(len(outputs)))

    def api(self) -> dict[str, Any]:
        """What the server takes as `prompt`: nodes by number."""
        return {
            str(number): {"class_type": kind, "inputs": {name: _reference(value) for name, value in inputs.items()}}
            for number, (kind, inputs) in enumerate(self.nodes, 1)
        }

    def page(self) -> dict[str, Any]:
        """What the page opens: nodes with places, and numbered links between them."""
        links: list[list[Any]] = []
        nodes = []
        for number, (kind, inputs) in enumerate(self.nodes, 1):
            sockets, outputs = NODES[kind]
            taken: list[dict[str, Any]] = []
            widgets: list[Any] = []
            for name, of in sockets.items():
                if name not in inputs:
                    continue
                if of is None:
                    widgets += [inputs[name], "fixed"] if name == SEED else [inputs[name]]
                else:
                    origin: Output = inputs[name]
                    links.append([len(links) + 1, origin.node, origin.slot, number, len(taken), of])
                    taken.append({"name": name, "type": of, "link": len(links)})
            column, row = divmod(number - 1, ROWS)
            nodes.append({
                "id": number, "type": kind, "pos": [column * WIDTH, row * HEIGHT], "size": [WIDTH - 40, HEIGHT - 60],
                "flags": {}, "order": number - 1, "mode": 0, "inputs": taken,
                "outputs": [{"name": made, "type": made, "links": []} for made in outputs],
                "properties": {"Node name for S&R": kind}, "widgets_values": widgets,
            })  # fmt: skip
        for link, node, slot, *_ in links:
            nodes[node - 1]["outputs"][slot]["links"].append(link)
        return {
            "last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links, "groups": [],
            "config": {}, "extra": {}, "version": 0.4,
        }  # fmt: skip


def _reference(value: Any) -> Any:
    return [str(value.node), value.slot] if isinstance(value, Output) else value
