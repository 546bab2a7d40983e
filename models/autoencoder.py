"""The KL autoencoder of latent diffusion (Rombach et al. 2022): images of 256 x 256 <-> latents of 4 x 32 x 32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.config import Config
from common.errors import InputError
from models.diffusers_folder import pretrained
from models.weights import check_numbers, read_pth

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

# The architecture of f8-ft-mse and autoencoder_kl.pth, whose files do not include it.
ARCHITECTURE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}
DECODE_AT_ONCE = 8  # images; the decoder takes far more memory than the U-ViT


class Autoencoder(nn.Module):
    """diffusers' AutoencoderKL in float32, between pixels in [-1, 1] and scaled latents.

    scale_factor: factor that makes the standard deviation of latents about 1.
    """

    def __init__(self, network: AutoencoderKL, scale_factor: float):
        super().__init__()
        self.network = network.float().eval().requires_grad_(False)
        self.scale_factor = scale_factor

    @property
    def latent_channels(self) -> int:
        return self.network.config["latent_channels"]

    @property
    def downsampling(self) -> int:
        """Side of a latent cell in pixels."""
        return 2 ** (len(self.network.config["block_out_channels"]) - 1)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and standard deviation of the unscaled latents, (B, 4, h, w) each."""
        distribution = self.network.encode(images).latent_dist
        return distribution.mean, distribution.std

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> images (B, 3, H, W), nominally in [-1, 1]; a few at a time."""
        parts = (latents / self.scale_factor).split(DECODE_AT_ONCE)
        return torch.cat([self.network.decode(part).sample for part in parts])


def image_maker(config: Config, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from network samples (B, C, h, w) to images (B, 1 or 3, H, W): a decoder, or the identity for pixels.

    Raises InputError if an autoencoder is needed and missing, or does not fit the channels of the network.
    """
    channels, autoencoder = config.model_params.image_shape[0], config.autoencoder
    if autoencoder is None:
        if channels in (1, 3):
            return lambda x0: x0
        raise InputError(
            f"{channels} channels, neither grey (1) nor RGB (3): the network makes latents; give "
            "their autoencoder with --autoencoder_checkpoint_path"
        )
    if autoencoder.checkpoint_path is None:
        raise InputError("the network makes latents: give the autoencoder with --autoencoder_checkpoint_path")
    decoder = load_autoencoder(Path(autoencoder.checkpoint_path), autoencoder.scale_factor, device)
    if decoder.latent_channels != channels:
        raise InputError(
            f"{autoencoder.checkpoint_path} has {decoder.latent_channels} latent channels, the "
            f"network has {channels} channels: they do not fit"
        )
    return decoder.decode


def load_autoencoder(path: Path, scale_factor: float, device: torch.device | str = "cpu") -> Autoencoder:
    """path: the public autoencoder_kl.pth, or a diffusers folder. Raises InputError for other files."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    if not path.exists():
        raise InputError(f"{path}: no such autoencoder; get autoencoder_kl.pth, or give --autoencoder_checkpoint_path")
    if path.is_dir():
        network = pretrained(AutoencoderKL, path, "an autoencoder")
    else:
        network = AutoencoderKL(**ARCHITECTURE)
        _fill_from_ldm(network, path)
    check_numbers(network.state_dict(), path)
    return Autoencoder(network, scale_factor).to(device)


def _fill_from_ldm(network: AutoencoderKL, path: Path) -> None:
    """Load weights with the names of the latent diffusion code, which diffusers translates."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    content = read_pth(path)
    weights = content.get("state_dict", content)
    weights = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    try:
        translated = convert_ldm_vae_checkpoint(weights, dict(network.config))
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: has no KL autoencoder with the public names ({error!s:.80})") from None
    wanted = network.state_dict()
    wrong = sorted(wanted.keys() - translated.keys())
    wrong += [key for key in wanted if key in translated and translated[key].shape != wanted[key].shape]
    if wrong:
        names = f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
        raise InputError(f"{path}: {len(wrong)} weights of the autoencoder are missing or of another shape ({names})")
    network.load_state_dict(translated)
