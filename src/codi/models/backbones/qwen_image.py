"""Qwen-Image: latents packed 2 x 2 into tokens, Qwen2.5-VL's features with a mask, norm-preserving guidance."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...errors import UserError
from .. import codec
from ..hooks import device_of
from ..text import FEATURES, PromptEncoder
from .base import stock
from .flux import pack, unpack
from .transformer import Stream, TransformerFamily, require_channels, spread

LENGTH = 512  # tokens of a prompt, the default of the stock pipeline's call


class QwenSpace(codec.LatentSpace):
    """The latent space of AutoencoderKLQwenImage, a video VAE used for one frame; normalized by the mean and standard
    deviation of each channel."""

    def downscale(self, vae: Any) -> int:
        return 2 ** len(vae.config["temperal_downsample"])

    def channels(self, vae: Any) -> int:
        return vae.config["z_dim"]

    def drop_encoder(self, vae: Any) -> None:
        vae.encoder = vae.quant_conv = nn.Identity()  # modules, since the class counts their convolutions to decode

    def moments(self, vae: Any, image: Tensor) -> Tensor:
        return super().moments(vae, image[:, :, None])[:, :, 0]

    def normalize(self, vae: Any, latent: Tensor) -> Tensor:
        mean, scale = self._statistics(vae, latent)
        return (latent - mean) * scale

    def denormalize(self, vae: Any, latent: Tensor) -> Tensor:
        mean, scale = self._statistics(vae, latent)
        return latent / scale + mean

    def decode(self, vae: Any, latent: Tensor) -> Tensor:
        return super().decode(vae, latent[:, :, None])[:, :, 0]

    @staticmethod
    def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
        return mean.to(like), 1.0 / std.to(like)


codec.SPACES["AutoencoderKLQwenImage"] = QwenSpace()


class QwenImage(TransformerFamily):
    """The text-to-image model. Edit and layered variants, whose input includes pictures, are refused."""

    name = "Qwen-Image"
    network = "QwenImageTransformer2DModel"
    pipelines = ("QwenImagePipeline",)
    file_key = "transformer_blocks.0.img_mod.1.weight"
    entry_name = "img_in"
    stock_controlnet, control_argument = True, "control_image=2 * condition - 1"

    def require_usable(self, parts: Any, name: str) -> None:
        config = parts.transformer.config
        for option in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "guidance_embeds"):
            if config.get(option):
                raise UserError(f"{name}: its network has {option}, as edit and layered variants do: use the "
                                "text-to-image model, and train the task as an adapter")  # fmt: skip
        require_channels(parts, name, self.latent_channels(config))

    # ---- prompts and guidance

    def prompts(self, parts: Any) -> PromptEncoder:
        def run(prompts: list[str]) -> dict[str, Tensor]:
            pipe, device = self.build_pipeline(parts), device_of(parts.text_encoder)
            features, mask = pipe.encode_prompt(prompts, device=device, max_sequence_length=LENGTH)
            mask = features.new_ones(features.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            padding = LENGTH - features.shape[1]  # so that bundles can be concatenated
            return {FEATURES: pad(features, (0, 0, 0, padding)), "mask": pad(mask, (0, padding))}

        return PromptEncoder((parts.text_encoder,), run, [(parts.tokenizer, LENGTH)])

    def condition_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        return {FEATURES: (LENGTH, config["joint_attention_dim"]), "mask": (LENGTH,)}

    def guide(self, with_: Tensor, without: Tensor, scale: float) -> Tensor:
        """Combine as in all families, then scale each token to its norm with the prompt."""
        grid = (with_.shape[-2] // 2, with_.shape[-1] // 2)
        combined, prompted = pack(super().guide(with_, without, scale)), pack(with_)
        return unpack(combined * (prompted.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)), grid)

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
        return network.img_in(pack(z))

    def embedding_weights(self, network: Any) -> dict[str, Tensor]:
        linear = network.img_in
        return {"weight": linear.weight.detach().unflatten(1, (-1, 2, 2)), "bias": linear.bias.detach()}

    def start(
        self, network: Any, tokens: Tensor, grid: tuple[int, int], timestep: Tensor, text: Tensor,
        added: dict[str, Tensor], extra: Tensor | None,
    ) -> Stream:  # fmt: skip
        text, mask = trim_padding(text, added.get("mask"))
        embedding = network.time_text_embed((timestep / 1000).to(tokens.dtype), tokens)
        embedding = embedding if extra is None else embedding + extra.to(embedding)
        rope = network.pos_embed([[(1, *grid)]], max_txt_seq_len=text.shape[1], device=tokens.device)
        text = network.txt_in(network.txt_norm(text))
        return Stream(tokens, text, embedding, grid, {"mask": mask, "rope": rope})

    def blocks(self, network: Any) -> list[nn.Module]:
        return list(network.transformer_blocks)

    def run(self, block: Any, image: Tensor, text: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor | None]:
        text, image = block(
            hidden_states=image, encoder_hidden_states=text, encoder_hidden_states_mask=stream.rest["mask"],
            temb=stream.time, image_rotary_emb=stream.rest["rope"],
        )  # fmt: skip
        return image, text

    def finish(self, network: Any, stream: Stream) -> Tensor:
        return unpack(network.proj_out(network.norm_out(stream.image, stream.time)), stream.grid)

    # ---- adapters

    def shortened(self, config: Any, depth: int | None) -> Any:
        return stock(self.network).from_config({**config, "num_layers": self.depth(config, depth)})

    def time_argument(self, network: Any, timesteps: Tensor) -> Tensor:
        return timesteps / 1000

    def why_no_controlnet(self, controlnet: Any) -> str | None:
        extra = controlnet.config["extra_condition_channels"]
        return "QwenImageControlNetPipeline reads no mask beside the picture" if extra else None

    def stock_call(self, network: Any, scale: float, embedded: float | None) -> dict[str, Any]:
        return {"true_cfg_scale": scale, **({} if scale == 1 else {"negative_prompt": ""})}

    def new_controlnet(self, network: Any, config: Any, channels: int, downscale: int) -> nn.Module:
        """Return a ControlNet that takes maps as further channels of the condition, as the stock one for inpainting. It
        is not built by `from_transformer`, which does not copy the norm of the text."""
        class_ = stock("QwenImageControlNetModel")
        options = {name: config[name] for name in inspect.signature(class_.__init__).parameters if name in config}
        options |= {"num_layers": min(5, config["num_layers"]), "extra_condition_channels": 4 * (channels - 3)}
        net = class_.from_config(options)
        if network is not None:
            weights = net.state_dict()
            net.load_state_dict({**weights, **{k: v for k, v in network.state_dict().items() if k in weights}})
        return net

    def control(
        self, config: Any, controlnet: Any, condition: Tensor, z: Tensor, timestep: Tensor, text: Tensor,
        added: dict[str, Tensor] | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        text, mask = trim_padding(text, (added or {}).get("mask"))
        samples = controlnet(
            pack(z), pack(condition.to(z.dtype)), encoder_hidden_states=text, encoder_hidden_states_mask=mask,
            timestep=(self._time(timestep, z) / 1000).to(z.dtype), return_dict=False,
            img_shapes=[[(1, z.shape[-2] // 2, z.shape[-1] // 2)]],
        )  # fmt: skip
        return spread(samples, config["num_layers"])


def trim_padding(text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the features (B, L, D) without positions that are padding in all prompts, and their mask, or None if it
    would mask nothing."""
    if mask is None:
        return text, None
    mask = mask.bool()
    if torch.compiler.is_compiling() or mask.is_meta:  # these need shapes that do not depend on the prompts
        return text, mask
    shortest, longest = torch.stack(mask.sum(1).aminmax()).tolist()
    return text[:, :longest], None if shortest == longest else mask[:, :longest]
