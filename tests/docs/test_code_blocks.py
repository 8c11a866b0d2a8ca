"""Every Python and bash block of the READMEs, docs/ and examples/ runs, with small data and short schedules.

A block that needs a GPU, the network or a cluster is marked in the page by `<!-- test: needs network -->` above it. It
is checked for syntax, and for scripts, options, configs and keys that exist.
"""

import contextlib
import functools
import io
import itertools
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from command_line import load_tool, temporary_registrations
from doc_blocks import REPOSITORY, Block, blocks, check_options, commands, is_config, pages, tool_of
from page_data import scenes_as_coco, scenes_as_voc
from PIL import Image

from bissl_zoo.config import load_config
from bissl_zoo.data.datasets.voc import VOC_CLASSES

with_files = runpy.run_path(str(REPOSITORY / "docs" / "include_files.py"))["with_files"]
PAGES = pages()
BLOCKS = {page.relative_to(REPOSITORY).as_posix(): blocks(page) for page in PAGES}
#: imports that the text of a page has introduced
QUICKSTART = "from .configs.quickstart.digit_scenes_det import *\nfrom .configs.common.compare import compare\n"
FRAGMENT = (
    "from bissl_zoo.config import LazyCall as L\n"
    "from bissl_zoo.data.loaders import build_test_loader, build_train_loader\n"
    "from bissl_zoo.registry import build_dataset\n"
)
#: tools without a short run -> the test that runs them
RUN_ELSEWHERE = {
    "search": "tests/tools/test_search_tool.py",
    "check": "tests/tools/test_check_hypergradient.py",
    "analyze": "tests/tools/test_analyze_model.py",
}
#: commands that do not return
UNTESTED = {"tensorboard"}
#: arguments of the digit scenes that the fixture `scenes` writes
SCENES = {"image_size": 64, "unlabeled": 24, "train": 16, "val": 1, "test": 8}
RUNS = ("quickstart", "a", "b", "digits", "mine", "segmentation")
#: entries that the commands of the pages publish
ENTRIES = {
    "resnet18.simclr_bissl_digit_scenes",
    "resnet18.rotation_bissl_digit_scenes",
    "resnet18.simclr_bissl_digits",
    "resnet18.simclr_bissl_mine",
}


@pytest.fixture(scope="module")
def data(scenes, tmp_path_factory):
    """Return a datasets root with a small version of every data set of the pages."""
    root = tmp_path_factory.mktemp("data")
    for folder in scenes.iterdir():
        (root / folder.name).symlink_to(folder)
    scenes_as_voc(scenes, root, ("VOC2007", "VOC2012"), VOC_CLASSES)
    for name in ("cells", "mine", "bccd_voc"):
        scenes_as_voc(scenes, root / name)
    scenes_as_coco(scenes, root / "street")
    unlabelled = root / "mine" / "unlabelled"
    unlabelled.mkdir()
    sets = itertools.product(("clothes", "clothing10"), ("train", "test"), ("shirt", "shoe"))
    for name in ("imagenet/train/n01", *map("/".join, sets)):
        (root / name).mkdir(parents=True)
        for number in range(2):
            Image.effect_noise((64, 64), 40 + number).convert("RGB").save(root / name / f"{number}.jpg")
            shutil.copy(root / name / f"{number}.jpg", unlabelled)
    pack = ["--to-shards", str(root / "imagenet"), "--out", str(root / "imagenet-shards"), "--samples-per-shard", "1"]
    assert load_tool("data").cli(pack) == 0
    return root


