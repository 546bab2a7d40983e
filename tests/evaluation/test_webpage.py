"""The page of compare.py: what is in it, and what it does in a browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import compare
from evaluation.webpage import Sample, axis, chosen
from tests.browser import MISSING, Browser
from tests.folders import sampled_and_scored

SAMPLES, SIDE = 6, 8
LABELS = [
    "full",
    '<b>quick</b> & "dirty" </script> with a label that is much longer than a phone\'s screen is wide',
    "odd",
]
# How far the samples of the second run are off, in levels: the order of the page is 4, 1, 5, ...
LEVELS = [1, 40, 5, 2, 90, 20]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two runs with images of the same noise and a third with images of other noise; the second switches at t = 299."""
    found = []
    base = np.random.default_rng(0).integers(60, 120, (SAMPLES, SIDE, SIDE), dtype=np.uint8)
    for number, label in enumerate(LABELS):
        folder = sampled_and_scored(tmp_path_factory.mktemp(f"run_{number}") / "samples", 10.0 + number, 0.01, 0)
        path = folder / "report" / "statistics.json"
        content = json.loads(path.read_text())
        content["settings"]["steps"] = 20 if label == "odd" else 50
        content["backbones"] = [{"name": "backbone", "checkpoint": "full.pth", "flops_per_image_call": 4e9}]
        if number == 1:
            content["stages"] = [{"network": 0, "t_min": 300, "t_max": 999}, {"network": 1, "t_min": 0, "t_max": 299}]
            shallow = {"name": "shallow", "checkpoint": "shallow.pth", "flops_per_image_call": 1e9}
            content["backbones"] = [shallow, content["backbones"][0] | {"name": "full"}]
        path.write_text(json.dumps(content))
        for index in range(SAMPLES):
            Image.fromarray(base[index] + number * LEVELS[index]).save(folder / f"{index:06d}.png")
        found.append(folder)
    return found


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("page")
    runs = [f"{label}={folder}" for label, folder in zip(LABELS, folders, strict=True)]
    compare.main([*runs, "--output", str(place / "x.png"), "--html", str(place / "page.html"), "--quiet"])
    return place / "page.html"


class Elements(HTMLParser):
    """The start tags of a page with their attributes."""

    def __init__(self, page: Path):
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def of(self, tag: str, of_class: str = "") -> list[dict[str, str]]:
        return [attrs for name, attrs in self.found if name == tag and of_class in ("", attrs.get("class"))]


def test_the_samples_are_in_the_page(page, folders):
    """The file's own pixels, those of one sample after those of the other, the most different first."""
    elements = Elements(page)
    images = [
        np.array(Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))))
        for image in elements.of("img")
        if image.get("src")
    ]
    order = sorted(range(SAMPLES), key=lambda index: -LEVELS[index])
    wanted = [np.array(Image.open(folder / f"{index:06d}.png")) for index in order for folder in folders]
    assert len(images) == len(wanted) and all(map(np.array_equal, images, wanted))
    assert [card["data-name"] for card in elements.of("article", "card")] == [f"sample {index}" for index in order]
    assert "(noise)" in page.read_text("utf-8"), "of the run in 20 steps"


