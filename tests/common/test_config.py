from __future__ import annotations

import pytest

from common.config import Config, check_types, contradictions, in_words
from common.errors import InputError
from diffusion.sampling import SwitchingDenoiser
from generation.record import setting_differences

MARKS = set("[]{}'") | {"None"}
NESTED = [[["x"] * 99] * 99] * 99


@pytest.mark.parametrize(
    "value, words",
    [
        (None, "none"),
        (True, "True"),
        (0.5, "0.5"),
        ("cosine", "cosine"),
        ("", "empty"),
        ([], "empty"),
        (["random"], "random"),
        ([3, 5, None], "3, 5, none"),
        ({"scale_factor": 0.5, "checkpoint_path": None}, "scale_factor 0.5, checkpoint_path none"),
        ([{"a": 1}, [2]], "a mapping, a list"),
        (10**400, "a huge number"),
    ],
)
def test_values_in_words(value, words):
    assert in_words(value) == words


@pytest.mark.parametrize("value", ["x" * 999, ["x" * 999] * 99, NESTED, {"x" * 999: NESTED}, dict.fromkeys(range(999))])
def test_words_are_few(value):
    assert len(in_words(value)) <= 80


def test_refusals_show_no_raw_values():
    one = {"class_id": ["random"], "autoencoder": None, "networks": [{"step": 1}], "t_switch": None}
    other = {"class_id": [3, 5], "autoencoder": {"scale_factor": 0.5}, "networks": [], "t_switch": 7}
    said = [*contradictions(one, other, none_counts=True), *setting_differences(one, other)]
    with pytest.raises(InputError) as refused:
        SwitchingDenoiser([len, len, len], [3, 5])
    said.append(str(refused.value))
    none = {"model_params": {"depth": None}}
    for wrong in (none, {"t_min": []}, {"model_params": 3}, {"crop": 5}, {"autoencoder": "x"}):
        with pytest.raises(InputError) as refused:
            check_types(Config, {"model_params": {}} | wrong, "net.yaml")
        said.append(str(refused.value))
    assert len(said) == 14
    for message in said:
        assert not any(mark in message.replace("'x'", "") for mark in MARKS), message
    assert "class_id (random and 3, 5)" in said and "class_id random, not 3, 5" in said
    assert "net.yaml: t_min is a list, wanted a whole number" in said


@pytest.mark.parametrize(
    "one, other, said",
    [(12, 13, []), (13, 12, []), (3, 5, ["depth (3 and 5)"]), (None, 5, ["depth (none and 5)"]), (None, None, [])],
)
def test_depths(one, other, said):
    assert contradictions({"depth": one}, {"depth": other}, none_counts=True) == said
