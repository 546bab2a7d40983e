"""What a run tells while it goes: metrics.jsonl and TensorBoard."""

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
    """Scalars by step. Lines after `start_step`, of a run that went on from there, are dropped.

    Raises InputError where metrics.jsonl is no file.
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
            except (ValueError, KeyError, TypeError, RecursionError):  # cut short by a crash, or no line of ours
                continue
        with replacing(self.path) as temporary:
            temporary.write_bytes(b"".join(kept))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that follows must not know more than the log
        self.events.write(step, scalars)

    def close(self) -> None:
        self.events.close()


class EventFile:
    """Scalars in a file that TensorBoard shows.

    Its own writer takes no path that is not UTF-8, and writes from a thread, in which a full disk goes unseen.

    first_step: TensorBoard forgets what files from before have from this step on.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow to import
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"  # in the order of time
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
