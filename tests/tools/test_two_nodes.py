"""Two torchrun agents, as on two machines with a shared file system, connected over loopback."""

import hashlib
import json
import socket
from collections import Counter

import pytest

from bissl_zoo.zoo import list_backbones

pytestmark = pytest.mark.slow
STAGES = ["pretrain", "head_warmup", "bissl", "finetune_pretrained", "finetune"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_nodes(process, *arguments):
    """Return the standard output and standard error of each agent."""
    port = str(free_port())
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    program = ["tools/train_net.py", "--config-file", "quickstart/digit_scenes_det.py", *arguments]
    nodes = [process("-m", "torch.distributed.run", *meeting, "--node-rank", str(rank), *program) for rank in range(2)]
    try:
        said = [node.communicate(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # an agent that is killed would leave its worker behind
    assert [node.returncode for node in nodes] == [0, 0], said
    return said


def test_two_nodes_train_all_stages_and_leave_one_run(process, tiny, tmp_path):
    run, zoo = tmp_path / "run", tmp_path / "zoo"
    (first, _), (second, _) = start_nodes(process, *tiny(train__publish__zoo=zoo), f"train.output_dir={run}")
    receipt = json.loads((run / "zoo_entry.json").read_text())
    assert [first.count(f"stage {n} of 5: {stage}") for n, stage in enumerate(STAGES, start=1)] == [1] * 5
    assert first.count(f"published {receipt['name']}") == first.count(f"sha256 {receipt['sha256']}") == 1
    assert second.strip() == ""
    # the published entry is in the zoo
    weights = zoo / receipt["name"] / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == receipt["sha256"]
    assert list_backbones(zoo=zoo) == [receipt["name"]]
    # one writer: no step twice, nothing half written
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "upper_step" not in record and "event" not in record]
    assert Counter((record["stage"], record["step"]) for record in steps) == {
        (stage, step): 1 for stage in STAGES for step in (1, 2)
    }
    assert len(list((run / "tensorboard").iterdir())) == len(STAGES)
    results = json.loads((run / "results.json").read_text())
    assert results.keys() == {"pretrained", "bissl"} and all("AP50" in figures for figures in results.values())
    assert not list(run.rglob(".*"))
