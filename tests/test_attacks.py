"""Soak: hostile configs of entries, and mutations of every file of a run and of an entry; counts are printed.

Every attack must end in a BisslZooError of one or two lines, which names the file, or in the right result: no traceback
of another kind, no hang, no program started, no file written elsewhere, no other weights. BISSL_ZOO_MUTATIONS sets how
many per file, BISSL_ZOO_SEED which.
"""

import copy
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hostile_input import TEXTS, time_limit, watched
from omegaconf import OmegaConf
from tiny_entries import replace_file

from bissl_zoo import load_model
from bissl_zoo.config import load_config
from bissl_zoo.config.arguments import CALLS, PARTS, USER_ARGS, VALUES, argument_problems, arguments_of
from bissl_zoo.engine.checks import check_config
from bissl_zoo.engine.evaluate import read_details
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.publishing import published
from bissl_zoo.errors import BisslZooError
from bissl_zoo.runs.directory import load_run_config, read_metadata, read_results
from bissl_zoo.runs.listing import look_at, run_page
from bissl_zoo.zoo import create_backbone, get_config, get_entry, load_entry_weights
from bissl_zoo.zoo.hub import Zoo
from bissl_zoo.zoo.policy import USER_KEYS, restrict

pytestmark = pytest.mark.soak
MUTATIONS = int(os.environ.get("BISSL_ZOO_MUTATIONS", 60))
SEED = int(os.environ.get("BISSL_ZOO_SEED", 0))
REFERENCE = OmegaConf.to_container(load_config("common/train.py"))
CALL = {"_target_": "os.system", "command": "touch canary"}
#: no domain but that of any text accepts one of these, and none of the texts is a name that exists
BANK = [
    *TEXTS,
    -1,
    2**70,
    -1e-9,
    float("nan"),
    float("inf"),
    "fast",
    "hf-hub:evil/x",
    "zoo:evil",
    "https://evil/x",
    CALL,
]
BANK += [[CALL], {"a": {"b": [CALL]}}, [0, 0], [-1], True, b"bytes", "$(id)", "a\nb", [["x" * 300]]]
#: arguments of the libraries below the parts that reach files, addresses or code
DANGEROUS = """pretrained pretrained_cfg pretrained_cfg_overlay checkpoint_path cache_dir hf_hub_id norm_layer act_layer
features_only scriptable exportable block_fn __class__ __init__ self args kwargs file url weights root map_location
opener transform collate_fn worker_init_fn multiprocessing_context params hook callback device dtype""".split()
TARGETS = """os.system builtins.eval builtins.exec subprocess.run pickle.loads torch.load torch.hub.load shutil.rmtree
timm.create_model functools.partial bissl_zoo.data.views.partial bissl_zoo.config.locate bissl_zoo.files.replacing
bissl_zoo.registry.importlib.import_module torch.optim.swa_utils.AveragedModel posix.system runpy.run_path""".split()


@pytest.fixture(autouse=True)
def temporary_files(tmp_path, monkeypatch):
    """Let temporary files of the library be written to the folder that may be written to."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def places(node, path=()):
    """Yield the paths of all described calls of a plain config."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path
        for name, value in node.items():
            yield from places(value, (*path, name))


def put(cfg, path, value):
    changed = copy.deepcopy(cfg)
    node = changed
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return changed


def at(cfg, path):
    for part in path:
        cfg = cfg[part]
    return cfg


def hostile_configs():
    """Yield configs of entries with one value each that must be refused, and where it is."""
    for name in ("quickstart/digit_scenes_det.py", "bissl/voc_det_byol.py", "pretrain/moco_v2_imagenet.py"):
        base = OmegaConf.to_container(load_config(name), resolve=True)
        for path in places(base):
            call = at(base, path)
            for argument, domain in (arguments_of(call) or {}).items():
                for value in BANK:
                    if domain.problem(value) and argument != "name":
                        yield put(base, (*path, argument), value), (*path, argument)
            for argument in DANGEROUS:
                if argument not in USER_ARGS.get(call["_target_"], ()):
                    yield put(base, (*path, argument), "x"), (*path, argument)
            for target in TARGETS:
                yield put(base, (*path, "_target_"), target), path
        for key, domain in VALUES.items():
            path = tuple(key.split("."))
            if isinstance(at(base, path[:-1]), dict):
                yield from ((put(base, path, value), path) for value in BANK if domain.problem(value))


def test_every_hostile_config_is_refused_and_nothing_runs(tmp_path):
    count, accepted = 0, []
    for cfg, where in hostile_configs():
        count += 1
        with watched(tmp_path), time_limit(20):
            try:
                taken, left = restrict(cfg, REFERENCE, "entry")
                if problems := argument_problems(taken):
                    raise BisslZooError(problems[0])
                check_config(OmegaConf.create(taken), "entry")
            except BisslZooError as error:
                assert 0 < len(str(error)) < 3000
                continue
        # what only the user sets is ignored
        if ".".join(map(str, where)) not in left:
            accepted.append((where, at(cfg, where)))
    print(f"\nhostile configs: {count} tried, {count - len(accepted)} refused or ignored, {len(accepted)} accepted")
    assert not accepted, accepted[:10]
    assert count >= 200 and not Path("canary").exists()


def test_what_only_the_user_sets_never_comes_from_an_entry():
    base = OmegaConf.to_container(load_config("quickstart/digit_scenes_det.py"), resolve=True)
    for key in USER_KEYS:
        for value in BANK:
            path = tuple(key.split("."))
            try:
                taken, _ = restrict(put(base, path, value), REFERENCE, "entry")
            except BisslZooError:
                continue
            assert at(taken, path) == at(REFERENCE, path)
    assert set(PARTS) & set(CALLS) == set()


