"""What a run tells while it goes: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from common.files import replacing


class MetricsLog:
    """Scalars by step. Lines after `start_step`, of a run that went on from there, are dropped."""

    def __init__(self, folder: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.path = folder / "metrics.jsonl"
        self._drop_after(start_step)
        self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=start_step + 1)

    def _drop_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # cut short by a crash
                continue
        with replacing(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that follows must not know more than the log
        for name, value in scalars.items():
            self.tensorboard.add_scalar(name, value, step)
        self.tensorboard.flush()

    def close(self) -> None:
        self.tensorboard.close()
