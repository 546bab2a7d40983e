"""Steps per second of training, as the training scripts do them."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from training.options import add_training_options, check_training_options

from benchmarking.measure import MatrixProduct, in_turns, peak_memory, ratio
from benchmarking.settings import TrainingBenchmark
from common.cli import Parser
from data.dataset import InMemoryDataset, training_batches
from models.early_exit import EarlyExitUViT
from models.flops import early_exit_training_flops, uvit_flops
from models.loading import Network
from training.checkpoint import CheckpointFolder
from training.loop import Trainer
from training.setup import backbone_objective, early_exit_objective


class RandomImages(InMemoryDataset):
    """Noise in the shape that a network takes."""

    def __init__(self, shape: tuple[int, int, int], num_images: int, num_classes: int):
        self.images = torch.randint(256, (num_images, *shape), dtype=torch.uint8)
        self.labels = torch.randint(max(1, num_classes), (num_images,))

    def describe(self) -> dict[str, Any]:
        return {"dataset": "random images"}


def measure_training(
    settings: TrainingBenchmark, network: Network, precision: str, device: torch.device
) -> dict[str, Any]:
    """Times of whole optimiser steps: batch, forward, backward, optimiser, averaged weights."""
    parser = Parser()
    add_training_options(parser)
    argv = ["--dataset", "digits", "--n_steps", "1000000", "--preview_steps", "0"]
    argv += ["--batch_size", str(settings.batch_size), "--device", str(device)]
    argv += ["--use_amp"] * (precision != "fp32") + ["--compile"] * settings.compile
    argv += ["--amp_dtype", "float16" if precision == "fp16" else "bfloat16"]
    options = check_training_options(parser, parser.parse_args(argv), argv)
    module = network.module.requires_grad_(True)
    if early_exit := isinstance(module, EarlyExitUViT):
        module.uvit.requires_grad_(not settings.freeze_backbone)
        objective = functools.partial(early_exit_objective, settings.freeze_backbone, False)
        flops = early_exit_training_flops(module, settings.freeze_backbone)
    else:
        objective, flops = backbone_objective, 3 * uvit_flops(module)
    config = dataclasses.replace(network.config, dataset=None)
    dataset = RandomImages(config.model_params.image_shape, max(512, settings.batch_size), len(config.classes))
    product = MatrixProduct(device, precision)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointFolder(Path(folder), "benchmark")
        trainer = Trainer(options, config, module, objective, module, dataset, checkpoints, device)
        module.train()
        pin_memory = device.type == "cuda"
        batches = training_batches(dataset, settings.batch_size, 0, 0, num_workers=0, pin_memory=pin_memory)
        step = {"step": lambda: trainer.update(trainer.make_batch(*next(batches)))}
        seconds = in_turns({"matrix product": product} | step, settings.rounds, device, settings.machine.quiet)
    spent = seconds["step"]
    rate = [product.flops / s for s in seconds["matrix product"]]
    return {
        "model": "early exit" if early_exit else "backbone",
        "frozen_backbone": early_exit and settings.freeze_backbone,
        "precision": precision,
        "compiled": settings.compile,
        "batch_size": settings.batch_size,
        "steps_per_second": 1 / statistics.median(spent),
        "images_per_second": settings.batch_size / statistics.median(spent),
        "flops_per_image": flops,
        "flops_per_second": settings.batch_size * flops / statistics.median(spent),
        "matrix_flops_per_second": statistics.median(rate),
        "share_of_matrix_rate": ratio([settings.batch_size * flops / s for s in spent], rate),
        "peak_memory_bytes": peak_memory(device),
    }
