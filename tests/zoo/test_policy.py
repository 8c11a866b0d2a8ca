"""The config of a zoo entry sets what is listed, and nothing else."""

import copy
import functools

import pytest
from omegaconf import OmegaConf

from bissl_zoo.config import config_root, instantiate, load_config
from bissl_zoo.errors import ZooError
from bissl_zoo.zoo import policy
from bissl_zoo.zoo.policy import MAX_INT, USER_KEYS, restrict

REFERENCE = OmegaConf.to_container(load_config("common/train.py"))
SHIPPED = sorted(
    path.relative_to(config_root()).as_posix()
    for folder in ("bissl", "bissl_v2", "pretrain", "quickstart")
    for path in (config_root() / folder).glob("*.py")
)


@functools.cache
def loaded(name):
    return OmegaConf.to_container(load_config(name), resolve=True)


def plain(name="quickstart/digit_scenes_det.py"):
    return copy.deepcopy(loaded(name))


def changed(path, value, name="quickstart/digit_scenes_det.py"):
    cfg = plain(name)
    *parents, last = path.split(".")
    node = cfg
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return cfg


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_pass_but_for_locations(name):
    cfg = plain(name)
    taken, left = restrict(cfg, REFERENCE, "entry")
    local = {"root", "annotations", "images", "search", "overrides"}
    assert all(key in USER_KEYS or key.rpartition(".")[2] in local for key in left), left
    cfg["task"].pop("overrides", None)
    for section in ("pretext", "task", "solver", "optimizer", "lr_multiplier", "bilevel", "finetune", "pretrain"):
        assert taken.get(section) == cfg.get(section)


def test_locations_are_left_to_the_user():
    cfg = plain()
    stranger = {
        "output_dir": "/etc",
        "init": "zoo:evil",
        "zoo": "https://evil.example",
        "imports": ["evil.py"],
        "writers": ["json", "wandb"],
        "publish": {"name": "evil", "zoo": "https://evil.example", "licence": "MIT"},
    }
    cfg["train"] |= stranger
    dataset = {"_target_": "bissl_zoo.registry.build_dataset", "name": "image_folder", "root": "/home"}
    cfg["dataloader"]["train"]["dataset"] = dataset
    taken, left = restrict(cfg, REFERENCE, "entry")
    assert set(left) == {*(f"train.{key}" for key in stranger), "dataloader.train.dataset.root"}
    assert all(taken["train"][key] == REFERENCE["train"][key] for key in stranger)
    assert "evil" not in repr(taken) and "root" not in taken["dataloader"]["train"]["dataset"]


#: arguments of timm.create_model and of others that reach files, addresses or code
DANGEROUS = {
    "pretrained": True,
    "pretrained_cfg": {"url": "https://evil.example/a.bin"},
    "checkpoint_path": "/tmp/a.bin",
    "cache_dir": "tools",
    "norm_layer": {"_target_": "bissl_zoo.config.locate", "name": "os.system"},
    "act_layer": "os.system",
    "file": "a.pkl",
    "hf_hub_id": "evil/model",
    "__class__": "x",
    "self": 1,
}


@pytest.mark.parametrize("section", ["backbone", "pretext", "task", "solver"])
def test_arguments_that_are_not_listed_are_refused(section):
    for argument, value in DANGEROUS.items():
        with pytest.raises(ZooError, match=argument):
            restrict(changed(f"{section}.{argument}", value), REFERENCE, "entry")


TARGETS = [
    *("os.system", "builtins.eval", "subprocess.run", "pickle.loads", "torch.load", "torch.hub.load", "shutil.rmtree"),
    *("timm.create_model", "functools.partial", "webbrowser.open", "huggingface_hub.snapshot_download"),
    *("bissl_zoo.data.views.partial", "bissl_zoo.data.loaders.DataLoader", "bissl_zoo.config.locate"),
    *("bissl_zoo.registry.importlib.import_module", "bissl_zoo.registry.Registry", "bissl_zoo.files.write_atomically"),
    *("torch.optim.lr_scheduler.LambdaLR", "torch.optim.swa_utils.AveragedModel"),
    *("fvcore.common.param_scheduler.math.cos", "fvcore.common.file_io.PathManager.rm"),
    *("", "no_dots", " torch.optim.sgd.SGD", "torch.optim.sgd.sGD", {"_target_": "os.system"}, ["os.system"], 3, None),
]
PLACES = [
    *("backbone", "pretext.augmentation", "task", "optimizer.lower", "dataloader.train.dataset"),
    "lr_multiplier.lower.scheduler",
]


