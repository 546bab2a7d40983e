"""The losses of training, and the objectives made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.early_exit import ExitOutputs

Model = Callable[..., Any]  # the network, perhaps wrapped or compiled: called with (x_t, t, y)
# Called with (model, x_t, t, y, target), x_t and target (B, C, H, W), t and y (B,). Returns 0-d tensors to log, means
# over the images, of which "loss" is minimised.
Objective = Callable[[Model, Tensor, Tensor, Tensor | None, Tensor], dict[str, Tensor]]


def backbone_objective(model: Model, x_t: Tensor, t: Tensor, y: Tensor | None, target: Tensor) -> dict[str, Tensor]:
    """Mean squared error. DDPM (Ho et al. 2020), Eq. 14."""
    return {"loss": F.mse_loss(model(x_t, t, y).float(), target)}


def distillation_objective(teacher: Model, weight: float) -> Objective:
    """Mean squared error against the target, and `weight` times that against the teacher's prediction."""

    def objective(model: Model, x_t: Tensor, t: Tensor, y: Tensor | None, target: Tensor) -> dict[str, Tensor]:
        predicted = model(x_t, t, y).float()
        with torch.no_grad():
            taught = teacher(x_t, t, y).float()
        losses = {"target_loss": F.mse_loss(predicted, target), "teacher_loss": F.mse_loss(predicted, taught)}
        return {"loss": losses["target_loss"] + weight * losses["teacher_loss"], **losses}

    return objective


def early_exit_objective(freeze_backbone: bool, use_unweighted_loss: bool) -> Objective:
    """The sum of the terms of `early_exit_losses` that are asked for, see `total_early_exit_loss`."""

    def objective(model: Model, x_t: Tensor, t: Tensor, y: Tensor | None, target: Tensor) -> dict[str, Tensor]:
        exits = ExitOutputs(*(part.float() for part in model(x_t, t, y)))
        losses = early_exit_losses(exits, target)
        return {"loss": total_early_exit_loss(losses, freeze_backbone, use_unweighted_loss), **losses}

    return objective


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
