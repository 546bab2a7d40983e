"""One optimiser step, on a linear network whose gradient is a formula, and what is counted of many."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import UViT
from training.batches import Batch
from training.settings import OptimisationSettings
from training.step import Counters, Learner, train_step

CPU, SIZE, RATES = torch.device("cpu"), 5, (0.1, 0.03, 0.2, 0.05)
SETTINGS = OptimisationSettings(weight_decay=0.3, beta1=0.8, beta2=0.95, max_grad_norm=0.2, ema_decay=0.25)


def objective(model, x_t, t, y, target):
    return {"loss": F.mse_loss(model(x_t), target), "largest": target.abs().amax()}


def learner_of(settings=SETTINGS, **more) -> Learner:
    torch.manual_seed(1)
    return Learner(nn.Linear(3, 2).double(), objective, settings, CPU, **{"batch_size": SIZE} | more)


def batch_of(number: int, scale: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x, target = (torch.randn(SIZE, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    return Batch(x, torch.zeros(SIZE, dtype=torch.long), None, scale * target)


def step(learner: Learner, batch: Batch, lr: float = 0.1) -> torch.Tensor:
    return train_step(learner, batch, lr, torch.zeros(0))


class AdamW:
    """Loshchilov & Hutter 2019, Algorithm 2, in numpy, on gradients that are clipped together; and the average."""

    def __init__(self, network: nn.Linear, settings: OptimisationSettings):
        self.settings = settings
        self.values = [p.detach().numpy().copy() for p in (network.weight, network.bias)]
        self.averages = [value.copy() for value in self.values]
        self.m, self.v = ([np.zeros_like(value) for value in self.values] for _ in range(2))
        self.updates = 0

    def gradient(self, batch: Batch) -> list[np.ndarray]:
        """Of the mean over B rows and 2 outputs of (W x + b - target)^2."""
        x, target = batch.x_t.numpy(), batch.target.numpy()
        error = x @ self.values[0].T + self.values[1] - target
        return [2 / error.size * error.T @ x, 2 / error.size * error.sum(axis=0)]

    def update(self, batch: Batch, lr: float, steps: int) -> float:
        """steps: done, this one among them. Returns the norm of the gradient."""
        of, gradient = self.settings, self.gradient(batch)
        norm = math.sqrt(sum((g**2).sum() for g in gradient))
        self.updates += 1
        decay = min(of.ema_decay, (1 + steps) / (10 + steps))
        for i, g in enumerate(gradient):
            g = g * min(1, of.max_grad_norm / norm)
            self.m[i] = of.beta1 * self.m[i] + (1 - of.beta1) * g
            self.v[i] = of.beta2 * self.v[i] + (1 - of.beta2) * g**2
            m_hat, v_hat = self.m[i] / (1 - of.beta1**self.updates), self.v[i] / (1 - of.beta2**self.updates)
            self.values[i] -= lr * of.weight_decay * self.values[i]
            self.values[i] -= lr * m_hat / (np.sqrt(v_hat) + 1e-8)
            self.averages[i] += (1 - decay) * (self.values[i] - self.averages[i])
        return norm


def assert_same_weights(learner: Learner, by_hand: AdamW) -> None:
    # To 1e-5: clipping divides by the norm + 1e-6.
    for found, wanted in zip(learner.network.parameters(), by_hand.values, strict=True):
        np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-5)
    for found, wanted in zip(learner.ema.averages.values(), by_hand.averages, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("max_grad_norm", [0.2, 1e9])
def test_it_is_adamw_on_the_clipped_gradient(max_grad_norm, parts):
    """In parts too, of 3 and 2 rows for one."""
    settings = replace(SETTINGS, max_grad_norm=max_grad_norm)
    learner = learner_of(settings, parts=parts)
    by_hand, norms = AdamW(learner.network, settings), []
    for number, lr in enumerate(RATES):
        step(learner, batch_of(number), lr)
        norms.append(by_hand.update(batch_of(number), lr, number + 1))
        assert_same_weights(learner, by_hand)
    assert min(norms) > 0.2, "of 0.2 and 1e9 one clips, one does not"
    assert learner.counters.means()["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-6), "before it is clipped"


def test_the_first_update_is_worked_out():
    """Adam's first update is lr times the sign of the gradient, whatever its size; weight decay shrinks before it."""
    learner = learner_of()
    with torch.no_grad():
        learner.network.weight.fill_(2)
        learner.network.bias.fill_(0)
    ones = torch.ones(SIZE, 3, dtype=torch.float64)
    step(learner, Batch(ones, torch.zeros(SIZE), None, torch.tensor([[100.0, -100.0]]).double().expand(SIZE, 2)), 0.5)
    weight = learner.network.weight.detach().numpy()
    np.testing.assert_allclose(weight, [[2 * (1 - 0.5 * 0.3) + 0.5] * 3, [2 * (1 - 0.5 * 0.3) - 0.5] * 3], rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing():
    """Neither the weights, nor the optimiser's own count of steps, on which its next update depends."""
    learner = learner_of(max_bad_steps=9)
    by_hand = AdamW(learner.network, SETTINGS)
    for number, scale in enumerate((1.0, math.inf, math.nan, 1.0, math.nan, 1.0)):
        batch = batch_of(number, scale)
        step(learner, batch)
        if math.isfinite(scale):
            by_hand.update(batch, 0.1, number + 1)
        assert_same_weights(learner, by_hand)
    assert (learner.step, by_hand.updates) == (6, 3)
    assert learner.counters.means()["skipped_steps"] == 3


def test_none_is_taken_after_too_many_bad_ones():
    learner = learner_of(max_bad_steps=2)
    for number in (0, 1):
        step(learner, batch_of(number, math.nan))
    before = copy.deepcopy(learner.network.state_dict())
    step(learner, batch_of(2))
    assert all(torch.equal(before[name], value) for name, value in learner.network.state_dict().items())


def test_it_depends_on_its_arguments_alone_and_leaves_them():
    one, other = learner_of(), learner_of()
    batch, asked = batch_of(0), torch.tensor([1.0, 0.0, 3.0])
    kept, randomness = copy.deepcopy(batch), torch.get_rng_state()
    returned = train_step(one, batch, 0.1, asked)
    assert returned.tolist() == asked.tolist() == [1, 0, 3]
    assert torch.equal(torch.get_rng_state(), randomness)
    assert torch.equal(batch.x_t, kept.x_t) and torch.equal(batch.target, kept.target)
    torch.randn(3)
    train_step(other, batch, 0.1, asked)
    assert_same_state(one, other)
    assert all(p.grad is None for p in one.network.parameters()), "no gradient is left for the next step"


def assert_same_state(one: Learner, other: Learner) -> None:
    """Bit for bit."""
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, ema_decay=0.0)])
def test_4_steps_are_2_a_save_a_load_and_2_more(settings, tmp_path):
    unbroken, broken = learner_of(settings), learner_of(settings)
    for number in range(4):
        step(unbroken, batch_of(number, math.nan if number == 1 else 1.0))
    for number in range(2):
        step(broken, batch_of(number, math.nan if number == 1 else 1.0))
    torch.save(broken.state_dict(), tmp_path / "state.pth")
    again = learner_of(settings)
    again.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    for number in (2, 3):
        step(again, batch_of(number))
    assert_same_state(unbroken, again)
    assert unbroken.counters.means() == again.counters.means()


