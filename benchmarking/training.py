"""Measure the steps per second of training, with the steps of the training scripts."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import torch
from torch import nn

from benchmarking.measure import MatrixProduct
from benchmarking.settings import TrainingBenchmark
from common.devices import peak_memory
from common.timing import in_turns, ratio
from data.dataset import InMemoryDataset, training_batches
from models.backbone import Backbone
from models.early_exit import EarlyExitUViT
from models.flops import backbone_flops, early_exit_training_flops
from models.loading import Network
from training.batches import BatchMaker
from training.losses import Objective, backbone_objective, early_exit_objective
from training.settings import OptimisationSettings
from training.step import Learner, train_step


class RandomImages(InMemoryDataset):
    """A dataset of noise in the image shape of a network."""

    def __init__(self, shape: tuple[int, int, int], num_images: int, num_classes: int):
        self.images = torch.randint(256, (num_images, *shape), dtype=torch.uint8)
        self.labels = torch.randint(max(1, num_classes), (num_images,))

    def describe(self) -> dict[str, Any]:
        return {"dataset": "random images"}


def measure_training(
    settings: TrainingBenchmark, network: Network[nn.Module], precision: str, device: torch.device
) -> dict[str, Any]:
    """Times of whole optimiser steps: batch, forward, backward, optimiser, averaged weights."""
    module, size = network.module.requires_grad_(True), settings.batch_size
    objective, flops = task_of(module, settings.freeze_backbone)
    optimisation = OptimisationSettings(
        use_amp=precision != "fp32",
        amp_dtype="float16" if precision == "fp16" else "bfloat16",
        compile=settings.compile,
    )
    config = dataclasses.replace(network.config, dataset=None)
    dataset = RandomImages(config.model_params.image_shape, max(512, size), len(config.classes))
    make_batch = BatchMaker(
        config,
        dataset,
        seed=0,
        batch_size=size,
        part=slice(None),
        device=device,
        random_flip=dataset.random_flip,
        label_dropout=0.0,
    )
    learner, asked = Learner(module, objective, optimisation, device, batch_size=size), torch.zeros(0)
    module.train()
    batches = training_batches(dataset, size, 0, 0, num_workers=0, pin_memory=device.type == "cuda")

    def step() -> None:
        train_step(learner, make_batch(learner.step, *next(batches)), optimisation.lr, asked)

    product = MatrixProduct(device, precision)
    seconds = in_turns({"matrix product": product, "step": step}, settings.rounds, device, settings.machine.quiet)
    spent = seconds["step"]
    rate = [product.flops / s for s in seconds["matrix product"]]
    early_exit = isinstance(module, EarlyExitUViT)
    return {
        "model": "early exit" if early_exit else "backbone",
        "frozen_backbone": early_exit and settings.freeze_backbone,
        "precision": precision,
        "compiled": settings.compile,
        "batch_size": size,
        "steps_per_second": 1 / statistics.median(spent),
        "images_per_second": size / statistics.median(spent),
        "flops_per_image": flops,
        "flops_per_second": size * flops / statistics.median(spent),
        "matrix_flops_per_second": statistics.median(rate),
        "share_of_matrix_rate": ratio([size * flops / s for s in spent], rate),
        "peak_memory_bytes": peak_memory(device),
    }


def task_of(module: nn.Module, freeze_backbone: bool) -> tuple[Objective, int]:
    """The objective, and the FLOPs of a training step per image."""
    if isinstance(module, EarlyExitUViT):
        module.uvit.requires_grad_(not freeze_backbone)
        return early_exit_objective(freeze_backbone, False), early_exit_training_flops(module, freeze_backbone)
    assert isinstance(module, Backbone)
    return backbone_objective, 3 * backbone_flops(module)
