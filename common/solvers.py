"""The solvers by name. To add a solver, write a class as in diffusion.solvers, in a new module, and an entry here.

No torch in here, so that --help stays quick; a module is imported when its solver is made.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """The facts about a solver that are needed before it is made."""

    module: str
    maker: str  # a class of the module: a `diffusion.solvers.Solver`, with its fields
    steps: int | None  # the default of --steps; None: every timestep


SOLVERS = {
    "ddpm": Entry("diffusion.solvers", "Solver", None),
    "ddim": Entry("diffusion.solvers", "Solver", 50),
    "dpmsolver++": Entry("diffusion.solvers", "MultistepSolver", 20),
    "unipc": Entry("diffusion.solvers", "MultistepSolver", 20),
}
