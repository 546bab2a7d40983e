"""Signals and Ctrl-C end a script in one line; a signal that is ignored does not."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from common.errors import command
from common.signals import on_signals
from common.startup import ENDING
from tests.common.conftest import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no such signals")

LINES = {
    signal.SIGTERM: "script.py: stopped (SIGTERM)\n",
    signal.SIGHUP: "script.py: stopped (SIGHUP)\n",
    signal.SIGUSR1: "script.py: stopped (SIGUSR1)\n",
    signal.SIGINT: "script.py: interrupted\n",
}


def begun(run) -> None:
    assert run.stdout.readline() == "begun\n"


@pytest.mark.parametrize("number", LINES, ids=lambda number: number.name)
def test_one_line(number, script, start):
    run = start(script("print('begun', flush=True)", "time.sleep(60)"))
    begun(run)
    run.send_signal(number)
    assert run.communicate()[1] == LINES[number]
    assert run.returncode == 128 + number


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("caught", [True, False])
def test_a_second_one_disturbs_nothing(second, caught, script, start):
    """While what was begun is cleaned up, and while the interpreter ends."""
    lines = ["try:", "    print('begun', flush=True)", "    time.sleep(60)"]
    if caught:  # a script's own last words
        lines += ["except KeyboardInterrupt:", "    raise SystemExit(130) from None"]
    else:
        lines += ["finally:", "    time.sleep(0.2)", "    print('cleaned up', flush=True)"]
    run = start(script("import atexit", "atexit.register(time.sleep, 0.3)", *lines))
    begun(run)
    run.send_signal(signal.SIGINT)
    for _ in range(20):
        time.sleep(0.02)
        if run.poll() is None:
            run.send_signal(second)
    said, errors = run.communicate()
    assert (run.returncode, errors) == (130, "" if caught else LINES[signal.SIGINT])
    assert said == ("" if caught else "cleaned up\n")


SCRIPTS = ["train", "main", "sampler", "eesampler", "fid", "compare", "calibrate", "benchmark", "pack", "export"]


@pytest.mark.parametrize("number", LINES, ids=lambda number: number.name)
@pytest.mark.parametrize("name", SCRIPTS)
def test_one_line_while_modules_are_imported(name, number, start, tmp_path):
    """Each script imports argparse; this one sends a signal in its place."""
    (tmp_path / "argparse.py").write_text(f"import os, time\nos.kill(os.getpid(), {number})\ntime.sleep(60)\n")
    run = start([sys.executable, str(ROOT / f"{name}.py"), "--help"], env={"PYTHONPATH": str(tmp_path)})
    assert run.communicate() == ("", LINES[number].replace("script", name))
    assert run.returncode == 128 + number


def test_an_ignored_one_is_left_alone_while_modules_are_imported(start, tmp_path):
    (tmp_path / "argparse.py").write_text("import os\nos.kill(os.getpid(), 1)\nraise SystemExit(7)\n")
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    run = start([sys.executable, str(ROOT / "train.py")], env={"PYTHONPATH": str(tmp_path)}, **ignored)
    assert run.communicate() == ("", "") and run.returncode == 7


@pytest.mark.parametrize("number", LINES, ids=lambda number: number.name)
def test_main_may_import_modules_that_swallow_exceptions(number, script, start, tmp_path):
    """As numpy does: what is interrupted while it is imported is then missing, or imported twice."""
    lines = ["import os, time", "try:", f"    os.kill(os.getpid(), {number})", "    time.sleep(60)"]
    (tmp_path / "careless.py").write_text("\n".join([*lines, "except BaseException:", "    pass", ""]))
    run = start(script("print('begun')", "import careless", "print('went on')"))
    assert run.communicate() == ("begun\n", LINES[number]) and run.returncode == 128 + number


def test_a_caller_in_the_same_process_is_not_ended(script, start, tmp_path):
    """As of a notebook: there the exception is the caller's."""
    (tmp_path / "interrupted.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
    script("import interrupted")
    lines = ["import script", "try:", "    script.main()", "except SystemExit as ended:", "    print(ended.code)"]
    run = start([sys.executable, "-c", "\n".join(lines)])
    assert run.communicate() == ("130\n", LINES[signal.SIGINT]) and run.returncode == 0


def test_importing_a_script_sets_no_handler(start):
    """As notebooks do."""
    names = ", ".join(SCRIPTS)
    code = f"import signal\nbefore = signal.getsignal(2)\nimport {names}\nassert signal.getsignal(2) is before"
    run = start([sys.executable, "-c", code])
    assert run.communicate() == ("", "") and run.returncode == 0


def test_what_is_done_is_not_interrupted(script, start):
    """Libraries take half a second to end, at whose end Python itself has put the handlers back."""
    lines = ["import atexit", "atexit.register(time.sleep, 0.3)", "atexit.register(os.write, 1, b'begun\\n')"]
    run = start(script(*lines))
    begun(run)
    for _ in range(10):
        run.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert run.communicate() == ("", "") and run.returncode == 0


def test_an_ignored_one_is_left_alone(script, start):
    """As under nohup."""
    words = script("print('begun', flush=True)", "sys.stdin.readline()", "print('finished')")
    run = start(words, stdin=-1, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    begun(run)
    run.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    assert run.communicate("\n") == ("finished\n", "") and run.returncode == 0


def test_a_forked_process_ends_as_if_there_were_no_handler(script, start):
    run = start(
        script(
            "child = os.fork()",
            "if child == 0:",
            "    time.sleep(60)",
            "time.sleep(0.1)",
            "os.kill(child, 15)",
            "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))",
        )
    )
    assert run.communicate() == ("-15\n", "")


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in ENDING]
    within = []

    @command
    def main(argv=None):
        within.extend(signal.getsignal(number) for number in ENDING)
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert not set(within) & set(before) and [signal.getsignal(number) for number in ENDING] == before


def test_what_was_set_within_for_longer_stays():
    """As a script ignores signals in its last steps."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with on_signals([signal.SIGTERM], lambda *_: None):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_only_the_main_thread_sets_handlers():
    before, within = signal.getsignal(signal.SIGTERM), []

    @command
    def main(argv=None):
        with on_signals([signal.SIGTERM], lambda *_: None):
            within.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    assert within == [before]
