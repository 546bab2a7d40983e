"""Make the denoisers of a run from the planned stages and the loaded networks, and count their calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import InputError
from diffusion.forecast import Forecast, corrected, held
from diffusion.matching import own_timesteps
from diffusion.sampling import Denoiser, Stage, split_timesteps
from diffusion.solvers import Solver
from generation.run import readable
from generation.stages import Plan, PlannedStage
from models.backbone import Backbone
from models.early_exit import EarlyExitUViT
from models.flops import backbone_flops, exit_flops
from models.inference import Around, BackboneDenoiser
from models.loading import Network, Runnable, check_range
from models.offload import on_host, session_of


class Call(NamedTuple):
    """A call of a network at a timestep."""

    network: int  # index in Plan.files
    passes: int  # 2 with guidance, which runs each image with its class and without
    outer: int | None = None  # number of blocks that run on each side of the middle; None: all run
    exit_layer: int | None = None  # number of blocks that run before an exit head; None: all run


def make_stages(
    plan: Plan,
    networks: Sequence[Network[Runnable]],
    solver: Solver,
    timesteps: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    compiled: bool = False,
    allow_outside_range: bool = False,
) -> list[Stage]:
    """The stages of a run. Converts the networks to dtype.

    Raises InputError if a network was not trained on the timesteps of its stage, or cannot save work as planned.
    """
    own = split_timesteps(timesteps, plan.lowest)
    times = [own_timesteps(network.config.diffusion_params, solver.schedule, timesteps) for network in networks]
    check_saving(plan, networks, own)
    if not allow_outside_range:
        advice = f"let another network run there ({plan.source}), or give --allow_outside_range"
        for planned, visited in zip(plan.stages, own, strict=True):
            for k in planned.networks:
                check_range(networks[k], [times[k][t] for t in visited], advice)
    running, sessions = [], []
    for network, of_network in zip(networks, times, strict=True):
        with on_host(network.module, network.stored):
            running.append(BackboneDenoiser(network.module, of_network, dtype, device, compiled=compiled))
        sessions.append(session_of(network.module, network.stored, dtype, device))
    stages = []
    for planned, visited in zip(plan.stages, own, strict=True):
        session = partial(together, [sessions[k] for k in planned.networks])
        stages.append(Stage(stage_denoiser(planned, visited, networks, running, solver), visited, session))
    return stages


@contextmanager
def together(sessions: Sequence[Callable[[], AbstractContextManager[None]]]) -> Iterator[None]:
    """One context that enters several."""
    with ExitStack() as stack:
        for session in sessions:
            stack.enter_context(session())
        yield


def stage_denoiser(
    planned: PlannedStage,
    timesteps: Sequence[int],
    networks: Sequence[Network[Runnable]],
    running: Sequence[BackboneDenoiser],
    solver: Solver,
) -> Denoiser:
    """The denoiser of a stage: guided, and with the kind of output that the solver takes."""
    saving, own = planned.saving, running[planned.network]

    def of_network(k: int, denoiser: Denoiser) -> Denoiser:
        guidance = planned.guidance_scale, planned.option, planned.guides
        return readable(denoiser, networks[k].config, solver, *guidance)

    denoiser: Denoiser = own
    if saving.exit_layer is not None:
        denoiser = own.leaving_at(saving.exit_layer)
    elif reuses(planned, networks):
        assert saving.reuse_outer is not None, "settled with reuse_every"
        denoiser = reusing(own.around(saving.reuse_outer), forecast_of("reuse", planned, timesteps))
    denoiser = of_network(planned.network, denoiser)
    if saving.hold_every > 1:
        return held(denoiser, forecast_of("hold", planned, timesteps))
    if planned.cheap is not None:
        cheap = of_network(planned.cheap, running[planned.cheap])
        return corrected(denoiser, cheap, forecast_of("correct", planned, timesteps))
    return denoiser


def forecast_of(kind: str, planned: PlannedStage, timesteps: Sequence[int]) -> Forecast:
    """The forecast of a stage, which decides the steps of computation. kind: "correct", "reuse" or "hold"."""
    # The residuals of a network have the size of its batch, which changes where guidance begins or ends.
    alike = [list(run) for _, run in itertools.groupby(timesteps, planned.guides)] if kind == "reuse" else [timesteps]
    every, order = (getattr(planned.saving, f"{kind}_{name}") for name in ("every", "order"))
    return Forecast(alike, every, order or 0)


def reusing(around: Around, residual: Forecast) -> Denoiser:
    """A network whose middle runs where its residual is due; elsewhere the residual is forecast.

    The features deep in a network change little from one step to the next: DeepCache (Ma et al., CVPR 2024,
    arXiv 2312.00858) keeps those of a U-Net and runs its outermost levels with their skips; Delta-DiT (Chen et al.
    2024, arXiv 2406.01125) keeps, of transformer blocks, the difference of what leaves and what enters, as here.

    around: see `BackboneDenoiser.around`.
    """

    def predict(x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        if not residual.is_due(t):
            return around(x_t, t, y, residual.at(t))[0]
        output, added = around(x_t, t, y, None)
        residual.note(t, added)
        return output

    return predict


def reuses(planned: PlannedStage, networks: Sequence[Network[Runnable]]) -> bool:
    """Whether a stage reuses the middle of its network, and the network has a middle."""
    outer, network = planned.saving.reuse_outer, networks[planned.network].module
    return outer is not None and isinstance(network, Backbone) and bool(network.middle(outer))


def check_saving(plan: Plan, networks: Sequence[Network[Runnable]], own: Sequence[Sequence[int]]) -> None:
    """Raises InputError if a network cannot save work in the planned way. own: the timesteps of each stage."""
    for planned in plan.stages:
        layer, network = planned.saving.exit_layer, networks[planned.network]
        if layer is not None and layer > (depth := network.config.model_params.num_blocks):
            raise InputError(f"exit_layer={layer}: {network.path} has {depth} blocks; wanted 0..{depth}")
    wanted = [planned for planned in plan.stages if planned.saving.reuse_every > 1]
    able = [visited for planned, visited in zip(plan.stages, own, strict=True) if visited and reuses(planned, networks)]
    if wanted and not able:
        most = max(network.config.model_params.num_blocks for network in networks)
        raise InputError(
            f"reuse_every={wanted[0].saving.reuse_every}: no network that runs has blocks between the "
            f"{wanted[0].saving.reuse_outer} outermost on either side (reuse_outer); the deepest has {most}"
        )


def calls_of(planned: PlannedStage, timesteps: Sequence[int], networks: Sequence[Network[Runnable]]) -> Iterator[Call]:
    """The calls of all networks in a stage."""
    saving = planned.saving
    difference, residual, output = (forecast_of(kind, planned, timesteps) for kind in ("correct", "reuse", "hold"))
    for t in timesteps:
        passes = 2 if planned.guides(t) else 1
        if planned.cheap is not None:
            yield Call(planned.cheap, passes)
        if output.is_due(t) and difference.is_due(t):
            outer = saving.reuse_outer if reuses(planned, networks) and not residual.is_due(t) else None
            yield Call(planned.network, passes, outer, saving.exit_layer)


def flops_of(call: Call, networks: Sequence[Network[Runnable]]) -> int:
    """FLOPs of a call for one image."""
    network = networks[call.network].module
    if isinstance(network, EarlyExitUViT):
        layer = network.num_layers if call.exit_layer is None else call.exit_layer
        return call.passes * exit_flops(network, layer)
    return call.passes * backbone_flops(network, call.outer)
