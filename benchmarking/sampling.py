"""Measure the time of a call of each backbone, and the time that a switch saves."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarking.measure import CallTimer, MatrixProduct
from benchmarking.settings import SamplingBenchmark
from common.devices import DTYPES, Stopwatch, peak_memory
from common.images import save_png, to_uint8
from common.seeds import nth_seed
from common.timing import in_turns, ratio
from diffusion import NoiseSchedule
from diffusion.sampling import Denoiser, SeededNoise, Stage, random_classes, sample, split_timesteps
from diffusion.solvers import make_solver, spaced_timesteps
from models.backbone import Backbone
from models.flops import backbone_flops
from models.inference import BackboneDenoiser
from models.loading import Network


@torch.inference_mode()
def measure_sampling(
    settings: SamplingBenchmark,
    full: Network[Backbone],
    shallow: Network[Backbone],
    precision: str,
    device: torch.device,
) -> dict[str, Any]:
    """Times and rates of both networks alone, and of sampling with each solver at each t_switch."""
    config, size = full.config, settings.batch_size
    schedule = NoiseSchedule(**config.diffusion_params.schedule)
    timesteps = spaced_timesteps(schedule.num_timesteps, settings.steps)
    times = {t: t for t in timesteps}
    networks = {"shallow": shallow, "full": full}
    flops = {name: backbone_flops(network.module) for name, network in networks.items()}
    backbones = {
        name: BackboneDenoiser(network.module, times, DTYPES[precision], device, compiled=settings.compile)
        for name, network in networks.items()
    }
    shape = config.model_params.image_shape
    x = torch.randn(size, *shape, device=device)
    y = random_classes(config.classes, 0, range(size)).to(device) if config.classes else None
    product, timer = MatrixProduct(device, precision), CallTimer(device)
    in_network: dict[str, list[float]] = {}  # the share of each run's time

    def generate(run: Run, folder: Path) -> None:
        solver = make_solver(run.solver, schedule, config.parametrization)
        with Stopwatch(device) as watch:
            noise = SeededNoise([nth_seed(0, "samples", i) for i in range(size)], device)
            images = to_uint8(sample(run.stages, solver, noise, shape, y)).cpu()
            if not config.autoencoder:
                for index, image in enumerate(images):
                    save_png(folder / f"{index:06d}.png", image)
        in_network.setdefault(run.name, []).append(timer.take_seconds() / watch.seconds)

    timed = {name: timer.of(backbone) for name, backbone in backbones.items()}
    runs = [
        Run(solver, t_switch, timed, timesteps) for solver in settings.solver for t_switch in (None, *settings.t_switch)
    ]
    with tempfile.TemporaryDirectory() as folder:
        tasks: dict[str, Callable[[], object]] = {"matrix product": product}
        tasks |= {f"{name} call": partial(backbone, x, timesteps[0], y) for name, backbone in backbones.items()}
        tasks |= {run.name: partial(generate, run, Path(folder)) for run in runs}
        seconds = in_turns(tasks, settings.rounds, device, settings.machine.quiet)

    rate = [product.flops / s for s in seconds["matrix product"]]

    def share_of_rate(work: float, spent: list[float]) -> float:
        return ratio([work / s for s in spent], rate)

    calls = []
    for name, network in networks.items():
        spent = seconds[f"{name} call"]
        calls.append(
            {
                "network": name,
                "blocks": network.config.model_params.num_blocks,
                "ms_per_call": 1000 * statistics.median(spent),
                "flops_per_image_call": flops[name],
                "flops_per_second": size * flops[name] / statistics.median(spent),
                "share_of_matrix_rate": share_of_rate(size * flops[name], spent),
            }
        )
    rows = []
    for run in runs:
        work = sum(count * flops[name] for name, count in run.steps.items())
        spent, share = seconds[run.name], statistics.median(in_network[run.name][1:])  # the first call is a warm-up
        speed_up = ratio(seconds[run_name(run.solver, None)], spent)
        predicted = len(timesteps) * flops["full"] / work
        rows.append(
            {
                "solver": run.solver,
                "t_switch": run.t_switch,
                "steps": run.steps,
                "seconds_per_image": statistics.median(spent) / size,
                "images_per_second": size / statistics.median(spent),
                "images_per_second_network_only": size / (share * statistics.median(spent)),
                "share_outside_network": 1 - share,
                "share_of_matrix_rate": share_of_rate(size * work, spent),
                "speed_up": speed_up,
                "speed_up_predicted": predicted,
                "speed_up_reached": speed_up / predicted,
            }
        )
    return {
        "precision": precision,
        "compiled": settings.compile,
        "batch_size": size,
        "steps": len(timesteps),
        "num_timesteps": schedule.num_timesteps,
        "matrix_flops_per_second": statistics.median(rate),
        "networks": calls,
        "runs": rows,
        "peak_memory_bytes": peak_memory(device),
    }


class Run:
    """Sampling with one solver and one t_switch, or with the full network alone (None)."""

    def __init__(self, solver: str, t_switch: int | None, backbones: Mapping[str, Denoiser], timesteps: Sequence[int]):
        self.solver, self.t_switch = solver, t_switch
        self.name = run_name(solver, t_switch)
        names, lowest = (["full"], [0]) if t_switch is None else (["shallow", "full"], [t_switch + 1, 0])
        own = dict(zip(names, split_timesteps(timesteps, lowest), strict=True))
        self.steps = {name: len(visited) for name, visited in own.items()}
        self.stages = [Stage(backbones[name], visited) for name, visited in own.items()]


def run_name(solver: str, t_switch: int | None) -> str:
    return f"{solver}, " + ("full" if t_switch is None else f"t_switch {t_switch}")
