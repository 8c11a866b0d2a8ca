"""The places of jobs: slots of this machine, and a Ray cluster."""

import sys

import pytest

from bissl_zoo.errors import ConfigError
from bissl_zoo.studies import places
from bissl_zoo.studies.jobs import run_jobs
from bissl_zoo.studies.places import Job


def test_each_slot_has_a_gpu_and_a_share_of_the_threads(monkeypatch):
    monkeypatch.setattr(places.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(places.torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def gpus(parallel):
        return [slot["CUDA_VISIBLE_DEVICES"] for slot in places.slots(parallel)]

    assert gpus(None) == ["0", "1"] and gpus(3) == ["0", "1", "0"]
    assert [slot["OMP_NUM_THREADS"] for slot in places.slots(3)] == ["2"] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-8932f937")
    assert gpus(None) == ["5", "GPU-8932f937"]
    monkeypatch.setattr(places.torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in places.slots()] == [None]


@pytest.fixture(scope="module")
def cluster():
    """Ray with two cores."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


@pytest.fixture
def short(tiny_config, at_scenes):
    def build(**changed):
        return tiny_config(**dict(train__stages="[finetune]", train__publish__name="null") | changed)

    return build


@pytest.mark.slow
def test_jobs_are_tasks_of_the_cluster_and_write_the_same_folders(cluster, short, tmp_path):
    diverging = short(optimizer__finetune="{_target_: torch.optim.SGD, lr: 1.0e+30}")
    long = short(finetune__steps=100000)

    def stop_if(job):
        return "seen enough" if (tmp_path / "runs" / "long" / "metrics.jsonl").exists() and job.name == "long" else None

    jobs = [Job("good", short()), Job("diverging", diverging), Job("long", long)]
    good, bad, stopped = run_jobs(jobs, tmp_path, engine="ray", stop_if=stop_if)
    assert good.status == "finished" and "AP50" in good.results["init"]
    assert (tmp_path / "runs" / "good" / "results.json").exists() and (tmp_path / "logs" / "good.log").exists()
    assert bad.status == "failed" and "finetune" in bad.message
    assert (stopped.status, stopped.message) == ("stopped", "seen enough")
    assert (tmp_path / "runs" / "long" / "checkpoints" / "latest").exists()
    assert cluster.is_initialized()

    [again] = run_jobs(jobs[:1], tmp_path, engine="ray")
    assert again.status == "finished" and not again.ran


def test_without_ray_the_extra_is_named(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "bissl_zoo\[ray\]"'):
        run_jobs([Job("a", tiny_config())], tmp_path, engine="ray")
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_does_not_answer_is_reported(tiny_config, tmp_path, monkeypatch):
    class Elsewhere:
        is_initialized = staticmethod(lambda: False)

        @staticmethod
        def init(**_):
            raise ConnectionError("no answer")

    monkeypatch.setitem(sys.modules, "ray", Elsewhere)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="No Ray cluster answers at RAY_ADDRESS=10.0.0.1:6379"):
        run_jobs([Job("a", tiny_config())], tmp_path, engine="ray")