@pytest.mark.parametrize("place", PLACES)
def test_other_calls_are_refused_wherever_they_stand(place):
    for target in TARGETS if place == "optimizer.lower" else TARGETS[:3]:
        with pytest.raises(ZooError, match="refused"):
            restrict(changed(f"{place}._target_", target), REFERENCE, "entry")


VALUES = [
    *("../../etc/passwd", "/etc/passwd", "~/.ssh/id_rsa", "..", "file:///etc/passwd", "https://evil.example/x"),
    *("hf-hub:evil/model", "local-dir:evil", "zoo:evil", "${oc.env:HOME}", "${train.no.such.key}", "${train}"),
    *(
        "$(id)",
        "`id`",
        "a\nb",
        "a\x1b[31mb",
        "C:\\evil",
        "x" * 201,
        "",
        MAX_INT + 1,
        10**400,
        float("nan"),
        float("inf"),
    ),
    *(b"bytes", {"a": 1}, [["${x}"]], [{"_target_": "os.system"}]),
]


@pytest.mark.parametrize(
    "place",
    ["backbone.name", "task.min_size", "bilevel.hvp_mode", "optimizer.lower.lr", "dataloader.train.dataset.split"],
)
def test_values_that_are_no_plain_names_or_numbers_are_refused(place):
    for value in VALUES if place == "bilevel.hvp_mode" else VALUES[::5]:
        with pytest.raises(ZooError, match="refused|Unknown|names"):
            restrict(changed(place, value), REFERENCE, "entry")


@pytest.mark.parametrize("section", ["evil", "hydra", "_target_", "os", "imports"])
def test_sections_that_no_run_reads_are_left_out(section):
    taken, left = restrict({**plain(), section: {"_target_": "os.system"}}, REFERENCE, "entry")
    assert section in left and section not in taken


def test_a_call_among_plain_values_is_refused():
    with pytest.raises(ZooError, match="values only"):
        restrict(changed("bilevel.adaptation", {"_target_": "os.system"}), REFERENCE, "entry")


def test_sizes_are_bounded():
    deep = {"a": 1}
    for _ in range(20):
        deep = {"a": deep}
    with pytest.raises(ZooError, match="nested"):
        restrict({**plain(), "bilevel": deep}, REFERENCE, "entry")
    many = changed("task.anchor_sizes", [1] * (policy.MAX_VALUES + 1))
    with pytest.raises(ZooError, match="values"):
        restrict(many, REFERENCE, "entry")


def test_class_names_may_be_any_printable_text():
    cfg = changed("dataloader.train.dataset.classes", ["cup/glass", "Straße", "a: b"], "bissl/voc_det.py")
    assert restrict(cfg, REFERENCE, "entry")[0]["dataloader"]["train"]["dataset"]["classes"][1] == "Straße"
    for bad in (["a\x1b[2J"], ["x" * 201]):
        cfg["dataloader"]["train"]["dataset"]["classes"] = bad
        with pytest.raises(ZooError, match="printable"):
            restrict(cfg, REFERENCE, "entry")


def test_the_input_is_not_changed_and_the_result_builds():
    cfg = plain()
    before = copy.deepcopy(cfg)
    taken, _ = restrict(cfg, REFERENCE, "entry")
    assert cfg == before
    assert instantiate(OmegaConf.create(taken).solver)


def test_a_reference_to_a_single_value_is_replaced_by_it():
    cfg = OmegaConf.to_container(load_config("quickstart/digit_scenes_det.py"))
    cfg["optimizer"]["head_warmup"]["lr"] = "${optimizer.upper.lr}"
    taken, _ = restrict(cfg, REFERENCE, "entry")
    assert taken["optimizer"]["head_warmup"]["lr"] == cfg["optimizer"]["upper"]["lr"]
