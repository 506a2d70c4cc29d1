"""FLUX.1 (dev, schnell): latents packed 2 x 2 into tokens, CLIP's pooled and T5's features, timestep sigma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..hooks import device_of
from ..text import FEATURES, PromptEncoder
from .base import stock
from .transformer import Stream, TransformerFamily, require_channels, spread


def pack(z: Tensor) -> Tensor:
    """Pack latents (B, C, h, w) into tokens (B, h w / 4, 4 C): each has 2 x 2 cells, channels first."""
    return pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Invert `pack`; `grid`: rows and columns of tokens."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), 2)


def position_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return the positions (0, row, column) of image tokens, (N, 3)."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)
    return ids.flatten(0, 1)


class Flux(TransformerFamily):
    """FLUX.1 dev, whose network takes a guidance scale as an input, and schnell, whose network does not."""

    name = "FLUX.1"
    network = "FluxTransformer2DModel"
    pipelines = ("FluxPipeline",)
    text_parts = ("text_encoder", "text_encoder_2")
    file_key = "double_blocks.0.img_mod.lin.weight"  # FLUX.2 and Chroma have no modulation in blocks
    lora_targets = TransformerFamily.lora_targets + r"|.*single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
    embedded_guidance = 3.5  # for dev; schnell has no such input

    def require_usable(self, parts: Any, name: str) -> None:
        require_channels(parts, name, parts.transformer.config["in_channels"] // 4)

    # ---- export

    control_pipeline, stock_controlnet = "FluxControlPipeline", True
    control_argument = "control_image=2 * condition - 1"

    def control_lora(self, entry: Any) -> dict[str, Tensor]:
        """Return the update of a patch embedding with twice the channels, the second half for the condition."""
        weight = entry.conv.weight.detach().flatten(1)  # in the channel order of packed tokens
        down, up = torch.eye(weight.shape[1], dtype=weight.dtype), weight
        if weight.shape[0] < weight.shape[1]:
            down, up = weight, torch.eye(weight.shape[0], dtype=weight.dtype)
        down = torch.cat([torch.zeros_like(down), down], dim=1)
        return {"x_embedder.lora_A.weight": down, "x_embedder.lora_B.weight": up}

    def stock_call(self, network: Any, scale: float, embedded: float | None) -> dict[str, Any]:
        call = {"guidance_scale": self.embedded_guidance if embedded is None else embedded}
        return call if scale == 1 else {**call, "true_cfg_scale": scale, "negative_prompt": ""}

    # ---- prompts

    def prompts(self, parts: Any) -> PromptEncoder:
        def run(prompts: list[str]) -> dict[str, Tensor]:
            pipe = self.build_pipeline(parts)
            device = device_of(parts.text_encoder_2)
            features, pooled, _ = pipe.encode_prompt(prompts, None, device=device, max_sequence_length=limit)
            return {FEATURES: features, "pooled": pooled}

        # A small model of this architecture may be trained on fewer tokens than the 512 of FLUX.1.
        limit = min(512, getattr(parts.tokenizer_2, "model_max_length", 512))
        # Warn of T5's limit: CLIP gives only a pooled summary, so tokens that T5 cuts have no effect.
        return PromptEncoder((parts.text_encoder, parts.text_encoder_2), run, [(parts.tokenizer_2, limit)])

    def condition_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        return {FEATURES: (512, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}

    # ---- the network

    def to_stock(self, z: Tensor) -> Tensor:
        return pack(z)

    def from_stock(self, latents: Tensor, cells: tuple[int, int]) -> Tensor:
        return latents if latents.ndim != 3 else unpack(latents, (cells[0] // 2, cells[1] // 2))

    def width(self, config: Any) -> int:
        return config["num_attention_heads"] * config["attention_head_dim"]

    def latent_channels(self, config: Any) -> int:
        return config["in_channels"] // 4

    def embed(self, network: Any, z: Tensor) -> Tensor:
        return network.x_embedder(pack(z))

    def embedding_weights(self, network: Any) -> dict[str, Tensor]:
        linear = network.x_embedder
        return {"weight": linear.weight.detach().unflatten(1, (-1, 2, 2)), "bias": linear.bias.detach()}

    def start(
        self, network: Any, tokens: Tensor, grid: tuple[int, int], timestep: Tensor, text: Tensor,
        added: dict[str, Tensor], extra: Tensor | None,
    ) -> Stream:  # fmt: skip
        time = (timestep / 1000).to(tokens.dtype) * 1000
        inputs = (time,)
        if network.config["guidance_embeds"]:
            inputs = (time, self._guidance(added, time).to(tokens.dtype) * 1000)
        embedding = network.time_text_embed(*inputs, added["pooled"])
        embedding = embedding if extra is None else embedding + extra.to(embedding)
        text_ids = torch.zeros(text.shape[1], 3, device=tokens.device)
        rope = network.pos_embed(torch.cat([text_ids, position_ids(*grid, tokens.device)]))
        return Stream(tokens, network.context_embedder(text), embedding, grid, {"rope": rope})

    def _guidance(self, added: dict[str, Tensor], time: Tensor) -> Tensor:
        default = torch.full_like(time, self.embedded_guidance, dtype=torch.float32)
        return added.get("embedded_guidance", default).to(default)

    def blocks(self, network: Any) -> list[nn.Module]:
        return [*network.transformer_blocks, *network.single_transformer_blocks]

    def run(self, block: Any, image: Tensor, text: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor | None]:
        text, image = block(
            hidden_states=image, encoder_hidden_states=text, temb=stream.time, image_rotary_emb=stream.rest["rope"]
        )
        return image, text

    def finish(self, network: Any, stream: Stream) -> Tensor:
        return unpack(network.proj_out(network.norm_out(stream.image, stream.time)), stream.grid)

    # ---- adapters

    def shortened(self, config: Any, depth: int | None) -> Any:
        depth, double = self.depth(config, depth), config["num_layers"]
        layers = {"num_layers": min(depth, double), "num_single_layers": max(0, depth - double)}
        return stock(self.network).from_config({**config, **layers})

    def new_controlnet(self, network: Any, config: Any, channels: int, downscale: int) -> nn.Module:
        self.refuse_maps(channels)
        layers = {"num_layers": min(4, config["num_layers"]), "num_single_layers": min(10, config["num_single_layers"])}
        class_ = stock("FluxControlNetModel")
        if network is None:
            return class_.from_config({**config, **layers})
        heads = {name: config[name] for name in ("num_attention_heads", "attention_head_dim")}
        return class_.from_transformer(network, **layers, **heads)

    def control(
        self, config: Any, controlnet: Any, condition: Tensor, z: Tensor, timestep: Tensor, text: Tensor,
        added: dict[str, Tensor] | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        grid, time, added = (z.shape[-2] // 2, z.shape[-1] // 2), self._time(timestep, z), added or {}
        double, single = controlnet(
            pack(z), pack(condition.to(z.dtype)), encoder_hidden_states=text, pooled_projections=added["pooled"],
            timestep=time / 1000, img_ids=position_ids(*grid, z.device), return_dict=False,
            txt_ids=torch.zeros(text.shape[1], 3, device=z.device),
            guidance=self._guidance(added, time) if controlnet.config["guidance_embeds"] else None,
        )  # fmt: skip
        return [*spread(double, config["num_layers"]), *spread(single, config["num_single_layers"])]
