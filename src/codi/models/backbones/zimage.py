"""Z-Image (base, Turbo): one stream of image and caption tokens, each padded to a multiple of 32 by a learned token.

The network's time is 1 - sigma, and it predicts -v. Positions of image tokens begin where the padded caption ends, so
they depend on the prompt's length. Padding up to a multiple of 32 is attended to like any other token, so in a batch
each prompt is padded to its own multiple, and only tokens beyond that are masked.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from ...errors import UserError
from .. import codec
from ..hooks import device_of
from ..text import FEATURES, PromptEncoder
from .base import stock
from .transformer import Stream, TransformerFamily, require_channels

GROUP = 32  # image and caption tokens are each padded to a multiple of it
LENGTH, PREFIX = 512, 3  # tokens of a prompt with its chat template, and of the template before the prompt
ENTRY = "2-1"  # the patch embedding of pictures: 2 x 2 cells, 1 frame
# Settings that a ControlNet copies from the network's configuration.
SHARED = ("dim", "n_refiner_layers", "n_heads", "n_kv_heads", "norm_eps", "qk_norm")


def pack(z: Tensor) -> Tensor:
    """Pack latents (B, C, h, w) into tokens (B, h w / 4, 4 C): each has 2 x 2 cells, channels last."""
    cells = z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Invert `pack`; `grid`: rows and columns of tokens."""
    cells = tokens.unflatten(2, (2, 2, -1)).unflatten(1, grid)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def captions(network: Any, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the embedded captions (B, L, W), padded by the learned token, and the number of tokens of each prompt
    (B,), or None if it is L for all."""
    padding = -text.shape[1] % GROUP
    valid, counts = torch.arange(text.shape[1] + padding, device=text.device) < text.shape[1], None
    text = pad(text, (0, 0, 0, padding))
    if mask is not None:
        valid = pad(mask.bool(), (0, padding))
        counts = (valid.sum(1) + GROUP - 1) // GROUP * GROUP
        if not (torch.compiler.is_compiling() or mask.is_meta):  # these need shapes that do not depend on the prompts
            shortest, longest = torch.stack(counts.aminmax()).tolist()
            text, valid, counts = text[:, :longest], valid[:, :longest], None if shortest == longest else counts
    tokens = network.cap_embedder(text)
    return torch.where(valid[..., None], tokens, network.cap_pad_token.to(tokens)), counts


def position_ids(grid: tuple[int, int], padding: int, length: int, counts: Tensor | None, device: Any) -> Tensor:
    """Return the positions (time, row, column) of image tokens, their padding and `length` caption tokens, (B, S, 3),
    or (1, S, 3) if they are equal for all prompts. The picture's time is the one after its caption."""
    counts = torch.full((1,), length, device=device) if counts is None else counts
    size = grid[0] * grid[1]
    ids = torch.zeros(len(counts), size + padding + length, 3, dtype=torch.long, device=device)
    ids[:, :size, 0] = counts[:, None] + 1
    ids[:, :size, 1] = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
    ids[:, :size, 2] = torch.arange(grid[1], device=device).repeat(grid[0])
    ids[:, size + padding :, 0] = torch.arange(1, length + 1, device=device)
    return ids


def refine(network: Any, layers: Any, tokens: Tensor, *args: Any) -> Tensor:
    """Pass tokens through the refiner `layers`."""
    for layer in layers:
        if network.gradient_checkpointing and torch.is_grad_enabled():
            tokens = network._gradient_checkpointing_func(layer, tokens, *args)
        else:
            tokens = layer(tokens, *args)
    return tokens


class ZImage(TransformerFamily):
    """Z-Image and Z-Image-Turbo, which differ only in weights and schedule."""

    name = "Z-Image"
    network = "ZImageTransformer2DModel"
    pipelines = ("ZImagePipeline",)
    file_key = "cap_pad_token"
    lora_targets = r".*\.(to_q|to_k|to_v|to_out\.0|w1|w2|w3)"
    entry_name = "all_x_embedder"
    unused = ("all_final_layer",)
    time_layer = "t_embedder.mlp.2"  # type: ignore[assignment]

    def require_usable(self, parts: Any, name: str) -> None:
        require_channels(parts, name, self.latent_channels(parts.transformer.config))
        if parts.transformer.config.get("siglip_feat_dim"):
            raise UserError(f"{name}: its network also reads reference pictures (Omni): use Z-Image or Z-Image-Turbo, "
                            "and train the task as an adapter")  # fmt: skip

    def fingerprint(self, network: Any, vae: Any, scheduler: Any) -> str:
        c = network.config
        return f"{self.name}-{self.latent_channels(c)}ch-f{codec.downscale(vae)}-{self.width(c)}x{c['n_layers']}-flow"

    # ---- prompts and guidance

    def prompts(self, parts: Any) -> PromptEncoder:
        def run(prompts: list[str]) -> dict[str, Tensor]:
            device = device_of(parts.text_encoder)
            # A copy: the stock method writes the templated prompts into the list.
            rows, _ = self.build_pipeline(parts).encode_prompt(list(prompts), device, do_classifier_free_guidance=False)
            features = [pad(row, (0, 0, 0, LENGTH - len(row))) for row in rows]
            masks = [pad(row.new_ones(len(row), dtype=torch.bool), (0, LENGTH - len(row))) for row in rows]
            return {FEATURES: torch.stack(features), "mask": torch.stack(masks)}

        return PromptEncoder((parts.text_encoder,), run, [(parts.tokenizer, LENGTH - PREFIX)])

    def condition_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        return {FEATURES: (LENGTH, config["cap_feat_dim"])}

    def guide(self, with_: Tensor, without: Tensor, scale: float) -> Tensor:
        """Combine as in all families: scale 1 is no guidance. In ZImagePipeline 0 is none: its `guidance_scale` g in
        pos + g (pos - neg) is g + 1 here, its default of 5 is 6. Its options cfg_normalization and cfg_truncation, off
        by default, are not implemented."""
        return with_ + (scale - 1) * (with_ - without)

    # ---- the network

    def width(self, config: Any) -> int:
        return config["dim"]

    def time_width(self, config: Any) -> int:
        return min(config["dim"], 256)  # ADALN_EMBED_DIM in diffusers

    def latent_channels(self, config: Any) -> int:
        return config["in_channels"]

    def depth(self, config: Any, depth: int | None) -> int:
        return depth or -(-config["n_layers"] // 2)

    def embed(self, network: Any, z: Tensor) -> Tensor:
        return network.all_x_embedder[ENTRY](pack(z))

    def embedding_weights(self, network: Any) -> dict[str, Tensor]:
        linear = network.all_x_embedder[ENTRY]
        weight = linear.weight.detach().unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2)
        return {"weight": weight, "bias": linear.bias.detach()}

    def start(
        self, network: Any, tokens: Tensor, grid: tuple[int, int], timestep: Tensor, text: Tensor,
        added: dict[str, Tensor], extra: Tensor | None,
    ) -> Stream:  # fmt: skip
        time = network.t_embedder((1000 - timestep) / 1000 * network.t_scale).type_as(tokens)
        time = time if extra is None else time + extra.to(time)
        size, padding = tokens.shape[1], -tokens.shape[1] % GROUP
        front = size + padding
        caption, counts = captions(network, text, added.get("mask"))
        ids = position_ids(grid, padding, caption.shape[1], counts, tokens.device)
        rope = network.rope_embedder(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
        attended = None if counts is None else torch.arange(caption.shape[1], device=text.device) < counts[:, None]
        mask = None if attended is None else pad(attended, (front, 0), value=True)
        picture = torch.cat([tokens, network.x_pad_token.to(tokens).expand(len(tokens), padding, -1)], dim=1)
        picture = refine(network, network.noise_refiner, picture, None, rope[:, :front], time)
        caption = refine(network, network.context_refiner, caption, attended, rope[:, front:])
        # Adapters change the stream's image tokens, so padding is kept with the caption instead.
        rest = torch.cat([picture[:, size:], caption], dim=1)
        return Stream(picture[:, :size], rest, time, grid, {"rope": rope, "mask": mask})

    def blocks(self, network: Any) -> list[nn.Module]:
        return list(network.layers)

    def run(self, block: Any, image: Tensor, text: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor | None]:
        joint = block(torch.cat([image, text], dim=1), stream.rest["mask"], stream.rest["rope"], stream.time)  # type: ignore[arg-type]
        return joint[:, : image.shape[1]], joint[:, image.shape[1] :]

    def finish(self, network: Any, stream: Stream) -> Tensor:
        return -unpack(network.all_final_layer[ENTRY](stream.image, c=stream.time), stream.grid)

    # ---- adapters

    def shortened(self, config: Any, depth: int | None) -> Any:
        return stock(self.network).from_config({**config, "n_layers": self.depth(config, depth)})

    def time_features(self, network: Any, timesteps: Tensor) -> Tensor:
        embedder = network.t_embedder
        time = (1000 - timesteps.float()) / 1000 * network.t_scale
        return embedder.mlp[:2](embedder.timestep_embedding(time, embedder.frequency_embedding_size))

    def why_no_controlnet(self, controlnet: Any) -> str | None:
        return ("ZImageControlNetPipeline adds a ControlNet's samples to the caption's tokens too, which this one was "
                "trained without")  # fmt: skip

    def stock_call(self, network: Any, scale: float, embedded: float | None) -> dict[str, Any]:
        return {"guidance_scale": scale - 1}  # see `guide`

    def new_controlnet(self, network: Any, config: Any, channels: int, downscale: int) -> nn.Module:
        """Return diffusers' ControlNet with a control block for every fifth layer. diffusers shares the transformer's
        embedders and refiners with it; here it gets copies, so that the adapter is complete and the backbone never
        changes."""
        class_, places = stock("ZImageControlNetModel"), list(range(0, config["n_layers"], 5))
        options = {"control_in_dim": config["in_channels"] + channels - 3, **{name: config[name] for name in SHARED}}
        net = class_(control_layers_places=places, **options)
        net.gradient_checkpointing = False  # the class reads this attribute but does not set it
        net = class_.from_transformer(net, stock(self.network).from_config({**config, "n_layers": 0}))
        own, weights = net.state_dict(), {} if network is None else network.state_dict()
        for key, value in own.items():
            source = re.sub(r"(?<=^control_layers\.)\d+", lambda index: str(5 * int(index[0])), key)
            weight = weights.get(source.removeprefix("control_"), value)  # projections have no source and stay zero
            if weight.shape != value.shape:  # channels of maps, which start at zero
                weight = pad(weight.unflatten(1, (4, -1)), (0, channels - 3)).flatten(1)
            own[key] = weight
        net.load_state_dict(own)
        return net

    def control(
        self, config: Any, controlnet: Any, condition: Tensor, z: Tensor, timestep: Tensor, text: Tensor,
        added: dict[str, Tensor] | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        """Return its outputs for image tokens; the stock pipeline also adds those for caption tokens."""
        mask, device = (added or {}).get("mask"), z.device.type
        rows = list(text) if mask is None else [row[valid] for row, valid in zip(text, mask.bool(), strict=True)]
        time, hint = (1000 - self._time(timestep, z)) / 1000, condition.to(z.dtype)
        pads = {name: getattr(controlnet, name) for name in ("x_pad_token", "cap_pad_token")}
        if device != "meta" and torch.is_autocast_enabled(device):  # written into tokens of autocast's dtype
            pads = {name: token.to(torch.get_autocast_dtype(device)) for name, token in pads.items()}
        samples = functional_call(controlnet, pads, (list(z.unsqueeze(2)), time, rows, list(hint.unsqueeze(2))))
        count = z.shape[-2] * z.shape[-1] // 4
        return [samples[i][:, :count] if i in samples else None for i in range(config["n_layers"])]
