import hashlib
import os

import pytest

from bissl_zoo.files import is_sha256, read_json, replacing, sha256_of, write_atomically


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_atomically(path, "first")
    write_atomically(path, "zweite ü".encode())
    assert path.read_text(encoding="utf-8") == "zweite ü"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(content := os.urandom((1 << 20) + 3))
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("value, expected", [("0" * 64, True), ("A" * 64, False), ("0" * 63, False), (3, False)])
def test_sha256_is_64_lower_case_hex_digits(value, expected):
    assert is_sha256(value) is expected


def test_a_json_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, "ü"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, "ü"]}


@pytest.mark.parametrize(
    "content, words",
    [
        (b"{", "Expecting"),
        (b"[1]", "list"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b"[" * 200_000, "nested"),
        (b'{"a": 1}' + b" " * 100, "100 bytes"),
    ],
)
def test_other_json_is_a_value_error(tmp_path, content, words):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_json(tmp_path / "a.json", limit=100 if "bytes" in words else 1 << 20)


def test_a_fifo_is_refused_and_a_missing_file_is_not_found(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
