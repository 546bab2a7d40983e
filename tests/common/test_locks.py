"""Two processes do not do the same work; the one that comes later is told who does it."""

from __future__ import annotations

import errno
import os
import signal
import socket

import pytest

from common.errors import InputError, command
from common.files import lock


def holder(script, start, path):
    taken = ["from common.files import lock", f"held = lock(Path({str(path)!r}), '')"]
    run = start(script(*taken, "print(1, flush=True)", "time.sleep(60)"))
    assert run.stdout.readline() == "1\n"
    return run


def test_the_process_that_has_it_is_named(script, start, tmp_path):
    path = tmp_path / ".lock"
    path.write_text(f" {os.getpid()} another-machine, a name longer than what is to come")  # of one that is gone
    run = holder(script, start, path)
    for _ in range(2):  # asking changes nothing
        with pytest.raises(InputError, match=rf"^busy \(process {run.pid} on {socket.gethostname()}\); wait"):
            lock(path, "busy")
    run.send_signal(signal.SIGKILL)
    run.communicate()
    with lock(path, "busy"):
        pass
    assert [file.name for file in tmp_path.iterdir() if file.name != "script.py"] == [".lock"]


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_it_goes_with_the_process_whatever_its_children_do(script, start, tmp_path):
    path = tmp_path / ".lock"
    run = start(
        script(
            "from common.files import lock",
            f"held = lock(Path({str(path)!r}), '')",
            "child = os.fork()",
            "if child == 0: print(os.getpid(), flush=True)",  # it runs, and has let go of what it inherited
            "time.sleep(60)",
        )
    )
    child = int(run.stdout.readline())
    try:
        with pytest.raises(InputError):
            lock(path, "busy")
        run.send_signal(signal.SIGKILL)
        run.wait()
        with lock(path, "busy"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        run.communicate()


def test_it_ends_with_the_command(tmp_path):
    """A notebook keeps what a failed call left, and calls again."""
    kept = []

    @command
    def main(argv=None):
        kept.append(lock(tmp_path / ".lock", "busy"))
        raise InputError("something else")

    for _ in range(2):
        with pytest.raises(SystemExit):
            main()
        assert (tmp_path / ".lock").read_bytes() == b""  # nobody is named who has gone
    with lock(tmp_path / ".lock", "busy"), pytest.raises(InputError, match=rf"process {os.getpid()} "):
        lock(tmp_path / ".lock", "busy")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(number, tmp_path, monkeypatch, caplog):
    """ENOSYS is what Lustre answers."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(tmp_path / ".lock", "busy"):
        assert "cannot be locked" in caplog.text


def test_what_is_no_file_is_no_lock(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(OSError, match=r"\.lock"):
        lock(tmp_path / ".lock", "busy")
