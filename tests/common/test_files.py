"""Files of any origin, and what is in the place of a file."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest

from common.errors import InputError
from common.files import check_regular, read_arrays, read_json


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_link(path):
    path.symlink_to("/dev/zero")


PLACES = {"folder": lambda path: path.mkdir(), "pipe": make_pipe, "socket": make_socket, "device": make_link}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes of a name")
@pytest.mark.parametrize("read", [read_json, read_arrays, check_regular])
@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_is_refused_before_it_is_opened(kind, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    PLACES[kind](path := tmp_path.joinpath("x").relative_to(tmp_path))
    with pytest.raises(InputError, match="x: is a folder" if kind == "folder" else "x: is a pipe or device"):
        read(path)


def test_files_and_links_to_them_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    np.savez(tmp_path / "a.npz", a=np.arange(3))
    for name in ("a.json", "a.npz"):
        (tmp_path / f"link_{name}").symlink_to(tmp_path / name)
    assert read_json(tmp_path / "link_a.json") == {"a": 1}
    assert read_arrays(tmp_path / "link_a.npz")["a"].tolist() == [0, 1, 2]


def test_what_is_not_there_is_said(tmp_path):
    check_regular(tmp_path / "x")
    for read in (read_json, read_arrays):
        with pytest.raises(InputError, match=r"x: No such file|x: no such file"):
            read(tmp_path / "x")