@pytest.fixture(scope="module")
def checkout(finished, tiny, data, tmp_path_factory):
    """Return a copy of the checkout after the quickstart, with its run, its zoo and the configs of the pages."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "tools", "benchmarks", "bissl_zoo"):
        (root / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "examples", root / "examples")
    published = next(Path(o.split("=")[1]) for o in tiny() if o.startswith("train.publish.zoo="))
    shutil.copytree(published, root / "model_zoo")
    shutil.copytree(published, root / "zoo")
    for run in RUNS:
        shutil.copytree(finished, root / "runs" / run)
        saved = root / "runs" / run / "config.yaml"
        saved.write_text(saved.read_text().replace(str(finished), f"runs/{run}"))
    for name in ENTRIES:
        run_tool("zoo", ["publish", str(finished), "--zoo", str(root / "model_zoo"), "--name", name])
    (root / "my.py").write_text(QUICKSTART)
    (root / "photos").mkdir()
    for name in ("photo.jpg", "photos/a.jpg", "photos/b.jpg"):
        Image.effect_noise((96, 96), 60).convert("RGB").save(root / name)
    for block in itertools.chain(*BLOCKS.values()):
        name = re.match(r"# (\w+\.py)\n", block.code) if block.language == "python" else None
        if name:
            (root / name.group(1)).write_text(block.code)
    return root


@pytest.fixture
def reader(checkout, data, monkeypatch):
    """Change to the working directory and the environment of a reader."""
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(data))
    monkeypatch.setenv("BISSL_ZOO", str(checkout / "model_zoo"))
    monkeypatch.syspath_prepend(str(checkout))
    return checkout


def run_tool(name: str, arguments: list[str]) -> str:
    """Run a command of bissl, which must succeed, and return what it prints."""
    module, out, err = load_tool(name), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = module.cli(arguments)
    assert status == 0, f"{name} {arguments}: {out.getvalue()}{err.getvalue()}"
    return out.getvalue()


def small(config: str) -> list[str]:
    """Return overrides that shrink the data of a config and disable loader workers."""
    overrides = []
    for role, loader in load_config(config).get("dataloader", {}).items():
        overrides.append(f"dataloader.{role}.num_workers=0")
        if loader.dataset.name == "digit_scenes":
            added = {key: "" if key in loader.dataset else "+" for key in SCENES}
            overrides += [f"{plus}dataloader.{role}.dataset.{key}={SCENES[key]}" for key, plus in added.items()]
    return overrides


def train_net(arguments: list[str], root: Path) -> None:
    """Resume or evaluate a run that exists; otherwise do a dry run."""
    config = arguments[arguments.index("--config-file") + 1]
    if "--eval-only" in arguments:
        run = next(a.split("=")[1] for a in arguments if a.startswith("train.init="))
        run_tool("train", ["--config-file", f"{run}/config.yaml", "--eval-only", f"train.init={run}"])
    elif "--resume" in arguments and (root / config).is_file():
        run_tool("train", arguments)
    else:
        dry = [a for a in arguments if a not in ("--auto-resume", "--resume", "--dry-run")]
        dry = re.sub(r"--num-gpus \d+", "", "\0".join(dry).replace("--num-gpus\0", "--num-gpus ")).split("\0")
        dry_run(root, config, *filter(None, dry))


@functools.cache  # pages repeat commands
def dry_run(root: Path, config: str, *arguments: str) -> None:
    made = [] if config.startswith(("zoo:", "runs/")) else small(config)
    output = run_tool("train", [*arguments, "--dry-run", *made])
    assert "stages" in output and "parameters" in output


def compare(arguments: list[str]) -> list[str]:
    config = arguments[arguments.index("--config-file") + 1]
    return [*(a for a in arguments if a != "--dry-run"), "--dry-run", *small(config)]


def visualize(arguments: list[str]) -> list[str]:
    config = arguments[arguments.index("--config-file") + 1] if "--config-file" in arguments else None
    return [*arguments, "--images", "4", *(small(config) if config else [])]


def report(arguments: list[str]) -> list[str]:
    return [*arguments, "--files-only"]


SHORT = {"compare": compare, "visualize": visualize, "report": report}


def run_command(words: list[str], root: Path, data: Path) -> None:
    words = [re.sub(r"(?<![\w:/.])/data\b", str(data), word) for word in words]
    if tool := tool_of(words):
        name, arguments = tool
        if name in RUN_ELSEWHERE:
            assert (REPOSITORY / RUN_ELSEWHERE[name]).is_file()
            check_options(load_tool(name), arguments)
        elif name == "train":
            train_net(arguments, root)
        else:
            run_tool(name, SHORT.get(name, list)(arguments))
    elif words[0] == "python" and (root / words[1]).is_file():
        runpy.run_path(str(root / words[1]), run_name="__main__")
    elif words[0] == "make":
        assert subprocess.run(["make", "-n", "-C", REPOSITORY, *words[1:]], capture_output=True).returncode == 0
    else:
        assert words[0] in UNTESTED, f"neither run nor marked: {' '.join(words)}"


def check_config(code: str, root: Path, name: str) -> None:
    """Do a dry run of a config of a page, or of a part of one on top of the quickstart."""
    levels = [len(dots) for dots in re.findall(r"^from (\.+)\w*", code, re.MULTILINE)]
    folder = {1: root, 2: root / "examples", 3: root / "examples" / "page"}[max(levels, default=1)]
    folder.mkdir(exist_ok=True)
    if "import *" not in code and "import (" not in code:
        start = QUICKSTART if not levels or max(levels) == 1 else QUICKSTART.replace("from .", "from ..")
        code = start + FRAGMENT + code
    if max(levels, default=1) == 2:  # a file in a folder of configs
        code = re.sub(r"from \.\.(?!configs)", "from ..configs.", code)
    file = folder / f"{name}.py"
    file.write_text(code)
    run_tool("train", ["--config-file", str(file), "--dry-run", *small(str(file))])


def check_included_file(source: str, root: Path) -> None:
    """Compile an included file of the checkout, and load it if it is a config."""
    code = (REPOSITORY / source).read_text(encoding="utf-8")
    compile(code, source, "exec")
    if source.startswith("configs/"):
        load_config(str(root / source))
    elif is_config(code):
        train_net(["--config-file", source], root)


def run_python(block: Block, namespace: dict, root: Path) -> None:
    named = re.match(r"# (\w+)\.py\n", block.code)
    if block.source:
        check_included_file(block.source, root)
    elif block.needs:
        compile(block.code, block.where, "exec")
    elif is_config(block.code):
        check_config(block.code, root, named.group(1) if named else f"block_{block.line}")
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(FRAGMENT, "fragment", "exec"), namespace)
            exec(compile(block.code, block.where, "exec"), namespace)


def run_bash(block: Block, root: Path, data: Path) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True)
    assert checked.returncode == 0, f"{block.where}: {checked.stderr}"
    for words in commands(block.code):
        if not block.needs:
            run_command(words, root, data)
        elif tool := tool_of(words):
            check_options(load_tool(tool[0]), tool[1])


@pytest.mark.parametrize("page", [page for page in BLOCKS if BLOCKS[page]])
def test_the_blocks_of_a_page_run_in_order_or_are_marked(page, reader, data):
    namespace: dict = {}
    for block in BLOCKS[page]:
        with temporary_registrations():
            if block.language == "python":
                run_python(block, namespace, reader)
            else:
                run_bash(block, reader, data)


@pytest.mark.parametrize("page", sorted((REPOSITORY / "docs").glob("**/*.md")), ids=lambda page: page.name)
def test_the_files_in_a_page_are_those_of_the_checkout(page):
    text = page.read_text(encoding="utf-8")
    assert with_files(text) == text, "run `python docs/include_files.py`"


def test_extras_named_in_the_pages_exist():
    extras = set(re.findall(r'^        "(\w+)": ', (REPOSITORY / "setup.py").read_text(), re.MULTILINE))
    named = {
        extra
        for page in PAGES
        for names in re.findall(r'(?:bissl_zoo|")\.?\[(\w+(?:,\w+)*)\]"', page.read_text(encoding="utf-8"))
        for extra in names.split(",")
    }
    assert named and named <= extras


def test_a_command_that_is_neither_run_nor_marked_fails(tmp_path):
    with pytest.raises(AssertionError, match="neither run nor marked: curl"):
        run_command(commands("curl https://host/zoo  # all of it")[0], tmp_path, tmp_path)


def test_options_keys_and_tools_of_a_marked_block_must_exist():
    with pytest.raises(SystemExit):
        check_options(load_tool("train"), ["--config-file", "configs/bissl/voc_det.py", "--no-such-option"])
    with pytest.raises(Exception, match=r"no key 'solver\.iteration'"):
        check_options(load_tool("train"), ["--config-file", "configs/bissl/voc_det.py", "solver.iteration=3"])
    with pytest.raises(AssertionError, match="there is no tools/trane_net.py"):
        tool_of(commands("torchrun --nproc-per-node 2 \\\n    tools/trane_net.py")[0])
    with pytest.raises(AssertionError, match="there is no command bissl trane"):
        tool_of(["bissl", "trane"])
