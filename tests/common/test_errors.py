"""Files that cannot be written: named, with their disk, and nothing is left of them."""

from __future__ import annotations

import errno
import os

import pytest

from common.errors import InputError, WriteError, command, mount_point, writing
from common.files import replacing


class Hidden(Exception):
    """As of a library in another language, which gives but a text."""


def full(number: int = errno.ENOSPC) -> OSError:
    return OSError(number, os.strerror(number))


def within_another() -> None:
    """As torch does it."""
    try:
        raise full()
    except OSError:
        raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904


def raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "fail, reason",
    [
        (lambda: raising(full()), "No space left on device"),
        (lambda: raising(full(errno.EDQUOT)), "quota exceeded"),
        (lambda: raising(full(errno.EIO)), "Input/output error"),
        (within_another, "No space left on device"),
        (lambda: raising(Hidden("Error while serializing: I/O error (os error 28)")), "No space left on device"),
    ],
)
def test_a_file_that_cannot_be_written(fail, reason, tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(WriteError) as caught, replacing(path) as temporary:
        temporary.write_text("half")
        fail()
    assert f"{path}: could not be written" in str(caught.value) and reason in str(caught.value)
    assert f"the disk at {mount_point(path)}" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "before"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "broken", "another file"), InputError("wrong"), ValueError("wrong"), RuntimeError("(os) 28")],
)
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)) as caught, replacing(tmp_path / "file"):
        raise error
    assert caught.value is error


def test_mount_points(tmp_path):
    where = mount_point(tmp_path / "file")
    assert where.is_mount() and where in tmp_path.parents and mount_point(where / "file") == where


@pytest.mark.parametrize("number, remedy", [(errno.ENOSPC, "make room"), (errno.EROFS, "remove the cause")])
def test_a_script_says_what_to_do(number, remedy, tmp_path, fails):
    @command
    def main(argv=None):
        with writing(tmp_path / "file"):
            raise full(number)

    fails(
        main, [], str(tmp_path / "file"), os.strerror(number), f"unchanged: {remedy}, then give the same command again"
    )


def test_a_full_disk_met_elsewhere(tmp_path, fails):
    @command
    def main(argv=None):
        raise full()

    fails(main, [], "No space left on device", "make room, then give the same command again")
