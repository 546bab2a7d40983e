"""The file that says which network runs when: what is written is read back, and what is wrong is named."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from generation.schedule_file import ScheduleFile, Stage, read_schedule, write_schedule

from common.errors import InputError

TWO = """
stages:
  - {checkpoint_path: shallow.pth, config_path: net.yaml, t_min: 400, t_max: 999, guidance_scale: 1}
  - {checkpoint_path: full.pth, t_min: 0, t_max: 399}
"""


@pytest.fixture
def place(tmp_path):
    for name in ("shallow.pth", "full.pth", "net.yaml"):
        (tmp_path / name).touch()
    return tmp_path


def read(place, text):
    (place / "s.yaml").write_text(text)
    return read_schedule(place / "s.yaml")


def test_a_file_is_read_from_wherever_it_lies(place, monkeypatch):
    monkeypatch.chdir(place.parent)
    schedule = read(place, TWO)
    assert schedule.switches == [399] and schedule.num_timesteps == 1000
    assert schedule.stages == [
        Stage(
            checkpoint_path=place / "shallow.pth",
            config_path=place / "net.yaml",
            t_min=400,
            t_max=999,
            guidance_scale=1.0,
        ),
        Stage(checkpoint_path=place / "full.pth", t_min=0, t_max=399),
    ]
    assert read(place, TWO.replace("full.pth", str(place / "full.pth"))) == schedule


def test_what_is_written_is_read_back(place, monkeypatch):
    """A network twice, paths from the working folder, and values that YAML would rather write as aliases."""
    monkeypatch.chdir(place)
    (place / "out").mkdir()
    steps = [999, 1e-5]
    stages = [
        dataclasses.replace(read(place, TWO).stages[k], t_min=t_min, t_max=t_max)
        for k, t_min, t_max in ((1, 700, 999), (0, 300, 699), (1, 0, 299))
    ]
    schedule = ScheduleFile(stages=stages, calibration={"solver": "ddim", "a": steps, "b": steps})
    write_schedule(place / "out" / "s.yaml", schedule)
    written = yaml.safe_load((place / "out" / "s.yaml").read_text())
    assert written["stages"][0] == {"checkpoint_path": "../full.pth", "t_min": 700, "t_max": 999}
    got = read_schedule(place / "out" / "s.yaml")
    assert [stage.checkpoint_path.resolve() for stage in got.stages] == [s.checkpoint_path for s in stages]
    assert got.calibration == schedule.calibration and got.switches == [699, 299]
    place.rename(place.parent / "moved")
    read_schedule(place.parent / "moved" / "out" / "s.yaml")


@pytest.mark.parametrize("t_switch", [-1, 19])
def test_one_network(t_switch, place):
    schedule = read(place, f"{{stages: [{{checkpoint_path: full.pth, t_min: 0, t_max: 19}}], t_switch: {t_switch}}}")
    assert schedule.switches == [] and schedule.num_timesteps == 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["section stages"]),
        ("stages: [", ["not readable as YAML"]),
        ("t_switch: 3", ["section stages"]),
        ("stages: []", ["no stages"]),
        ("stages: 3", ["section stages"]),
        ("stages: [3]", ["stages 1 is 3", "mapping"]),
        (TWO + "stagse: 1", ["unknown key stagse"]),
        (TWO.replace("config_path", "config"), ["stages 1: unknown key config"]),
        (TWO.replace("t_max: 399", ""), ["stages 2", "t_max not given"]),
        (TWO.replace("checkpoint_path: full.pth", "checkpoint_path: 3"), ["stages 2", "checkpoint_path is 3"]),
        (TWO.replace("t_min: 0", "t_min: a"), ["stages 2", "t_min is 'a'"]),
        (TWO.replace("t_min: 0", "t_min: -1"), ["t_min=-1"]),
        (TWO.replace("t_min: 0", "t_min: 1"), ["no network for t = 0..0"]),
        (TWO.replace("t_max: 399", "t_max: 398"), ["stages 1 and 2", "gap", "t_max=399, not 398"]),
        (TWO.replace("t_max: 399", "t_max: 400"), ["stages 1 and 2", "overlap"]),
        (TWO.replace("t_max: 999", "t_max: 300"), ["t_min=400, t_max=300"]),
        (TWO.replace("guidance_scale: 1", "guidance_scale: 1001"), ["guidance_scale=1001"]),
        (TWO.replace("guidance_scale: 1", "guidance_scale: .nan"), ["guidance_scale"]),
        (TWO.replace("full.pth", "none.pth"), ["stages 2", "none.pth: no such file"]),
        (TWO.replace("net.yaml", "."), ["stages 1", "config_path", "is a folder"]),
        (TWO + "t_switch: 400", ["t_switch=400"]),
        (TWO + "calibration: 3", ["calibration is 3"]),
    ],
)
def test_what_is_wrong_is_named(text, words, place):
    with pytest.raises(InputError) as caught:
        read(place, text)
    assert str(caught.value).startswith(f"{place / 's.yaml'}: ")
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_schedule(tmp_path / "s.yaml")
