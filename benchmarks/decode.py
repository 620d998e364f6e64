"""What each way to decode with gradient keeps, needs at most and costs.

    python benchmarks/decode.py [--device auto] [--frames 3 5 9 17] [--repeats 2]

Runs the embedded tiny Wan VAE for times, and the real decoders by their shapes alone (torch's meta device: every tensor
is counted, none is computed): about a minute of one CPU core. Prints a table a VAE and writes
benchmarks/results/decode.json:

* saved: bytes alive on the device between forward and backward, beside latents, weights and pixels;
* peak: the most that is alive at any time of forward and backward, pixels included; the allocator's own on a GPU;
* host: bytes that `offload` put into host memory;
* time: forward and backward, as a multiple of plain decoding of the same clip in the same run.

Off a GPU, host memory is told by the call that allocates it, the way back to the device is no copy, and peak therefore
lacks one chunk's caches.
"""

from __future__ import annotations

import argparse
import copy
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rats_video.assets import resolve_folder
from rats_video.backbones.cogvideox_decode import decode_cogvideox
from rats_video.backbones.compute import DecodeConfig
from rats_video.backbones.wan import use_fast_norms
from rats_video.backbones.wan_decode import decode_unclamped
from rats_video.commands.device import pick_device
from rats_video.commands.record import environment
from rats_video.files import write_json

RESULTS = Path(__file__).parent / "results" / "decode.json"
PLAIN = "plain"
RECOMPUTE = DecodeConfig(checkpoint=True)
MODES: dict[str, tuple[DecodeConfig, int | None]] = {  # levers, and latent frames with gradient
    PLAIN: (DecodeConfig(), None),
    "checkpoint": (RECOMPUTE, None),
    "checkpoint, offload": (DecodeConfig(checkpoint=True, offload=True), None),
    "window 2": (DecodeConfig(), 2),
    "window 2, checkpoint": (RECOMPUTE, 2),
    "window 1, checkpoint": (RECOMPUTE, 1),
}


@dataclass(frozen=True)
class Decoder:
    """A VAE, our decode of it, and the `[C, H, W]` of its latents at the size it is measured at."""

    vae: Any
    decode: Callable[..., Tensor]
    shape: tuple[int, int, int]
    frames: tuple[int, ...]

    def copied(self) -> Decoder:
        """One of its own for a mode: checkpointing within a chunk, once on, stays on."""
        return replace(self, vae=copy.deepcopy(self.vae))

    def run(self, frames: int, mode: str) -> tuple[Tensor, Tensor]:
        """Latents and their pixels; the window is the last frames, before which all caches are warm."""
        decoding, window = MODES[mode]
        parameter = next(self.vae.parameters())
        channels, height, width = self.shape
        latents = torch.randn(
            1, channels, frames, height, width,
            generator=None if parameter.is_meta else torch.Generator(parameter.device).manual_seed(frames),
            device=parameter.device, requires_grad=True,
        )  # fmt: skip
        grad_frames = None if window is None else range(frames - window, frames)
        return latents, self.decode(self.vae, latents, decoding, grad_frames)


def tiny_wan(device: torch.device, frames: Sequence[int]) -> Decoder:
    """The embedded model's VAE at 64 x 64, run for real."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(resolve_folder("tiny-wan", where="model") / "vae").to(device)
    use_fast_norms(vae)
    return Decoder(vae.eval().requires_grad_(requires_grad=False), decode_unclamped, (4, 8, 8), tuple(frames))


def real_decoders() -> dict[str, Decoder]:
    """The published decoders' shapes, in float32."""
    from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan

    with torch.device("meta"):
        wan21 = AutoencoderKLWan()
        wan22 = AutoencoderKLWan(
            base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, patch_size=2, in_channels=12,
            out_channels=12, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
        )  # fmt: skip
        cogvideox = AutoencoderKLCogVideoX(block_out_channels=(128, 256, 256, 512))
    for vae in (wan21, wan22, cogvideox):
        vae.eval().requires_grad_(requires_grad=False)
    for vae in (wan21, wan22):
        use_fast_norms(vae)
    return {
        "Wan 2.1, 480 x 832": Decoder(wan21, decode_unclamped, (16, 60, 104), (3, 21)),
        "Wan 2.2 5B, 704 x 1280": Decoder(wan22, decode_unclamped, (48, 44, 80), (5,)),
        "CogVideoX, 480 x 720": Decoder(cogvideox, decode_cogvideox, (16, 60, 90), (7,)),
    }


