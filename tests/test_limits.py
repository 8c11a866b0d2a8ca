"""Whatever comes from others has a limit, which its error names and an environment variable sets."""

import json
import os

import pytest
from tiny_entries import publish_draft

from bissl_zoo.config import LazyConfig
from bissl_zoo.data.shards import ShardDataset, find_shards
from bissl_zoo.errors import BisslZooError, ConfigError
from bissl_zoo.limits import LIMITS, limit
from bissl_zoo.zoo.hub import Zoo

DOUBLING = {
    "lists": "a0: [1, 2]\n" + "".join(f"a{i}: ['${{a{i - 1}}}', '${{a{i - 1}}}']\n" for i in range(1, 36)),
    "texts": "a0: x\n" + "".join(f"a{i}: '${{a{i - 1}}}${{a{i - 1}}}'\n" for i in range(1, 36)),
    "relative": "s: {a0: x, " + ", ".join(f"a{i}: '${{.a{i - 1}}}${{.a{i - 1}}}'" for i in range(1, 36)) + "}\n",
    "selected": "a0: x\n" + "".join(f"a{i}: '${{oc.select:a{i - 1}}}${{oc.select:a{i - 1}}}'\n" for i in range(1, 36)),
}


@pytest.mark.parametrize("text", DOUBLING.values(), ids=DOUBLING)
def test_interpolations_that_multiply_are_counted_and_not_resolved(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="values after its interpolations; the limit is 100,000"):
        LazyConfig.load(path)


def test_an_interpolation_within_another_is_refused_and_circles_are_left_to_omegaconf(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: b\nb: 1\nc: '${${a}}'\n")
    with pytest.raises(ConfigError, match="write the key out"):
        LazyConfig.load(path)
    path.write_text("a: '${b}'\nb: '${a}'\n")
    assert LazyConfig.load(path)


@pytest.mark.parametrize(
    "urls", ["a-{0..999999999999}.tar", "{0..999}/{0..999}/{0..999}.tar", ["a-{0..999999}.tar"] * 2]
)
def test_the_addresses_of_shards_are_counted_before_they_are_listed(urls):
    with pytest.raises(BisslZooError, match="shards; the limit is 1,000,000"):
        find_shards(urls)


def a_large_config(folder, monkeypatch):
    (folder / "a.yaml").write_text("a: [1, 2, 3, 4, 5, 6, 7, 8]\n")
    LazyConfig.load(folder / "a.yaml")


def many_shards(folder, monkeypatch):
    find_shards(str(folder / "{0..3}.tar"))


def a_large_index_of_shards(folder, monkeypatch):
    (folder / "index.json").write_text(json.dumps({"format": 1, "shards": []}))
    ShardDataset(str(folder))


def entries(folder, monkeypatch):
    for seed in range(3):
        publish_draft(folder, seed=seed)
    return Zoo(folder).entries()


def read_config(folder, monkeypatch):
    publish_draft(folder)
    return Zoo(folder).find("tiny").text_file("train_config.yaml")


@pytest.mark.parametrize(
    "name, use",
    [
        ("CONFIG_VALUES", a_large_config),
        ("CONFIG_BYTES", a_large_config),
        ("SHARDS", many_shards),
        ("INDEX_BYTES", a_large_index_of_shards),
        ("INDEX_BYTES", entries),
        ("ENTRIES", entries),
        ("FILE_BYTES", entries),
        ("TEXT_BYTES", read_config),
    ],
)
def test_an_error_names_the_limit_and_the_variable_that_sets_it(tmp_path, monkeypatch, name, use):
    monkeypatch.setenv(f"BISSL_ZOO_MAX_{name}", "2")
    with pytest.raises(BisslZooError, match=rf"the limit is 2 \(BISSL_ZOO_MAX_{name} sets another\)"):
        use(tmp_path, monkeypatch)


def test_a_limit_is_a_whole_number(monkeypatch):
    assert limit("ENTRIES") == LIMITS["ENTRIES"]
    for text in ("many", "0", "-1", "1e9", ""):
        monkeypatch.setenv("BISSL_ZOO_MAX_ENTRIES", text)
        with pytest.raises(ConfigError, match="BISSL_ZOO_MAX_ENTRIES"):
            limit("ENTRIES")


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path):
    for name in ("config.yaml", "index.json", "a.tar"):
        os.mkfifo(tmp_path / name)
    for use in (
        lambda: LazyConfig.load(tmp_path / "config.yaml"),
        lambda: Zoo(tmp_path).entries(),
        lambda: ShardDataset(str(tmp_path)),
    ):
        with pytest.raises(BisslZooError, match="not a regular file"):
            use()
