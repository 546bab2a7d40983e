"""Standard output and error that are closed, full, or of few letters: the work goes on, and no file holds theirs."""

from __future__ import annotations

import io
import os
import shlex
import sys
from pathlib import Path

import pytest

from common.errors import command

posix = pytest.mark.skipif(os.name != "posix", reason="the shell's redirections")


@posix
@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_closed_ones_lead_nowhere(closed, script, start, tmp_path):
    """A file that is opened next would be standard error: what is said there would land in it."""
    words = script(
        "from tqdm import tqdm",
        "with open('file', 'w') as file:",
        "    for _ in tqdm(range(3)):",
        "        print('said'); print('said', file=sys.stderr); os.write(2, b'said'); os.system('echo said >&2')",
        "    sys.stdout.flush()",
        "    file.write('written')",
    )
    run = start(f"{shlex.join(words)} {closed}")
    errors = run.communicate()[1]
    assert "Error" not in errors and (errors == "" or "2>&-" not in closed)
    assert (run.returncode, (tmp_path / "file").read_text()) == (0, "written")


@posix
@pytest.mark.parametrize("option", ["", "-u"])
@pytest.mark.parametrize("sink", ["| head -1", "2>&1 | head -1", "> /dev/full", "> /dev/full 2>&1"])
def test_the_work_goes_on_when_nobody_reads(sink, option, script, start, tmp_path):
    if "/dev/full" in sink and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    python, path = script(
        "for i in range(20000):",
        "    print(i)",
        "    print(i, file=sys.stderr) if '2>&1' in sys.argv[1] else None",
        "Path('finished').touch()",
    )
    run = start(f"set -o pipefail; {python} {option} {path} '{sink}' {sink}")
    said, errors = run.communicate()
    assert (run.returncode, errors) == (0, "") and (tmp_path / "finished").exists()
    assert said == ("0\n" if "head" in sink else "")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_characters_that_cannot_be_encoded_are_escaped(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    text = "± é 文 \udcff"

    @command
    def main(argv=None):
        print(text)

    main()
    assert stream.errors == "strict" and sys.stdout is stream
    known = {"ascii": "", "cp1252": "±é", "utf-8": "±é文"}[encoding]
    escapes = {"±": "\\xb1", "é": "\\xe9", "文": "\\u6587", "\udcff": "\\udcff"}
    wanted = "".join(c if c in known or c.isspace() else escapes[c] for c in text)
    assert stream.buffer.getvalue().decode(encoding).split() == wanted.split()


def test_the_environment_may_say_ascii(script, start):
    run = start(script("print('3 ± 1')"), env={"PYTHONIOENCODING": "ascii"})
    assert run.communicate() == ("3 \\xb1 1\n", "") and run.returncode == 0


def test_none_at_all(monkeypatch):
    """As under pythonw."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    done = []

    @command
    def main(argv=None):
        sys.stdout.write("a")
        sys.stderr.write("b")
        done.append(True)

    main()
    assert done and sys.stdout is None and sys.stderr is None
