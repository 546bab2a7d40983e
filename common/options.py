"""Settings that several scripts share. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import BETA_SCHEDULES, PRECISIONS
from common.errors import InputError
from common.settings import CONDITIONS, RESULT, Checked, option
from common.solvers import SOLVERS

MOST_SEED, MOST_BATCH = 2**63 - 1, 2**20


@dataclass(frozen=True, kw_only=True)
class SolverSettings(Checked):
    """Solver."""

    solver: str = option("ddpm", "method of the sampling steps", choices=tuple(SOLVERS))
    steps: int | None = option(
        None,
        "network calls per image (default: "
        + ", ".join(f"{entry.steps or 'every timestep'} for {name}" for name, entry in SOLVERS.items())
        + ")",
        least=1,
        most=100_000,
    )
    eta: float | None = option(
        None, "noise of ddim; 0 is deterministic, 1 has the variance of ddpm (default: 0)", least=0, most=1
    )
    sampling_schedule: str | None = option(
        None, "noise schedule of the sampler (default: that of the last network)", choices=BETA_SCHEDULES
    )
    clip_x0: bool = option(False, "clip the predicted clean image to [-1, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver != "ddim" and self.eta is not None:
            raise InputError(f"--eta belongs to --solver ddim, not {self.solver}")
        if self.solver == "ddim" and self.eta is None:
            object.__setattr__(self, "eta", 0.0)
        if self.steps is None:
            object.__setattr__(self, "steps", SOLVERS[self.solver].steps)


PRECISION = "precision of the networks (default: bf16 if the device has instructions for it, else fp32)"


@dataclass(frozen=True, kw_only=True)
class SpeedSettings(Checked):
    """Speed."""

    precision: str | None = option(None, PRECISION, choices=PRECISIONS, decides=(RESULT, CONDITIONS))
    compile: bool = option(
        False,
        "compile the networks first (torch.compile), which takes about a minute",
        decides=(CONDITIONS,),
        why="compilation changes only the rounding",
    )

    @property
    def chosen_precision(self) -> str:
        """The precision; only for settings from `generation.run.settled_speed`."""
        assert self.precision is not None, "the precision is not chosen yet"
        return self.precision


@dataclass(frozen=True, kw_only=True)
class MachineSettings(Checked):
    """Machine."""

    device: str = option(
        "auto",
        "cpu, cuda, cuda:1, mps, or auto for the first available of CUDA, MPS and CPU",
        decides=(),
        why="the record contains the kind of device",
    )
    quiet: bool = option(False, "show no progress bar", decides=(), why="it changes only the terminal")