class Ledger(TorchDispatchMode):
    """Counts the bytes of every tensor that is made inside it for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.host = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and enter what it made."""
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                # Only save_on_cpu allocates without computing.
                self._enter(tensor.untyped_storage(), is_host=func is torch.ops.aten.empty.memory_format)
        return outputs

    def _enter(self, storage: Any, *, is_host: bool) -> None:
        key, size = storage._cdata, storage.nbytes()  # noqa: SLF001  # the one name of a storage without memory
        if key in self._known:
            return
        self._known.add(key)
        if is_host:
            self.host += size
        else:
            self.live += size
            self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key, 0 if is_host else size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def memory(decoder: Decoder, frames: int, mode: str) -> dict[str, int]:
    """Bytes saved, at the peak, and put into host memory."""
    device = next(decoder.vae.parameters()).device
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with torch.device(device), Ledger() as ledger:
        latents, pixels = decoder.run(frames, mode)
        beside = latents.nbytes + pixels.nbytes
        saved = (torch.cuda.memory_allocated() - before if on_gpu else ledger.live) - beside
        pixels.sum().backward()
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else ledger.peak
    return {"saved": saved, "peak": peak, "host": ledger.host}


def seconds(decoder: Decoder, frames: int, mode: str) -> float:
    """Of one forward and backward."""
    on_gpu = next(decoder.vae.parameters()).is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    decoder.run(frames, mode)[1].sum().backward()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def times(decoders: dict[str, Decoder], frames: int, repeats: int) -> dict[str, float]:
    """The shortest of several runs of every mode, by turns so that a busy machine disturbs all alike."""
    runs = [{mode: seconds(decoder, frames, mode) for mode, decoder in decoders.items()} for _ in range(repeats)]
    return {mode: min(run[mode] for run in runs) for mode in decoders}


def report(name: str, decoder: Decoder, repeats: int) -> list[dict[str, Any]]:
    """Measure and print one decoder; no times where nothing is computed."""
    decoders = {mode: decoder.copied() for mode in MODES}
    is_real = not next(decoder.vae.parameters()).is_meta
    unit, scale = ("MB", 1e6) if is_real else ("GB", 1e9)
    print(f"\n{name}\n{'':24}{'F':>4}{'saved':>12}{'peak':>12}{'host':>12}{'time':>8}")
    rows: list[dict[str, Any]] = [
        {"decoder": name, "mode": mode, "latent_frames": frames, **memory(own, frames, mode)}
        for mode, own in decoders.items()
        for frames in decoder.frames
    ]
    for frames in decoder.frames if is_real else ():
        took = times(decoders, frames, repeats)
        for row in rows:
            if row["latent_frames"] == frames:
                row["seconds"], row["time"] = took[row["mode"]], took[row["mode"]] / took[PLAIN]
    for row in rows:
        sizes = "".join(f"{row[part] / scale:>9.1f} {unit}" for part in ("saved", "peak", "host"))
        cost = f"{row['time']:>7.2f}x" if is_real else ""
        print(f"{row['mode']:24}{row['latent_frames']:>4}{sizes}{cost}", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--frames", type=int, nargs="+", default=[3, 5, 9, 17], help="latent frames of the tiny clips")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    decoders = {"tiny-wan, 64 x 64": tiny_wan(device, options.frames), **real_decoders()}
    rows = [row for name, decoder in decoders.items() for row in report(name, decoder, options.repeats)]
    write_json(RESULTS, {"environment": environment(device), "rows": rows})


if __name__ == "__main__":
    main()