@pytest.mark.parametrize("name, shape", [("step", 2), ("exp_avg", 3), ("exp_avg_sq", 1)])
def test_a_state_of_another_shape_is_refused_when_it_is_loaded(name, shape):
    """Not in the step after."""
    learner = learner_of()
    step(learner, batch_of(0))
    state = copy.deepcopy(learner.state_dict())
    state["optimizer"]["state"][1][name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"{name} of shape \[{shape}\]"):
        learner_of().load_state_dict(state)


class TestCounters:
    TAKEN, NOT = torch.tensor(True), torch.tensor(False)

    @staticmethod
    def loss(value: float) -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor(value)}

    def test_means_are_of_the_steps_that_were_taken(self):
        counters = Counters.zero(CPU)
        for value, taken in ((1.0, self.TAKEN), (math.nan, self.NOT), (4.0, self.TAKEN), (1e9, self.NOT)):
            counters.add(self.loss(value), taken, self.NOT)
        assert counters.means() == {"loss": 2.5, "skipped_steps": 2}

    def test_sums_begin_anew_and_the_rest_goes_on(self):
        counters = Counters.zero(CPU)
        for value, taken in ((1.0, self.TAKEN), (2.0, self.NOT)):
            counters.add(self.loss(value), taken, self.NOT)
        counters.begin_sums()
        assert counters.means() == {"skipped_steps": 1}
        counters.add(self.loss(5.0), self.NOT, self.NOT)
        means = counters.means()
        assert math.isnan(means["loss"]) and means["skipped_steps"] == 2, "no step was taken since"
        assert int(counters.bad_in_row) == 2, "the row goes on over a log"

    def test_a_row_ends_with_a_step_that_is_taken(self):
        counters, row = Counters.zero(CPU), []
        # GradScaler lowers its scale on the third: it is skipped, and no fault of the training.
        for taken, searching in ((0, 0), (0, 0), (0, 1), (0, 0), (1, 0), (0, 0)):
            counters.add(self.loss(1.0), torch.tensor(bool(taken)), torch.tensor(bool(searching)))
            row.append(int(counters.bad_in_row))
        assert row == [1, 2, 2, 3, 0, 1]
        assert counters.means()["skipped_steps"] == 5

    def test_they_travel(self):
        counters, other = Counters.zero(CPU), Counters.zero(CPU)
        for taken in (self.TAKEN, self.NOT):
            counters.add(self.loss(0.1), taken, self.NOT)
        state = counters.state_dict()
        assert {name: value for name, value in state.items() if name != "sums"} == {
            **{"summed_steps": 1, "skipped_steps": 1, "bad_in_row": 1}
        }
        other.load_state_dict(state)
        for each in (counters, other):
            each.add(self.loss(0.2), self.TAKEN, self.NOT)
        torch.testing.assert_close(counters.state_dict(), other.state_dict(), rtol=0, atol=0)
        with pytest.raises(RuntimeError):
            other.load_state_dict(state | {"sums": {"loss": torch.zeros(2)}})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("use_amp, amp_dtype", [(False, "bfloat16"), (True, "bfloat16"), (True, "float16")])
def test_the_fused_kernel_of_attention_is_for_fp32_on_cpus(use_amp, amp_dtype, checkpointing):
    """Its gradient is slow in half precision; recomputed activations need the same kernel as the first ones."""
    settings = replace(SETTINGS, use_amp=use_amp, amp_dtype=amp_dtype)
    torch.manual_seed(1)
    network = UViT(img_size=4, patch_size=2, in_chans=1, embed_dim=8, depth=1, num_heads=2)
    network.grad_checkpointing = checkpointing
    learner = Learner(
        network, lambda model, x, t, y, target: {"loss": F.mse_loss(model(x, t), target)}, settings, CPU, batch_size=2
    )
    x = torch.randn(2, 1, 4, 4)
    with torch.profiler.profile() as profile:
        step(learner, Batch(x, torch.tensor([3, 7]), None, x))
    fused = [event.key for event in profile.key_averages() if "flash_attention" in event.key]
    assert bool(fused) != use_amp and learner.counters.skipped_steps == 0
    assert torch.backends.cuda.flash_sdp_enabled()
