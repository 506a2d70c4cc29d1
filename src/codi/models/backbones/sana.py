"""SANA 1.0 and 1.5: linear attention over the latents of an autoencoder with 32 pixels per cell, Gemma as text encoder.

Gemma reads a prompt after a long instruction to enhance it; of the instruction's features only the first is kept. A
negative or empty prompt is encoded without the instruction, as in the stock pipeline.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from ...errors import UserError
from .. import codec
from ..hooks import device_of
from ..text import FEATURES, PromptEncoder
from .base import stock
from .transformer import Stream, TransformerFamily, require_channels

TOKENS = 300  # prompt length, including the first token of the instruction


class DCSpace(codec.LatentSpace):
    """The latent space of AutoencoderDC, whose encoder is deterministic."""

    def downscale(self, vae: Any) -> int:
        return 2 ** (len(vae.config["encoder_block_out_channels"]) - 1)

    def moments(self, vae: Any, image: Tensor) -> Tensor:
        latent = vae.encode(image).latent
        return torch.cat([latent, torch.full_like(latent, -30.0)], dim=1)


codec.SPACES["AutoencoderDC"] = DCSpace()


class Sana(TransformerFamily):
    """The conventions of SANA."""

    name = "SANA"
    network = "SanaTransformer2DModel"
    pipelines = ("SanaPipeline", "SanaPAGPipeline")
    file_key = "blocks.0.mlp.inverted_conv.conv.weight"
    # Without the depthwise convolution of the feed-forward layers, which already has rank 1.
    lora_targets = r".*\.(to_q|to_k|to_v|to_out\.0|conv_inverted|conv_point)"
    time_embedder = "time_embed.emb"
    passes_sigmas, stock_controlnet, draws_condition = False, True, False
    entry_name = "entry"  # an additional module: the network's patch embedding is kept for its positions, if any
    unused = ("norm_out", "proj_out", "scale_shift_table")

    # ---- loading

    def require_pipeline(self, pipeline: str, source: str) -> None:
        if pipeline == "SanaSprintPipeline":
            raise UserError(self._sprint_message(source))
        super().require_pipeline(pipeline, source)

    def open_file(self, path: Path, keys: set[str], dtype: torch.dtype, fetching: dict[str, Any]) -> Any:
        if any(key.endswith("attn.q_norm.weight") for key in keys):
            raise UserError(f"{path}: diffusers cannot read SANA 1.5 in its authors' layout: use a diffusers folder")
        return super().open_file(path, keys, dtype, fetching)

    def require_usable(self, parts: Any, name: str) -> None:
        if parts.transformer.config["guidance_embeds"]:
            raise UserError(self._sprint_message(name))
        require_channels(parts, name, self.latent_channels(parts.transformer.config))

    @staticmethod
    def _sprint_message(source: str) -> str:
        return (f"{source}: SANA-Sprint predicts along another path (TrigFlow) than flow matching, and is distilled to "
                "1 to 4 steps already: use SANA 1.0 or 1.5")  # fmt: skip

    def solver(self, scheduler: Any) -> Any:
        return scheduler if "flow_shift" in scheduler.config else None

    def fingerprint(self, network: Any, vae: Any, scheduler: Any) -> str:
        # 1.0 and 1.5 with 1.6 billion weights have equal width and depth but different weights and layers.
        return super().fingerprint(network, vae, scheduler) + ("-qknorm" if network.config["qk_norm"] else "")

    # ---- prompts

    def prompts(self, parts: Any) -> PromptEncoder:
        def run(prompts: list[str], negative: bool = False) -> dict[str, Tensor]:
            pipe = self.build_pipeline(parts)
            instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
            options = {"device": device_of(parts.text_encoder), "max_sequence_length": TOKENS}
            rows = []
            for prompt in prompts:  # one at a time, so that features do not depend on the batch, bit for bit
                prefix = None if negative or not prompt.strip() else instruction
                rows.append(pipe.encode_prompt([prompt], False, complex_human_instruction=prefix, **options)[:2])
            features, masks = (torch.cat(part) for part in zip(*rows, strict=True))
            return {FEATURES: features, "mask": masks}

        limits = [(parts.tokenizer, TOKENS - 1)]
        return PromptEncoder((parts.text_encoder,), run, limits, functools.partial(run, negative=True))

    def condition_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        return {FEATURES: (TOKENS, config["caption_channels"]), "mask": (TOKENS,)}

    # ---- the network

    def patch(self, config: Any) -> int:
        return config["patch_size"]

    def width(self, config: Any) -> int:
        return config["num_attention_heads"] * config["attention_head_dim"]

    def latent_channels(self, config: Any) -> int:
        return config["in_channels"]

    def embed(self, network: Any, z: Tensor) -> Tensor:
        return network.patch_embed.proj(z).flatten(2).transpose(1, 2)

    def embedding_weights(self, network: Any) -> dict[str, Tensor]:
        conv = network.patch_embed.proj
        return {"weight": conv.weight.detach(), "bias": conv.bias.detach()}

    def start(
        self, network: Any, tokens: Tensor, grid: tuple[int, int], timestep: Tensor, text: Tensor,
        added: dict[str, Tensor], extra: Tensor | None,
    ) -> Stream:  # fmt: skip
        tokens, time, mask = add_positions(network.patch_embed, tokens, grid), network.time_embed, added.get("mask")
        if mask is not None:
            mask = ((1 - mask.to(tokens.dtype)) * -10000.0).unsqueeze(1)
        embedding = time.emb(
            timestep * network.config["timestep_scale"], resolution=None, aspect_ratio=None, batch_size=len(tokens),
            hidden_dtype=tokens.dtype,
        )  # fmt: skip
        embedding = embedding if extra is None else embedding + extra.to(embedding)
        text = network.caption_norm(network.caption_projection(text.to(tokens.dtype)))
        rest = {"modulation": time.linear(time.silu(embedding)), "mask": mask}
        return Stream(tokens, text, embedding, grid, rest)

    def blocks(self, network: Any) -> list[nn.Module]:
        return list(network.transformer_blocks)

    def run(self, block: Any, image: Tensor, text: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor | None]:
        return block(image, None, text, stream.rest["mask"], stream.rest["modulation"], *stream.grid), text

    def finish(self, network: Any, stream: Stream) -> Tensor:
        patch = network.config["patch_size"]
        tokens = network.proj_out(network.norm_out(stream.image, stream.time, network.scale_shift_table))
        cells = tokens.unflatten(1, stream.grid).unflatten(3, (patch, patch, -1)).permute(0, 5, 1, 3, 2, 4)
        return cells.flatten(4, 5).flatten(2, 3)[:, : network.config["in_channels"]]  # the rest is a learned variance

    # ---- adapters

    def shortened(self, config: Any, depth: int | None) -> Any:
        return stock(self.network).from_config({**config, "num_layers": self.depth(config, depth)})

    def encoder(self, config: Any, channels: int, reads: str, downscale: int, depth: int | None) -> nn.Module:
        encoder: Any = super().encoder(config, channels, reads, downscale, depth)
        del encoder.patch_embed.proj
        return encoder

    def time_argument(self, network: Any, timesteps: Tensor) -> Tensor:
        return timesteps * network.config["timestep_scale"]

    def stock_call(self, network: Any, scale: float, embedded: float | None) -> dict[str, Any]:
        return {"guidance_scale": scale, "use_resolution_binning": False}

    def new_controlnet(self, network: Any, config: Any, channels: int, downscale: int) -> nn.Module:
        self.refuse_maps(channels)
        if config["qk_norm"]:
            raise UserError("adapter controlnet: diffusers has no ControlNet for SANA 1.5, whose queries and keys are "
                            "normalized: use adapter fused, hint or lora")  # fmt: skip
        class_ = stock("SanaControlNetModel")
        shared = {name: config[name] for name in inspect.signature(class_.__init__).parameters if name in config}
        controlnet = class_.from_config({**shared, "num_layers": max(1, min(7, config["num_layers"] - 1))})
        if network is not None:
            own = controlnet.state_dict()
            controlnet.load_state_dict({**own, **{k: v for k, v in network.state_dict().items() if k in own}})
        return controlnet

    def control(
        self, config: Any, controlnet: Any, condition: Tensor, z: Tensor, timestep: Tensor, text: Tensor,
        added: dict[str, Tensor] | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        time, mask, count = self._time(timestep, z), (added or {}).get("mask"), config["num_layers"]
        inputs = (z, text.to(z.dtype), time * config["timestep_scale"], condition)
        samples = controlnet(*inputs, encoder_attention_mask=mask, return_dict=False)[0]
        return [None, *samples, *[None] * count][:count]  # the stock transformer adds none after the first block


def add_positions(embedding: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Add the position embeddings of a diffusers PatchEmbed, if it has any; compute them for a size other than its
    own."""
    positions = embedding.pos_embed
    if positions is None:
        return tokens
    if grid != (embedding.height, embedding.width):
        positions = get_2d_sincos_pos_embed(
            embed_dim=positions.shape[-1], grid_size=grid, base_size=embedding.base_size,
            interpolation_scale=embedding.interpolation_scale, device=tokens.device, output_type="pt",
        )  # fmt: skip
        positions = positions.float().unsqueeze(0)
    return (tokens + positions).to(tokens.dtype)
