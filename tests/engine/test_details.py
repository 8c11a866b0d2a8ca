"""Metrics by class that a run keeps: from the evaluators, written and read back."""

import pytest
import torch

from bissl_zoo.engine.evaluate import DETAILS_FILE, Details, details_of, read_details, write_details
from bissl_zoo.errors import CheckpointError
from bissl_zoo.evaluation import TopKEvaluator


@pytest.mark.parametrize(
    "content",
    ["[]", '{"a": 1}', '{"a": {"per_class": {"x": 1}}}', '{"a": {"per_class": {"x": {"AP": 2}}}}',
     '{"a": {"classes": ["x"], "confusion": [[1, 2]]}}', '{"a": {"classes": ["x"], "confusion": [["1"]]}}',
     '{"a": {"classes": [1], "confusion": [[1]]}}', "{", "[" * 9999,
     '{"a": {"seconds": -1}}', '{"a": {"seconds": "1"}}', '{"a": {"seconds": NaN}}', '{"a": {"seconds": 1e300}}'],
)  # fmt: skip
def test_a_file_with_other_contents_is_refused(tmp_path, content):
    (tmp_path / DETAILS_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=DETAILS_FILE):
        read_details(tmp_path)


def test_details_are_those_of_the_evaluator():
    generator = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(40, 3, generator=generator), torch.randint(3, (40,), generator=generator)
    evaluator = TopKEvaluator(["a", "b", "c"])
    evaluator.process(scores, targets)
    details = details_of(evaluator)
    assert details.confusion == evaluator.confusion().tolist() and sum(map(sum, details.confusion)) == 40
    assert details.per_class == evaluator.per_class() and details.seconds == 0


def test_details_are_read_as_they_were_written(tmp_path):
    one = Details({"a": {"top1": 0.5}}, ["a", "b"], [[1, 2], [3, 4]], 2.5)
    details = {"bissl": one, "x": Details()}
    write_details(tmp_path, details)
    assert read_details(tmp_path) == details
    assert read_details(tmp_path / "none") == {}
