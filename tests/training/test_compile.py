"""--compile of the training scripts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import main as main_script
import train
from tests.conftest import TINY_FLAGS, TRAINING_FLAGS


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.slow
def test_compiled_training_is_training(full, tmp_path, run_quietly):
    flags = [*TINY_FLAGS, *TRAINING_FLAGS, "--depth", 3, "--n_steps", 2, "--log_every_n_steps", 1]
    flags[flags.index("--preview_steps") + 1] = 2
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        run_quietly(train.main, [*flags, *more, "--log_path", tmp_path, "--exp_name", name])
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-4)
    assert (tmp_path / "compiled" / "previews" / "step-2.png").exists()
    saved = torch.load(tmp_path / "compiled" / "digits_uvit_last.pth", weights_only=True)["model"]
    assert not any("_orig_mod" in key for key in saved)

    heads = ["--model", "deediff_uvit", "--classifier_type", "mlp_probe_per_layer", "--load_backbone", full]
    flags = [*TINY_FLAGS, *TRAINING_FLAGS, *heads, "--freeze_backbone", "--depth", 5, "--n_steps", 1]
    flags += ["--log_every_n_steps", 1]
    for name, more in (("ee_eager", []), ("ee_compiled", ["--compile"])):
        run_quietly(main_script.main, [*flags, *more, "--log_path", tmp_path, "--exp_name", name])
    np.testing.assert_allclose(losses(tmp_path / "ee_compiled"), losses(tmp_path / "ee_eager"), rtol=1e-4)
