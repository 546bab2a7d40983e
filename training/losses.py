"""What training minimises."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.early_exit import ExitOutputs


def early_exit_losses(exits: ExitOutputs, target: Tensor) -> dict[str, Tensor]:
    """The terms an early-exit network is trained with. AdaDiff (Tang et al. 2024, arXiv 2309.17074).

    target: (B, C, H, W), what the network should predict. Returns 0-d tensors:
    simple: mean squared error of the whole network;
    uncertainty: how far the probes are from the error of their heads, u = mean tanh |exit - target|;
    ual: the heads' squared errors, each image weighted by 1 - u so that hopeless ones pull less;
    unweighted: the heads' squared errors as they are.
    The last three are batch means summed over the layers. u is a label: no gradient flows through it.
    """
    difference = exits.exit_outputs - target  # (L, B, C, H, W)
    error = difference.square().mean(dim=(2, 3, 4))  # (L, B)
    label = difference.detach().abs().tanh().mean(dim=(2, 3, 4))  # (L, B)
    return {
        "simple": F.mse_loss(exits.output, target),
        "uncertainty": (exits.uncertainty - label).square().mean(dim=1).sum(),
        "ual": ((1 - label) * error).mean(dim=1).sum(),
        "unweighted": error.mean(dim=1).sum(),
    }


def total_early_exit_loss(losses: dict[str, Tensor], freeze_backbone: bool, use_unweighted_loss: bool) -> Tensor:
    """The sum that is minimised; `simple` has no gradient when the backbone is frozen."""
    terms = [losses["uncertainty"], losses["ual"]]
    terms += [] if freeze_backbone else [losses["simple"]]
    terms += [losses["unweighted"]] if use_unweighted_loss else []
    return torch.stack(terms).sum()
