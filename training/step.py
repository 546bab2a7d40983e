"""One optimiser step: loss, gradient, clipping, update, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.distributed import total, world_size
from training.batches import Batch
from training.ema import Ema
from training.losses import Model, Objective
from training.parallel import gradients_shared, in_pieces, like, spread, whole
from training.settings import OptimisationSettings

# Errors of `load_state_dict`.
MISFITS = (LookupError, ValueError, RuntimeError, TypeError, AttributeError, OverflowError)


@dataclass
class Counters:
    """Sums over the steps of a run. They stay on the device, because reading them makes it wait for the host."""

    sums: dict[str, Tensor]  # 0-d sums of the losses over the taken steps since the last log
    summed_steps: Tensor  # the number of these steps
    skipped_steps: Tensor  # since step 0
    bad_in_row: Tensor  # consecutive steps that were not finite

    @classmethod
    def zero(cls, device: torch.device) -> Counters:
        return cls({}, *(torch.zeros((), device=device) for _ in range(3)))

    def begin_sums(self) -> None:
        self.sums, self.summed_steps = {}, torch.zeros_like(self.summed_steps)

    def add(self, losses: Mapping[str, Tensor], taken: Tensor, searching: Tensor) -> None:
        """Add a step. losses: 0-d. taken: 0-d bool. searching: 0-d bool, GradScaler still searches its scale."""
        self.bad_in_row = torch.where(taken, 0, self.bad_in_row + ~searching)
        self.skipped_steps = self.skipped_steps + ~taken
        self.summed_steps = self.summed_steps + taken
        for name, value in losses.items():
            value = torch.where(taken, value, 0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def means(self) -> dict[str, float]:
        """The means since the last log; NaN if no step was taken."""
        steps = float(self.summed_steps)
        means = {name: float(value) / steps if steps else math.nan for name, value in self.sums.items()}
        return means | {"skipped_steps": int(self.skipped_steps)}

    def state_dict(self) -> dict[str, Any]:
        counts = {name: int(getattr(self, name)) for name in ("summed_steps", "skipped_steps", "bad_in_row")}
        return {"sums": self.sums, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.summed_steps.device
        self.sums = {name: value.to(device).reshape(()) for name, value in state["sums"].items()}
        for name in ("summed_steps", "skipped_steps", "bad_in_row"):
            getattr(self, name).fill_(state[name])


class Learner:
    """A network in training, with its optimiser, its averaged weights and the counters of the run.

    network: on the CPU; the parameters with requires_grad are trained. batch_size: over all processes. parts: each
    batch is split into this many parts. max_bad_steps: no step is taken after this many steps in a row that were not
    finite.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        settings: OptimisationSettings,
        device: torch.device,
        *,
        batch_size: int,
        parts: int = 1,
        max_bad_steps: int = 10,
        fsdp: bool = False,
    ):
        self.network, self.objective, self.settings, self.device = network, objective, settings, device
        self.batch_size, self.parts, self.max_bad_steps = batch_size, parts, max_bad_steps
        self.model = spread(network, device, fsdp)
        # Previews call the uncompiled network, because their batch has another size.
        self.forward: Model = torch.compile(self.model, dynamic=False) if settings.compile else self.model
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=device.type in ("cuda", "cpu"),
        )
        self.ema = Ema(network, settings.ema_decay) if settings.ema_decay else None
        self.amp_dtype = getattr(torch, settings.amp_dtype)
        in_fp16 = settings.use_amp and settings.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=in_fp16)
        self.step = 0
        self.counters = Counters.zero(device)

    def attention(self) -> AbstractContextManager[None]:
        """A context for a step, backward pass included, that chooses the kernels of attention.

        On a CPU in half precision the gradient of the fused kernel takes longer than all else (57 % of a step with 51
        tokens, torch 2.14), so attention uses plain matrix products there.
        """
        plain = self.settings.use_amp and self.device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()

    def update(self, lr: float, taken: Tensor) -> None:
        """Update the parameters and their averages, and clear the gradients.

        taken: 0-d bool; if False, nothing changes. With a fused optimiser it is not read on the host.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.optimizer.defaults["fused"]:
            # The fused kernel reads `found_inf`, as with GradScaler.
            self.optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]  # which torch sets, too
            self.optimizer.step()
        elif taken:
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step, taken)

    def state_dict(self) -> dict[str, Any]:
        """The state from which a run continues. All processes must call it; tensors are whole on process 0."""
        return {
            "step": self.step,
            "model": whole(self.network.state_dict()),
            "ema": whole(self.ema.averages) if self.ema else None,
            "optimizer": whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "counters": self.counters.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises one of MISFITS if the state does not fit this run."""
        here = self.network.state_dict()
        self.network.load_state_dict({name: like(value, here[name]) for name, value in state["model"].items()})
        if self.ema is not None:
            self.ema.load(state["ema"])
        fused = self.optimizer.defaults["fused"]
        self.optimizer.load_state_dict(self._in_pieces(state["optimizer"]))
        for group in self.optimizer.param_groups:  # keep the settings of this run, not those of the checkpoint
            betas = (self.settings.beta1, self.settings.beta2)
            group.update(betas=betas, weight_decay=self.settings.weight_decay, fused=fused)
        self.scaler.load_state_dict(state["scaler"])
        self.counters.load_state_dict(state["counters"])
        self.step = state["step"]

    def _in_pieces(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """The state of an optimiser, sharded like its parameters. Raises ValueError for other shapes."""
        state: dict[int, dict[str, Tensor]] = {}
        for i, values in optimizer["state"].items():
            for name, value in values.items():
                wanted = torch.Size() if name == "step" else self.trained[i].shape
                if value.shape != wanted:  # else the next step of the optimiser would fail
                    raise ValueError(f"{name} of shape {list(value.shape)}, wanted {list(wanted)}")
            state[i] = {name: like(value, self.trained[i]) for name, value in values.items()}
        return {**optimizer, "state": state}


def learning_rate(step: int, n_steps: int, settings: OptimisationSettings) -> float:
    """The learning rate after `step` of n_steps updates: linear warm-up, then constant or half a cosine to 0."""
    if step < settings.num_warmup_steps:
        return settings.lr * (step + 1) / settings.num_warmup_steps
    if settings.lr_schedule == "constant":
        return settings.lr
    progress = (step - settings.num_warmup_steps) / max(1, n_steps - settings.num_warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train_step(learner: Learner, batch: Batch, lr: float, asked: Tensor) -> Tensor:
    """One optimiser step: loss, gradient, clipping, update. Nothing changes if the loss or gradient is not finite.

    batch: the rows of this process; all rows have the same weight, also in parts of unequal size. asked: (K,), is
    summed over the processes together with the losses, and returned.
    """
    losses: dict[str, Tensor] = {}
    for k in range(learner.parts):
        rows = batch.part(k, learner.parts)
        share = learner.batch_size / len(rows.t)  # number of parts of this size in a batch
        with gradients_shared(learner.model, now=k == learner.parts - 1), learner.attention():
            with torch.autocast(learner.device.type, learner.amp_dtype, enabled=learner.settings.use_amp):
                found = learner.objective(learner.forward, *rows)
            # The gradients are averaged over the processes; world_size() turns the mean into the sum.
            learner.scaler.scale(found["loss"] / (share / world_size())).backward()
        for name, loss in found.items():
            loss = loss.detach() / share
            losses[name] = losses[name] + loss if name in losses else loss
    summed = total(torch.cat([torch.stack(list(losses.values())), asked.to(learner.device, non_blocking=True)]))
    losses, asked = dict(zip(losses, summed, strict=False)), summed[len(losses) :]

    scale = learner.scaler.scale(torch.ones((), device=learner.device))
    learner.scaler.unscale_(learner.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(learner.trained, learner.settings.max_grad_norm)
    grad_norm = grad_norm.full_tensor() if in_pieces(grad_norm) else grad_norm
    finite = losses["loss"].isfinite() & grad_norm.isfinite()
    # After too many bad steps no step is taken, so a host that reads late still has the last good weights.
    taken = finite & (learner.counters.bad_in_row < learner.max_bad_steps)
    learner.update(lr, taken)
    # GradScaler starts with a scale that overflows and lowers it: an overflow is an error only at scale 1.
    searching = losses["loss"].isfinite() & (scale > 1)
    learner.counters.add(losses | {"grad_norm": grad_norm}, taken, searching)
    return asked
