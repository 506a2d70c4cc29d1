"""Latent diffusion in the FLUX.1 layout: a transformer trained by flow matching, with CLIP's and T5's text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from ..models import text
from .latents import LatentsJob, draw, normal
from .pretrain_recipe import PretrainRecipe
from .unet import new_clip

_HEAD = 64  # channels of an attention head
_ROPE = (16, 24, 24)  # of them for the index of the image (always 0), row and column


class FluxJob(LatentsJob):
    """Flow matching (Lipman et al. 2023): z_t = (1 - t) x + t eps, and the loss is |eps - x - u_hat(z_t, t)|^2.

    Token ids are CLIP's, then T5's.
    """

    def __init__(
        self,
        parts: dict[str, nn.Module],
        tokenizer: CLIPTokenizer,
        tokenizer_2: T5Tokenizer,
        vae: AutoencoderKL,
        recipe: PretrainRecipe,
        *data: Any,
    ) -> None:
        """`parts`: those of `new_flux`. `data`: the other arguments of `LatentsJob`."""
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        super().__init__(parts, vae, recipe, *data)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        ids = [text.tokenize(tokenizer, captions) for tokenizer in (self.tokenizer, self.tokenizer_2)]  # type: ignore[arg-type]
        return torch.cat(ids, dim=1)

    def loss(self, model: Any, x: Tensor, tokens: Tensor, share: Tensor, generator: torch.Generator) -> Tensor:
        x = x.to(next(model.parameters()).device)
        t = flow_times(share, self.recipe.times).to(x)
        eps = normal(x.shape, x.device, generator)
        level = t[:, None, None, None]
        velocity = flow(model, (1 - level) * x + level * eps, t, tokens, self.tokenizer.model_max_length)
        return (velocity.float() - (eps - x)).square().mean()

    def draw(self, prompts: Sequence[str]) -> Tensor:
        options = {"height": self.recipe.size, "width": self.recipe.size, "negative_prompt": ""}
        length = self.tokenizer_2.model_max_length
        pipe = self.pipeline(self.average, self.vae)
        return draw(pipe, prompts, true_cfg_scale=3.0, max_sequence_length=length, **options)

    def pipeline(self, parts: Any, vae: AutoencoderKL) -> Any:
        return FluxPipeline(
            scheduler=self.scheduler, vae=vae, tokenizer=self.tokenizer, tokenizer_2=self.tokenizer_2,
            text_encoder=parts["text_encoder"], text_encoder_2=parts["text_encoder_2"],
            transformer=parts["transformer"],
        )  # type: ignore[arg-type]  # fmt: skip


def flow(parts: Any, z: Tensor, t: Tensor, tokens: Tensor, clip_length: int) -> Tensor:
    """Return the velocity (B, C, h, w) that `parts` predict of noisy latents `z` at times `t` (B,) in [0, 1].

    `tokens` (B, L): CLIP's `clip_length` ids, then T5's.
    """
    tokens = tokens.to(z.device)
    pooled = parts["text_encoder"](tokens[:, :clip_length]).pooler_output
    features = parts["text_encoder_2"](tokens[:, clip_length:])[0]
    rows, columns = z.shape[-2] // 2, z.shape[-1] // 2
    positions = torch.cartesian_prod(*(torch.arange(n, device=z.device) for n in (1, rows, columns))).to(z)
    output = parts["transformer"](
        hidden_states=pixel_unshuffle(z, 2).flatten(2).transpose(1, 2),
        timestep=t,
        encoder_hidden_states=features,
        pooled_projections=pooled,
        txt_ids=torch.zeros(features.shape[1], 3, device=z.device),
        img_ids=positions,
        return_dict=False,
    )[0]
    return pixel_shuffle(output.transpose(1, 2).unflatten(2, (rows, columns)), 2)


def flow_times(share: Tensor, kind: str) -> Tensor:
    """Return the times in (0, 1) at the quantiles `share` (B,) of a distribution: "uniform", or "logit-normal", the
    sigmoid of a standard normal (Esser et al. 2024)."""
    if kind == "uniform":
        return share
    return torch.special.ndtri(share.double().clamp(1e-6, 1 - 1e-6)).sigmoid().to(share)


def new_flux(recipe: PretrainRecipe, tokenizer: CLIPTokenizer, tokenizer_2: T5Tokenizer) -> dict[str, nn.Module]:
    """Return untrained networks of the recipe's size by their names in FluxPipeline: transformer, text_encoder (CLIP,
    for the pooled feature) and text_encoder_2 (T5)."""
    double, single = recipe.flux_layers
    ids: Any = tokenizer_2
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * recipe.latent_channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=_HEAD,
        num_attention_heads=recipe.flux_width // _HEAD,
        joint_attention_dim=2 * recipe.text_width,
        pooled_projection_dim=recipe.text_width,
        guidance_embeds=False,
        axes_dims_rope=_ROPE,
    )
    # As in DiT (Peebles & Xie 2023) but not in diffusers, each block starts as the identity and the output as zero.
    norms = (AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous)
    for linear in [m.linear for m in transformer.modules() if isinstance(m, norms)] + [transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=2 * recipe.text_width,
            d_kv=32,
            d_ff=4 * recipe.text_width,
            num_layers=recipe.text_layers,
            num_heads=recipe.text_width // 16,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=ids.pad_token_id,
            eos_token_id=ids.eos_token_id,
        )
    )
    return {"transformer": transformer, "text_encoder": new_clip(recipe, tokenizer), "text_encoder_2": encoder}
