"""Latent diffusion in the Stable Diffusion layout: a U-Net with v-prediction and a CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..models import text
from ..schedule import DiscreteSchedule
from .latents import LatentsJob, draw, normal
from .pretrain_recipe import PretrainRecipe


class UNetJob(LatentsJob):
    """Training of a U-Net on the squared error of the velocity, |v - v_hat|^2 in the paper's notation, t ~ U{1..T}."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
        vae: AutoencoderKL,
        recipe: PretrainRecipe,
        *data: Any,
    ) -> None:
        """`data`: the other arguments of `LatentsJob`."""
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # a quarter faster on all devices
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.schedule = DiscreteSchedule.from_config(scheduler.config)
        super().__init__({"unet": unet, "text_encoder": text_encoder}, vae, recipe, *data)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        return text.tokenize(self.tokenizer, captions)

    def loss(self, model: Any, x: Tensor, tokens: Tensor, share: Tensor, generator: torch.Generator) -> Tensor:
        horizon = int(self.schedule.horizon)
        t = 1 + (share * horizon).long().clamp_max(horizon - 1)
        x = x.to(next(model.parameters()).device)
        eps = normal(x.shape, x.device, generator)
        features = text.embed(model["text_encoder"], tokens)
        output = model["unet"](self.schedule.mix(x, eps, t), self.schedule.timestep(t).to(x.device), features).sample
        return (output.float() - self.schedule.output(x, eps, t)).square().mean()

    def draw(self, prompts: Sequence[str]) -> Tensor:
        return draw(self.pipeline(self.average, self.vae), prompts, guidance_scale=3.0)

    def pipeline(self, parts: Any, vae: AutoencoderKL) -> Any:
        build: Any = StableDiffusionPipeline  # its annotations forbid what its documentation allows
        return build(
            vae=vae, text_encoder=parts["text_encoder"], tokenizer=self.tokenizer, unet=parts["unet"],
            scheduler=self.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


def new_clip(recipe: PretrainRecipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained text encoder of the recipe's width and depth."""
    ids: Any = tokenizer
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=recipe.text_width // 32,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=ids.bos_token_id,
            eos_token_id=ids.eos_token_id,
            pad_token_id=ids.pad_token_id,
        )
    )


def new_ldm(recipe: PretrainRecipe, tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Return an untrained U-Net and text encoder of the recipe's size."""
    encoder = new_clip(recipe, tokenizer)
    attends = [False] + [True] * (len(recipe.unet_widths) - 1)  # attention is expensive at the finest level
    # diffusers reads "attention_head_dim" of this class as the number of heads; here a head has 32 channels.
    heads: Any = tuple(max(1, width // 32) for width in recipe.unet_widths)
    unet = UNet2DConditionModel(
        sample_size=recipe.size // 2 ** (len(recipe.vae_widths) - 1),
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        block_out_channels=tuple(recipe.unet_widths),
        layers_per_block=recipe.unet_layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        cross_attention_dim=recipe.text_width,
        attention_head_dim=heads,
        norm_num_groups=16,
    )
    return unet, encoder


def new_scheduler() -> DDIMScheduler:
    """Return a scheduler of velocity prediction with zero terminal signal-to-noise ratio: sampling starts at the last
    noise level of training."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
