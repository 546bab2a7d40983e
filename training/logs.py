"""The logs of a run: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from common.files import check_regular, replacing


class MetricsLog:
    """Scalars by step. Existing lines after `start_step` are removed, because the run repeats these steps.

    Raises InputError if metrics.jsonl is not a file.
    """

    def __init__(self, folder: Path, start_step: int):
        self.path = folder / "metrics.jsonl"
        self._drop_after(start_step)
        self.events = EventFile(folder / "tensorboard", start_step + 1)

    def _drop_after(self, step: int) -> None:
        check_regular(self.path)
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_bytes().split(b"\n"):
            try:
                if json.loads(line.decode())["step"] <= step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError, RecursionError):  # cut short by a crash, or a foreign line
                continue
        with replacing(self.path) as temporary:
            temporary.write_bytes(b"".join(kept))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint, so that the log has all its steps
        self.events.write(step, scalars)

    def close(self) -> None:
        self.events.close()


class EventFile:
    """Scalars in an event file for TensorBoard.

    TensorBoard's own writer refuses paths that are not UTF-8, and writes in a thread, which hides a full disk.

    first_step: TensorBoard drops the values of older files from this step on.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow to import
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"  # sorted by time
        self._file = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())

    def write(self, step: int, scalars: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(step=step, summary=self._summary(value=values))
        self._file.flush()

    def close(self) -> None:
        self._file.close()
