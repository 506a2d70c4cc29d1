"""Stable Diffusion 3 and 3.5: positions in the patch embedding, two CLIP encoders and T5, timestep 1000 s.

The last block reads the text tokens but does not update them, so its weights have other shapes than those of the other
blocks. Hence a network of the first k blocks is built as one of k + 1 whose last block is removed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..hooks import device_of
from ..text import FEATURES, PromptEncoder
from .base import stock
from .transformer import Stream, TransformerFamily, require_channels

CLIP_TOKENS, T5_TOKENS = 77, 256  # prompt lengths in the stock pipeline


class StableDiffusion3(TransformerFamily):
    """The conventions of Stable Diffusion 3 and 3.5."""

    name = "Stable Diffusion 3"
    network = "SD3Transformer2DModel"
    pipelines = ("StableDiffusion3Pipeline",)
    text_parts = ("text_encoder", "text_encoder_2")  # the third is optional: the stock pipeline uses zeros instead
    file_key = "joint_blocks.0.context_block.adaLN_modulation.1.bias"
    entry_name = "entry"  # an additional module: the network's patch embedding is kept for its positions
    passes_sigmas, stock_controlnet = False, True

    def open_folder(self, source: str, index: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
        # diffusers opens a folder without the third text encoder only where it is passed as None.
        third = ("text_encoder_3", "tokenizer_3")
        absent = {name: None for name in third if not (index.get(name) or [None])[0]}
        return super().open_folder(source, index, dtype, {**absent, **options})

    def require_usable(self, parts: Any, name: str) -> None:
        require_channels(parts, name, self.latent_channels(parts.transformer.config))

    def fingerprint(self, network: Any, vae: Any, scheduler: Any) -> str:
        # 3 and 3.5 medium have equal width and depth but different weights and layers.
        dual = len(network.config["dual_attention_layers"] or ())
        kind = f"{'-qknorm' if network.config['qk_norm'] else ''}{f'-dual{dual}' if dual else ''}"
        return super().fingerprint(network, vae, scheduler) + kind

    # ---- prompts

    def prompts(self, parts: Any) -> PromptEncoder:
        def run(prompts: list[str]) -> dict[str, Tensor]:
            pipe, device = self.build_pipeline(parts), device_of(parts.text_encoder)
            features, _, pooled, _ = pipe.encode_prompt(
                prompts, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
            )
            return {FEATURES: features, "pooled": pooled}

        encoders = (parts.text_encoder, parts.text_encoder_2, parts.text_encoder_3)
        limit = (parts.tokenizer_3, T5_TOKENS)  # T5, if there is one, reads more tokens than CLIP
        if parts.text_encoder_3 is None:
            limit = (parts.tokenizer, getattr(parts.tokenizer, "model_max_length", CLIP_TOKENS))
        return PromptEncoder(encoders, run, [limit])

    def condition_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        tokens = CLIP_TOKENS + T5_TOKENS  # without T5, zeros in its place
        return {FEATURES: (tokens, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}

    # ---- the network

    def patch(self, config: Any) -> int:
        return config["patch_size"]

    def width(self, config: Any) -> int:
        return config["num_attention_heads"] * config["attention_head_dim"]

    def latent_channels(self, config: Any) -> int:
        return config["in_channels"]

    def embed(self, network: Any, z: Tensor) -> Tensor:
        return network.pos_embed.proj(z).flatten(2).transpose(1, 2)

    def embedding_weights(self, network: Any) -> dict[str, Tensor]:
        conv = network.pos_embed.proj
        return {"weight": conv.weight.detach(), "bias": conv.bias.detach()}

    def start(
        self, network: Any, tokens: Tensor, grid: tuple[int, int], timestep: Tensor, text: Tensor,
        added: dict[str, Tensor], extra: Tensor | None,
    ) -> Stream:  # fmt: skip
        patch, max_side = network.config["patch_size"], network.config["pos_embed_max_size"]
        if max(grid) > max_side:
            raise UserError(f"size of {grid[1]} x {grid[0]} tokens: this {self.name} has positions for {max_side} a "
                            "side: make the picture smaller, or upscale in tiles")  # fmt: skip
        positions = network.pos_embed.cropped_pos_embed(grid[0] * patch, grid[1] * patch)
        tokens = (tokens + positions).to(tokens.dtype).contiguous()
        embedding = network.time_text_embed(timestep, added["pooled"])
        embedding = embedding if extra is None else embedding + extra.to(embedding)
        return Stream(tokens, network.context_embedder(text), embedding, grid)

    def blocks(self, network: Any) -> list[nn.Module]:
        return list(network.transformer_blocks)

    def run(self, block: Any, image: Tensor, text: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor | None]:
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=stream.time)
        return image, text

    def finish(self, network: Any, stream: Stream) -> Tensor:
        patch = network.config["patch_size"]
        tokens = network.proj_out(network.norm_out(stream.image, stream.time))
        cells = tokens.unflatten(1, stream.grid).unflatten(3, (patch, patch, -1))
        return torch.einsum("nhwpqc->nchpwq", cells).flatten(4, 5).flatten(2, 3)

    # ---- adapters

    def shortened(self, config: Any, depth: int | None) -> Any:
        depth, total = self.depth(config, depth), config["num_layers"]
        network = stock(self.network).from_config({**config, "num_layers": min(depth + 1, total)})
        del network.transformer_blocks[depth:]
        return network

    def encoder(self, config: Any, channels: int, reads: str, downscale: int, depth: int | None) -> nn.Module:
        encoder: Any = super().encoder(config, channels, reads, downscale, depth)
        del encoder.pos_embed.proj
        return encoder

    def why_no_controlnet(self, controlnet: Any) -> str | None:
        extra = controlnet.config["extra_conditioning_channels"]
        return "StableDiffusion3ControlNetPipeline reads no mask beside the picture" if extra else None

    def new_controlnet(self, network: Any, config: Any, channels: int, downscale: int) -> nn.Module:
        changes = {
            # The stock transformer ignores some blocks of a ControlNet with more than half of its own number.
            "num_layers": max(1, min(12, config["num_layers"] // 2)),
            "extra_conditioning_channels": channels - 3,
            # Makes the stock pipeline pass the pooled features, and the condition's latent with the VAE's shift.
            "force_zeros_for_pooled_projection": False,
        }
        controlnet = stock("SD3ControlNetModel").from_config({**config, **changes})
        if network is not None:  # `from_transformer` would change the configuration of `network`
            own = controlnet.state_dict()
            copied = {k: v for k, v in network.state_dict().items() if k in own and v.shape == own[k].shape}
            controlnet.load_state_dict({**own, **copied})
        return controlnet

    def control(
        self, config: Any, controlnet: Any, condition: Tensor, z: Tensor, timestep: Tensor, text: Tensor,
        added: dict[str, Tensor] | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        samples = controlnet(
            z, condition.to(z.dtype), encoder_hidden_states=text, pooled_projections=(added or {})["pooled"],
            timestep=self._time(timestep, z), return_dict=False,
        )[0]  # fmt: skip
        count = config["num_layers"]
        interval = count / len(samples)
        return [*(samples[int(index / interval)] for index in range(count - 1)), None]
