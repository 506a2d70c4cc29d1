"""FLUX.2 (klein, dev): tokens are normalized 2 x 2 patches of the VAE's latent; Qwen3 or Mistral as text encoder.

In codi the latent is (B, 128, H / 16, W / 16): the latent space includes patches and batch norm, so a token is one
cell. klein is distilled to a few steps or, as "base", takes classifier-free guidance; dev takes a guidance scale as an
input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ...errors import UserError
from .. import codec
from ..hooks import device_of
from ..text import FEATURES, PromptEncoder
from .base import named_parts, opener, stock
from .transformer import Stream, TransformerFamily, require_channels

TEXT_TOKENS = 512
TEMPLATE_TOKENS = 3  # of Qwen3's chat template before the prompt: <|im_start|>, user, line feed


class Flux2Space(codec.LatentSpace):
    """The latent space of AutoencoderKLFlux2: 2 x 2 cells become one with four times the channels, normalized by the
    statistics of a batch norm."""

    def downscale(self, vae: Any) -> int:
        return 2 * super().downscale(vae)

    def channels(self, vae: Any) -> int:
        return 4 * super().channels(vae)

    def moments(self, vae: Any, image: Tensor) -> Tensor:
        parts = super().moments(vae, image).chunk(2, dim=1)  # unshuffle both parts so that means stay the first half
        return torch.cat([pixel_unshuffle(part, 2) for part in parts], dim=1)

    def normalize(self, vae: Any, latent: Tensor) -> Tensor:
        mean, std = self._statistics(vae, latent)
        return (latent - mean) / std

    def denormalize(self, vae: Any, latent: Tensor) -> Tensor:
        mean, std = self._statistics(vae, latent)
        return latent * std + mean

    def decode(self, vae: Any, latent: Tensor) -> Tensor:
        return super().decode(vae, pixel_shuffle(latent, 2))

    @staticmethod
    def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = (part.view(1, -1, 1, 1) for part in (vae.bn.running_mean, vae.bn.running_var))
        return mean.to(like), torch.sqrt(variance + vae.config["batch_norm_eps"]).to(like)


codec.SPACES["AutoencoderKLFlux2"] = Flux2Space()


class Flux2(TransformerFamily):
    """klein, whose stock pipeline uses Qwen3, and dev, with Mistral. diffusers has no ControlNet for them."""

    name = "FLUX.2"
    network = "Flux2Transformer2DModel"
    pipelines = ("Flux2KleinPipeline", "Flux2Pipeline")
    file_key = "single_stream_modulation.lin.weight"
    lora_targets = (
        r".*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|linear_in|linear_out)"
        r"|.*single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )
    embedded_guidance: float = 4.0  # for dev
    time_embedder = "time_guidance_embed"
    dynamic_by_config = False

    # ---- loading

    def open_folder(self, source: str, index: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
        pipeline_class = opener(self.pipelines["Mistral" in str(index.get("text_encoder"))])
        return pipeline_class.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)

    def pipeline_for(self, parts: Any) -> Any:
        return stock(self.pipelines[is_dev(parts)])

    def patch(self, config: Any) -> int:
        return 1

    def require_usable(self, parts: Any, name: str) -> None:
        require_channels(parts, name, parts.transformer.config["in_channels"])

    # ---- prompts and schedule

    def prompts(self, parts: Any) -> PromptEncoder:
        def run(prompts: list[str]) -> dict[str, Tensor]:
            pipe = self.build_pipeline(parts)
            features, _ = pipe.encode_prompt(
                prompts, device=device_of(parts.text_encoder), max_sequence_length=TEXT_TOKENS
            )
            return {FEATURES: features}

        # dev's limit is unknown: its system message takes some of the tokens.
        limits = [] if is_dev(parts) else [(parts.tokenizer, TEXT_TOKENS - TEMPLATE_TOKENS)]
        return PromptEncoder((parts.text_encoder,), run, limits)

    def condition_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        return {FEATURES: (TEXT_TOKENS, config["joint_attention_dim"])}

    def usual_steps(self, parts: Any) -> int:
        """Return 4 for distilled checkpoints, 50 for others: the schedule's shift depends on the number of steps."""
        return 4 if named_parts(parts).get("is_distilled") else 50

    def shift_exponent(self, config: Any, cells: tuple[int, int], steps: int | None) -> float:
        stock(self.pipelines[0])  # imports the module without warnings
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(cells[0] * cells[1], steps or 50)

    def require_guidance(self, parts: Any, scale: float) -> None:
        if named_parts(parts).get("is_distilled"):
            raise UserError(f"guidance_scale {scale:g}: this {self.name} is distilled to work without classifier-free "
                            "guidance: leave it out, or use a base model")  # fmt: skip

    def stock_call(self, network: Any, scale: float, embedded: float | None) -> dict[str, Any]:
        if not network.config["guidance_embeds"]:
            return {"guidance_scale": scale}
        return {"guidance_scale": self.embedded_guidance if embedded is None else embedded}

    # ---- the network

    def width(self, config: Any) -> int:
        return config["num_attention_heads"] * config["attention_head_dim"]

    def latent_channels(self, config: Any) -> int:
        return config["in_channels"]

    def embed(self, network: Any, z: Tensor) -> Tensor:
        return network.x_embedder(z.flatten(2).transpose(1, 2))

    def embedding_weights(self, network: Any) -> dict[str, Tensor]:
        weight = network.x_embedder.weight.detach()[..., None, None]
        return {"weight": weight, "bias": weight.new_zeros(len(weight))}  # the layer has no bias

    def start(
        self, network: Any, tokens: Tensor, grid: tuple[int, int], timestep: Tensor, text: Tensor,
        added: dict[str, Tensor], extra: Tensor | None,
    ) -> Stream:  # fmt: skip
        time = (timestep / 1000).to(tokens.dtype) * 1000
        guidance = None
        if network.config["guidance_embeds"]:
            guidance = added.get("embedded_guidance", torch.full_like(timestep, self.embedded_guidance))
            guidance = guidance.to(timestep).to(tokens.dtype) * 1000
        embedding = network.time_guidance_embed(time, guidance)
        embedding = embedding if extra is None else embedding + extra.to(embedding)
        # Blocks of one kind share their modulation.
        rest = {
            "image": network.double_stream_modulation_img(embedding),
            "text": network.double_stream_modulation_txt(embedding),
            "single": network.single_stream_modulation(embedding),
            "rope": network.pos_embed(position_ids(text.shape[1], *grid, tokens.device)),
        }
        return Stream(tokens, network.context_embedder(text), embedding, grid, rest)

    def blocks(self, network: Any) -> list[nn.Module]:
        return [*network.transformer_blocks, *network.single_transformer_blocks]

    def run(self, block: Any, image: Tensor, text: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor | None]:
        rest = stream.rest
        if hasattr(block, "ff_context"):
            text, image = block(
                image, text, temb_mod_img=rest["image"], temb_mod_txt=rest["text"], image_rotary_emb=rest["rope"]
            )
        else:
            text, image = block(
                image, text, temb_mod=rest["single"], image_rotary_emb=rest["rope"], split_hidden_states=True
            )
        return image, text

    def finish(self, network: Any, stream: Stream) -> Tensor:
        tokens = network.proj_out(network.norm_out(stream.image, stream.time))
        return tokens.transpose(1, 2).unflatten(2, stream.grid)

    def shortened(self, config: Any, depth: int | None) -> Any:
        depth, double = self.depth(config, depth), config["num_layers"]
        layers = {"num_layers": min(depth, double), "num_single_layers": max(0, depth - double)}
        return stock(self.network).from_config({**config, **layers})


def is_dev(parts: Any) -> bool:
    """Return True for the components of dev. Only its network takes a guidance scale, and the text encoder may be
    None."""
    return bool(parts.transformer.config["guidance_embeds"])


def position_ids(words: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return the positions (time, row, column, word) of text and image tokens, (L + N, 4). Text tokens have only the
    word set, image tokens only row and column."""
    ids = torch.zeros(words + rows * columns, 4, device=device)
    ids[:words, 3] += torch.arange(words, device=device)
    ids[words:, 1] += torch.arange(rows, device=device).repeat_interleave(columns)
    ids[words:, 2] += torch.arange(columns, device=device).repeat(rows)
    return ids