def test_it_asks_for_nothing_else(page):
    text = page.read_text("utf-8")
    elements = Elements(page)
    addresses = [attrs[name] for _, attrs in elements.found for name in ("src", "href") if attrs.get(name)]
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    (policy,) = (attrs["content"] for attrs in elements.of("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")


def test_labels_are_no_markup(page):
    elements = Elements(page)
    assert not elements.of("b") and len(elements.of("script")) == 1
    assert any(LABELS[1] in image["alt"] for image in elements.of("img"))


def test_a_strip_shows_the_switch(page):
    """x: elapsed timesteps. The shallow network does a quarter of the work until 700 of them are over."""
    paths = [path["d"] for path in Elements(page).of("path")]
    height = 34
    assert paths[:3] == [
        f"M0 {height}V0.0H1000V{height}Z",
        f"M0 {height}V{0.75 * height:.1f}H700V{height}Z",
        f"M700 {height}V0.0H1000V{height}Z",
    ]


def test_early_exit_is_drawn_as_it_left(folders, tmp_path, fails):
    shutil.copytree(folders[0], tmp_path / "exits")
    layers = np.array([[0, 4], [5, 5]], dtype=np.int16)  # of 5 layers, at two timesteps
    np.savez(
        tmp_path / "exits" / "report" / "exits.npz",
        timesteps=np.array([999, 499]),
        exit_layer=layers,
        uncertainty=np.ones((2, 5)),
    )
    argv = [f"exits={tmp_path / 'exits'}", "--output", tmp_path / "x.png", "--html", tmp_path / "x.html"]
    compare.main([str(arg) for arg in argv])
    (path,) = (path["d"] for path in Elements(tmp_path / "x.html").of("path"))
    assert path == "M0 34H0V20.4H500V0.0H1000V34Z"  # 34 (1 - 2 / 5) = 20.4
    np.savez(tmp_path / "exits" / "report" / "exits.npz", timesteps=np.array([999, 499]))
    fails(compare.main, argv, "exits.npz", "not in the format of eesampler.py")


def test_few_samples_where_they_are_large(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.webpage.MOST_BYTES", 1)
    argv = [f"full={folders[0]}", f"quick={folders[1]}", "--output", tmp_path / "x.png", "--html", tmp_path / "x.html"]
    compare.main([str(arg) for arg in argv])
    assert [card["data-name"] for card in Elements(tmp_path / "x.html").of("article")] == ["sample 4"]
    monkeypatch.undo()
    compare.main([*map(str, argv), "--html_samples", "4"])
    assert len(Elements(tmp_path / "x.html").of("article")) == 4


def test_each_run_shows_its_worst():
    """One run's samples are all worse than any of another's; both show the two that are farthest off."""
    samples = [Sample(0, place, f"{place:06d}", {1: 5.0 + place, 2: 99.0 - place}, place + 1) for place in range(40)]
    found = [sample.place for sample in chosen(samples, 8)]
    assert {0, 1, 38, 39} <= set(found) and found == sorted(found) and len(found) == 8
    assert [sample.place for sample in chosen(samples, 99)] == list(range(40))
    without_pairs = [sample._replace(psnr={}, rank=None) for sample in samples]
    assert len(chosen(without_pairs, 8)) == 8


def test_an_axis_ends_where_the_values_end():
    place, ticks = axis([2.0, 10.0], 100, 0, margin=0.25)
    assert [place(0.0), place(12.0)] == pytest.approx([100, 0]) and place(6.0) == pytest.approx(50)
    assert ticks == sorted(ticks) and len(ticks) > 2 and min(ticks) >= 0 and max(ticks) <= 12
    place, ticks = axis([1.0, 100.0], 0, 100, log=True, margin=0.0)
    assert place(1.0) == pytest.approx(0) and place(10.0) - place(1.0) == pytest.approx(place(100.0) - place(10.0))
    assert {1.0, 10.0, 100.0} <= set(ticks)


def test_reports_that_sampler_py_did_not_write(folders, tmp_path, fails):
    shutil.copytree(folders[0], tmp_path / "run")
    path = tmp_path / "run" / "report" / "statistics.json"
    content = json.loads(path.read_text())
    argv = [f"run={tmp_path / 'run'}", "--output", tmp_path / "x.png", "--html", tmp_path / "x.html"]
    for stages in ([{"network": "a", "t_min": 0, "t_max": 9}], [{}], [], 3, [{"network": 0, "t_min": 5, "t_max": 1}]):
        path.write_text(json.dumps(content | {"stages": stages}))
        fails(compare.main, argv, "statistics.json", "not in the format of sampler.py")
    assert not (tmp_path / "x.html").exists()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if MISSING:
        pytest.skip(MISSING)
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


OWN = "document.querySelector('{} img').src === document.querySelector('{} img').src"
SECOND, FIRST = ".card:first-child .tile:nth-child(2)", ".card:first-child .tile:first-child"


@pytest.mark.slow
class TestInABrowser:
    @pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
    def test_it_loads_and_fits(self, browser, page, width, dark):
        browser.complaints.clear()
        browser.open(page, width, 844, dark=dark, phone=width < 500)
        assert browser.complaints == []
        assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.value("[...document.images].filter(i => i.closest('.tile')).every(i => i.naturalWidth === 8)")
        dark_paper = browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(18, 20, 24)"
        assert dark_paper == dark

    def test_a_tile_flips_under_the_mouse(self, browser, page):
        browser.open(page, 1280, 844)
        same = OWN.format(FIRST, SECOND)
        assert not browser.value(same)
        browser.pointer(SECOND)
        assert browser.value(same)
        browser.pointer("h1")
        assert not browser.value(same)

    def test_a_key_flips_all_tiles_to_the_chosen_run(self, browser, page):
        browser.open(page, 1280, 844)
        browser.value("document.getElementById('against').value = '1'")
        browser.key("f")
        assert browser.value(OWN.format(FIRST, SECOND)) and browser.value("document.getElementById('said').textContent")
        browser.key("f")
        assert not browser.value(OWN.format(FIRST, SECOND))

    @pytest.mark.parametrize("width", [1280, 390])
    def test_the_large_view(self, browser, page, width):
        browser.complaints.clear()
        browser.open(page, width, 844, phone=width < 500)
        browser.pointer(SECOND, click=True)
        assert browser.value("document.getElementById('view').open")
        large = "document.getElementById('view-image').src === document.querySelector('{} img').src"
        assert browser.value(large.format(SECOND)) and not browser.value(large.format(FIRST))
        browser.key(" ")
        assert browser.value(large.format(FIRST))
        browser.key("ArrowDown")
        second_card = ".card:nth-child(2) .tile:nth-child({})"
        assert browser.value(large.format(second_card.format(1))), "the flipped view stays so"
        browser.key(" ")
        assert browser.value(large.format(second_card.format(2)))
        browser.key("ArrowLeft")
        assert browser.value(large.format(second_card.format(1)))
        assert browser.value("document.getElementById('view-difference').hidden"), "of a run to itself"
        assert browser.value("document.documentElement.scrollWidth") <= width
        browser.pointer("#view-close", click=True)
        assert not browser.value("document.getElementById('view').open") and browser.complaints == []

    def test_the_order(self, browser, page):
        browser.open(page, 1280, 844)
        names = "[...document.querySelectorAll('.card')].map(c => c.dataset.name)"
        before = browser.value(names)
        browser.value(
            "(o => { o.value = 'index'; o.dispatchEvent(new Event('change')) })(document.getElementById('order'))"
        )
        assert before[0] == "sample 4" and browser.value(names) == [f"sample {index}" for index in range(SAMPLES)]


def test_a_label_of_bytes_outside_utf_8(folders, tmp_path):
    """Python holds such a byte of an argument as half of a surrogate pair, which no file of UTF-8 can hold."""
    label = os.fsdecode(b"r\xe9sum\xe9")
    runs = [f"{label}={folders[0]}", f"other={folders[1]}"]
    compare.main([*runs, "--output", str(tmp_path / "x.png"), "--html", str(tmp_path / "page.html"), "--quiet"])
    assert r"r\udce9sum\udce9" in (tmp_path / "page.html").read_text("utf-8")
