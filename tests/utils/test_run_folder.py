"""Run folders: the lock, the description and its comparison, versions."""

import json
from pathlib import Path

import pytest

from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import RUN, claimed, differences, read_description, versions, write_description


def test_description_is_read_as_written(tmp_path: Path) -> None:
    assert read_description(tmp_path) == {}
    write_description(tmp_path, {"base": "x", "config": {"rank": 4}}, {"torch": "2"})
    assert read_description(tmp_path) == {"base": "x", "config": {"rank": 4}, "versions": {"torch": "2"}}


@pytest.mark.parametrize(("text", "message"), [("{", "cannot read"), ("[]", "does not describe a training")])
def test_damaged_description_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / RUN).write_text(text)
    with pytest.raises(SboraError, match=message):
        read_description(tmp_path)


def test_differences_have_both_values() -> None:
    before, now = {"base": "x", "config": {"rank": 4, "seed": 0}}, {"base": "x", "config": {"rank": 8, "seed": 0}}
    assert differences(before, now) == ["config.rank (4 there, 8 here)"]
    assert differences(before, json.loads(json.dumps(before))) == []


def test_claimed_folder_is_not_claimed_twice(tmp_path: Path) -> None:
    with claimed(tmp_path):
        with pytest.raises(SboraError, match="another training is running"), claimed(tmp_path):
            pass
        with claimed(tmp_path, writes=False):
            pass


def test_versions_include_libraries() -> None:
    assert {"sbora-diffusion", "python", "torch"} <= versions(["torch"]).keys()
