from __future__ import annotations

import math

import torch

from models.early_exit import ExitOutputs
from training.losses import early_exit_losses, total_early_exit_loss


def test_the_terms_written_out():
    """Two exits, three images of two pixels, summed by hand."""
    exits = ExitOutputs(torch.randn(3, 1, 1, 2), torch.rand(2, 3), torch.randn(2, 3, 1, 1, 2))
    target = torch.randn(3, 1, 1, 2)
    want = dict.fromkeys(("simple", "uncertainty", "ual", "unweighted"), 0.0)
    for b in range(3):
        wanted = target[b].flatten().tolist()
        want["simple"] += sum((o - w) ** 2 for o, w in zip(exits.output[b].flatten().tolist(), wanted, strict=True)) / 6
        for layer in range(2):
            made = exits.exit_outputs[layer, b].flatten().tolist()
            error = sum((m - w) ** 2 for m, w in zip(made, wanted, strict=True)) / 2
            u = sum(math.tanh(abs(m - w)) for m, w in zip(made, wanted, strict=True)) / 2
            want["uncertainty"] += (exits.uncertainty[layer, b].item() - u) ** 2 / 3
            want["ual"] += (1 - u) * error / 3
            want["unweighted"] += error / 3
    got = early_exit_losses(exits, target)
    for name, value in want.items():
        torch.testing.assert_close(got[name], torch.tensor(value), rtol=1e-4, atol=1e-5)


def test_the_label_of_the_probes_is_no_path_for_gradients():
    exit_outputs = torch.randn(2, 3, 1, 1, 2, requires_grad=True)
    exits = ExitOutputs(torch.zeros(3, 1, 1, 2), torch.rand(2, 3, requires_grad=True), exit_outputs)
    losses = early_exit_losses(exits, torch.zeros(3, 1, 1, 2))
    losses["uncertainty"].backward(retain_graph=True)
    assert exit_outputs.grad is None and exits.uncertainty.grad is not None
    losses["ual"].backward()
    label = exit_outputs.detach().abs().tanh().mean(dim=(2, 3, 4), keepdim=True)
    torch.testing.assert_close(exit_outputs.grad, (1 - label) * exit_outputs.detach() * 2 / 2 / 3)


def test_what_is_minimised():
    losses = {
        name: torch.tensor(value)
        for name, value in zip(("simple", "uncertainty", "ual", "unweighted"), (1.0, 10.0, 100.0, 1000.0), strict=True)
    }
    assert total_early_exit_loss(losses, freeze_backbone=True, use_unweighted_loss=False) == 110
    assert total_early_exit_loss(losses, freeze_backbone=False, use_unweighted_loss=False) == 111
    assert total_early_exit_loss(losses, freeze_backbone=False, use_unweighted_loss=True) == 1111
