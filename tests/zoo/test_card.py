import re

import pytest
import yaml

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.card import EntryMetadata, entry_facts, render_card

PARENT = "ab" * 32


def make_entry(**metadata):
    facts = entry_facts(
        EntryMetadata(
            **{
                "pretext": "byol",
                "task": "faster_rcnn",
                "solver": "cg",
                "shared_stage": "c4",
                "metrics": {"AP50": [0.25, 0.75], "AP": [0.125, 0.125]},
                "seeds": [3, 4],
                "datasets": {"pretext": "digits", "test": {"name": "voc|07", "images": 4952}},
                "ancestors": [{"name": "base@1", "sha256": PARENT}],
                "licence": "CC-BY-4.0",
                **metadata,
            }
        )
    )
    pixels = {"input_size": [3, 96, 80], "mean": [0.5, 0.25, 0.1], "std": [0.2, 0.2, 0.3], "channel_order": "RGB"}
    files = {"model.safetensors": {"sha256": "c" * 64, "size": 1234567}}
    return {"name": "mine", "architecture": "resnet50", "input": pixels, "files": files, **facts}


def test_the_card_states_every_fact_of_the_entry():
    card = render_card(make_entry())
    for fact in (
        "`resnet50`",
        "`byol`",
        "`faster_rcnn`",
        "`cg`",
        "`c4`",
        "| AP50 | 0.5 | 0.3536 | 0.25, 0.75 |",  # sample deviation of 0.25 and 0.75: 0.5 / sqrt(2)
        "| AP | 0.125 | 0 | 0.125, 0.125 |",
        "Seeds: 3, 4.",
        "| test | voc\\|07 | images: 4952 |",
        "3 x 96 x 80",
        "(0.5, 0.25, 0.1)",
        PARENT,
        "Licence: CC-BY-4.0.",
        "| `model.safetensors` | 1,234,567 | `" + "c" * 64 + "` |",
    ):
        assert fact in card


def test_the_front_matter_is_yaml_with_the_fields_of_a_model_hub():
    card = render_card(make_entry())
    front_matter = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    assert front_matter["license"] == "cc-by-4.0"
    assert front_matter["library_name"] == "timm"
    assert front_matter["pipeline_tag"] == "image-feature-extraction"
    assert {"timm", "bissl", "byol", "faster_rcnn"} <= set(front_matter["tags"])


def test_the_python_of_the_card_compiles_and_pins_the_version():
    for name, pinned in (("mine", "mine@1"), ("mine@2", "mine@2")):
        blocks = re.findall(r"```python\n(.*?)```", render_card({**make_entry(), "name": name}), re.DOTALL)
        assert len(blocks) == 2
        for block in blocks:
            compile(block, "card", "exec")
        assert f'create_backbone("{pinned}"' in blocks[0]
        assert f'"local-dir:path/to/{name}"' in blocks[1]


def test_what_an_entry_does_not_state_is_left_out():
    bare = dict.fromkeys(("pretext", "task", "solver", "shared_stage"))
    card = render_card(make_entry(**bare, ancestors=[], metrics={}, seeds=[], datasets={}, licence="unknown"))
    assert "None" not in card and "## Metrics" not in card and "## Data" not in card
    assert "Started from random weights." in card
    assert "Licence: unknown." in card


def test_every_table_has_as_many_cells_in_each_row():
    for line in render_card(make_entry(metrics={"a|b\nc": [1, 2]})).split("\n"):
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (4, 5)
    assert "| a\\|b c | 1.5 |" in render_card(make_entry(metrics={"a|b\nc": [1, 2]}))


def test_one_seed_has_no_deviation():
    assert entry_facts({"metrics": {"top1": 0.5}, "seeds": [0]})["metrics"]["top1"] == {
        "mean": 0.5,
        "std": None,
        "values": [0.5],
    }
    with pytest.raises(ZooError, match="one finite value per seed; it has \\[0.5\\] for the seeds \\[\\]"):
        entry_facts({"metrics": {"top1": 0.5}})


def test_facts_carry_versions_and_the_time_in_utc():
    facts = entry_facts({})
    assert set(facts["versions"]) == {"bissl_zoo", "torch", "timm", "python"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", facts["created"])
