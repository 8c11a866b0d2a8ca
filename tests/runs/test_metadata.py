import json

import pytest

from bissl_zoo.errors import CheckpointError
from bissl_zoo.runs.metadata import add_wall_time, read_facts

FACTS = {
    "datasets": {"train": {"name": "a", "samples": 3}},
    "ancestors": [{"name": "a@1", "sha256": "0" * 64}],
    "hardware": "CPU",
    "wall_time_s": 1.5,
}


def test_facts_come_back_and_count_the_time_of_every_process(tmp_path):
    assert read_facts(tmp_path) == {}
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    assert read_facts(tmp_path) == FACTS
    add_wall_time(tmp_path, 2.25)
    assert read_facts(tmp_path)["wall_time_s"] == 3.8


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "cannot be read"),
        (b"\x80", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"hardware": "\\ud800"}', "cannot be read"),
        (b'{"hardware": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"[]", "holds list, not a JSON object"),
        ({"datasets": ["a"]}, "'datasets' that are not an object of objects"),
        ({"datasets": {"train": "a"}}, "'datasets' that are not an object of objects"),
        ({"ancestors": "a"}, "'ancestors' that are not a list"),
        ({"ancestors": [{"name": "a"}]}, "'ancestors' that are not a list"),
        ({"hardware": 3}, "a 'hardware' that is not text"),
        ({"wall_time_s": "1"}, "a 'wall_time_s' that is not a number"),
        ({"wall_time_s": True}, "a 'wall_time_s' that is not a number"),
        ({"wall_time_s": float("nan")}, "a 'wall_time_s' that is not a number"),
    ],
)
def test_facts_that_lie_are_one_error(tmp_path, content, problem):
    path = tmp_path / "facts.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(FACTS | content).encode())
    with pytest.raises(CheckpointError, match=f"facts.json .*{problem}.*Restore the file from a copy"):
        read_facts(tmp_path)


def test_facts_beyond_all_measure_or_no_file_are_not_read(tmp_path):
    (tmp_path / "facts.json").touch()
    with open(tmp_path / "facts.json", "r+b") as file:
        file.truncate(100 << 20)
    with pytest.raises(CheckpointError, match="more than 16,777,216 bytes"):
        read_facts(tmp_path)
    (tmp_path / "facts.json").unlink()
    (tmp_path / "facts.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: it is no file"):
        read_facts(tmp_path)
