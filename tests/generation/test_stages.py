"""The file that says which network runs when: what is written is read back, and what is wrong is named."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from common.errors import InputError
from generation.settings import SamplerSettings
from generation.stages import StageEntry, StageFile, plan_of, read_stages, write_stages

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
    return read_stages(place / "s.yaml")


def test_a_file_is_read_from_wherever_it_lies(place, monkeypatch):
    monkeypatch.chdir(place.parent)
    content = read(place, TWO)
    assert content.stages == (
        StageEntry(
            checkpoint_path=place / "shallow.pth",
            config_path=place / "net.yaml",
            t_min=400,
            t_max=999,
            guidance_scale=1.0,
        ),
        StageEntry(checkpoint_path=place / "full.pth", t_min=0, t_max=399),
    )
    assert read(place, TWO.replace("full.pth", str(place / "full.pth"))) == content


def plan(path, **flags):
    return plan_of(SamplerSettings(stages=path, output_folder=path.parent / "s", **flags))


def test_the_plan_of_a_file(place):
    """The run's own scale where a stage has none, and a network that runs twice is one network."""
    (place / "s.yaml").write_text(TWO)
    found = plan(place / "s.yaml", guidance_scale=0.25)
    assert found.files == [(place / "shallow.pth", place / "net.yaml"), (place / "full.pth", None)]
    assert found.lowest == [400, 0] and found.num_timesteps == 1000 and found.names == ["shallow", "full"]
    first = {"network": 0, "t_min": 400, "t_max": 999, "guidance_scale": 1.0}
    assert found.described(1000) == [first, {"network": 1, "t_min": 0, "t_max": 399, "guidance_scale": 0.25}]
    again = "  - {checkpoint_path: shallow.pth, config_path: net.yaml, t_min: 0, t_max: 99}\n"
    (place / "s.yaml").write_text(TWO.replace("t_min: 0", "t_min: 100") + again)
    found = plan(place / "s.yaml")
    assert [stage.network for stage in found.stages] == [0, 1, 0] and len(found.files) == 2
    assert found.names == ["network 1", "network 2"]


def test_the_plan_of_flags_is_that_of_the_file_that_says_the_same(place):
    (place / "s.yaml").write_text(TWO.replace("t_min: 400", "t_min: 300").replace("399", "299"))
    of_file = plan(place / "s.yaml", guidance_scale=2.0)
    of_flags = plan_of(
        SamplerSettings(
            checkpoint_path=place / "shallow.pth",
            config_path=place / "net.yaml",
            checkpoint_path_late=place / "full.pth",
            t_switch=299,
            guidance_scale=1.0,
            guidance_scale_late=2.0,
            output_folder=place / "s",
        )
    )
    assert of_flags.described(1000) == of_file.described(1000) and of_flags.files == of_file.files


def test_what_is_written_is_read_back(place, monkeypatch):
    """A network twice, paths from the working folder, and values that YAML would rather write as aliases."""
    monkeypatch.chdir(place)
    (place / "out").mkdir()
    steps = [999, 1e-5]
    stages = [
        dataclasses.replace(read(place, TWO).stages[k], t_min=t_min, t_max=t_max)
        for k, t_min, t_max in ((1, 700, 999), (0, 300, 699), (1, 0, 299))
    ]
    content = StageFile(stages=tuple(stages), calibration={"solver": "ddim", "a": steps, "b": steps})
    write_stages(place / "out" / "s.yaml", content)
    written = yaml.safe_load((place / "out" / "s.yaml").read_text())
    assert written["stages"][0] == {"checkpoint_path": "../full.pth", "t_min": 700, "t_max": 999}
    got = read_stages(place / "out" / "s.yaml")
    assert [stage.checkpoint_path.resolve() for stage in got.stages] == [s.checkpoint_path for s in stages]
    assert got.calibration == content.calibration and [stage.t_min for stage in got.stages] == [700, 300, 0]
    place.rename(place.parent / "moved")
    read_stages(place.parent / "moved" / "out" / "s.yaml")


@pytest.mark.parametrize("t_switch", [-1, 19])
def test_one_network(t_switch, place):
    content = read(place, f"{{stages: [{{checkpoint_path: full.pth, t_min: 0, t_max: 19}}], t_switch: {t_switch}}}")
    assert content.t_switch == t_switch
    found = plan(place / "s.yaml")
    assert found.lowest == [0] and found.num_timesteps == 20 and found.names == ["backbone"]


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
        read_stages(tmp_path / "s.yaml")