def mutate(rng, content, others):
    """Return a mutation of the bytes of a file."""
    kind = rng.randrange(9)
    start = rng.randrange(len(content) + 1)
    end = min(len(content), start + rng.choice([1, 1, 4, 64, 5000]))
    if kind == 0:
        return b""
    if kind == 1:
        return content[:start]
    if kind == 2:
        return content[:start] + content[end:]
    if kind == 3:
        return content[:start] + content[start:end] * 3 + content[end:]
    if kind == 4:
        return content[:start] + rng.randbytes(end - start) + content[end:]
    if kind == 5:
        return rng.choice(others)
    if kind == 6:
        return content.replace(b"1", rng.choice([b"-1", b"9" * 30, b'"x"', b"null", b"[[]]", b"NaN"]), 1 + start % 3)
    if kind == 7:
        return content.replace(b"a", rng.choice([b"\x1b[2J", b"../", b"\xff", b"${a}"]), 1 + start % 3)
    flipped = bytearray(content)
    for _ in range(rng.choice([1, 3])):
        if flipped:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


class Attack:
    """Readers of a folder, each with a check of what it returns."""

    def __init__(self, allowed):
        self.allowed, self.refused, self.same, self.names = allowed, 0, 0, ()

    def read(self, use, check=lambda result: True):
        with watched(self.allowed), time_limit(120):
            try:
                result = use()
            except BisslZooError as error:
                text = str(error)
                assert 0 < len(text) < 1000 and text.count("\n") < 2 and any(n in text for n in self.names), text
                self.refused += 1
                return
        assert check(result)
        self.same += 1


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], value) for key, value in second.items())


def test_a_mutation_of_any_file_of_a_run_never_brings_other_weights(finished, tmp_path, tiny_config):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    cfg, rng, attack = tiny_config(train__init=run), random.Random(SEED), Attack(tmp_path)
    whole = load_init(str(run), cfg)[0].backbone
    model = load_model(run).backbone.state_dict()
    paths = sorted(p for p in run.rglob("*") if p.is_file() and "tensorboard" not in p.parts)
    others = [path.read_bytes() for path in paths if path.stat().st_size < 100_000]
    count = 0
    for path in paths:
        content, attack.names = path.read_bytes(), (path.name, f"{path.parent.parent.name}/step_")
        for number in range(MUTATIONS):
            count += 1
            if number == 0:
                path.unlink()
            elif number == 1:
                path.unlink(missing_ok=True)
                os.mkfifo(path)
            else:
                path.write_bytes(mutate(rng, content, others))
            for use in (read_metadata, read_results, read_details, load_run_config, published):
                attack.read(lambda use=use: use(run))
            attack.read(lambda: run_page(look_at(run, verified=True)))
            attack.read(lambda: load_init(str(run), cfg)[0].backbone, lambda weights: equal(weights, whole))
            if "model" in path.parts:
                attack.read(lambda: load_model(run).backbone.state_dict(), lambda weights: equal(weights, model))
            if number == 1:
                path.unlink()
        path.write_bytes(content)
    print(f"\nrun: {count} mutations of {len(paths)} files, {attack.refused} reads refused, {attack.same} right")
    assert equal(load_init(str(run), cfg)[0].backbone, whole)


@pytest.mark.parametrize("vouched", [False, True], ids=["with the old digest", "with a right digest"])
def test_a_mutation_of_any_file_of_an_entry_never_brings_other_weights(finished, tiny, tmp_path, vouched):
    source = next(Path(value.partition("=")[2]) for value in tiny() if value.startswith("train.publish.zoo="))
    zoo = Path(shutil.copytree(source, tmp_path / "zoo"))
    rng, attack = random.Random(2 * SEED + vouched), Attack(tmp_path)
    name = sorted(Zoo(zoo).entries())[0]
    whole = create_backbone(name, zoo=zoo).state_dict()
    index = (zoo / "index.json").read_bytes()
    paths = [p for p in sorted((zoo / name).iterdir()) if p.is_file()] + ([] if vouched else [zoo / "index.json"])
    others = [path.read_bytes() for path in paths if path.stat().st_size < 100_000]
    count = 0
    for path in paths:
        content, attack.names = path.read_bytes(), (path.name, name)
        trusted = vouched and path.suffix == ".safetensors"  # whoever writes the index may publish any weights
        for number in range(MUTATIONS if path.parent == zoo / name else 5 * MUTATIONS):
            count += 1
            path.unlink(missing_ok=True)
            if number == 0:
                os.mkfifo(path)
            elif vouched:
                replace_file(zoo, name, path.name, mutate(rng, content, others))
            elif number > 1:
                path.write_bytes(mutate(rng, content, others))
            same = (lambda weights: True) if trusted else (lambda weights: equal(weights, whole))
            attack.read(lambda: create_backbone(name, zoo=zoo).state_dict(), same)
            for use in (get_config, get_entry):
                attack.read(lambda use=use: use(name, zoo=zoo))
            attack.read(lambda: load_entry_weights(name, "pretext_head.safetensors", zoo=zoo))
            attack.read(lambda: Zoo(zoo).find(name).text_file("README.md").read_bytes())
            if path.name.startswith("task_model"):
                attack.read(lambda: load_model(name, zoo=zoo))
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        (zoo / "index.json").write_bytes(index)
    print(f"\nentry: {count} mutations of {len(paths)} files, {attack.refused} reads refused, {attack.same} right")
    assert equal(create_backbone(name, zoo=zoo).state_dict(), whole)
    assert json.loads(index)["entries"][name]
