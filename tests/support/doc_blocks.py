"""Find the code blocks of the documentation, and check command lines without running them."""

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from command_line import COMMAND_OF

from bissl_zoo.cli import COMMANDS
from bissl_zoo.config import LazyConfig, load_config, with_defaults

REPOSITORY = Path(__file__).resolve().parents[2]
#: sections of a config
SECTIONS = "train backbone pretext task solver optimizer lr_multiplier dataloader pretrain bilevel finetune clip_grad"
SECTIONS = {*SECTIONS.split(), "search", "compare"}
NEEDS = {"network", "gpu", "slurm"}
FENCE = re.compile(r"^```(\w*)\s*$")
MARK = re.compile(r"^<!-- test: needs (\w+) -->$")
INCLUDED = re.compile(r"# file: (\S+)\n")


class Block(NamedTuple):
    """A fenced block, its place, and what it needs that a test does not have."""

    page: str
    line: int
    language: str
    code: str
    needs: str | None

    @property
    def source(self) -> str | None:
        """Return the file that the block holds, or None if it is a block written for the page."""
        include = INCLUDED.match(self.code + "\n")
        return include.group(1) if include else None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Return README.md, the READMEs of folders, and the pages of docs/ and examples/."""
    return [
        REPOSITORY / "README.md",
        *sorted(REPOSITORY.glob("*/README.md")),
        *sorted(REPOSITORY.glob("docs/**/*.md")),
        *sorted(REPOSITORY.glob("examples/*/*.md")),
    ]


def blocks(page: Path) -> list[Block]:
    """Return the Python and bash blocks of a page, in order."""
    name, lines = page.relative_to(REPOSITORY).as_posix(), page.read_text(encoding="utf-8").splitlines()
    result, start, needs = [], None, None
    for number, line in enumerate(lines, start=1):
        fence = FENCE.match(line)
        if start is None and fence:
            start, language = number, fence.group(1)
            assert language or needs is None, f"{name}:{number}: a mark above a block without a language"
        elif start is not None and line.strip() == "```":
            if language in ("python", "bash"):
                result.append(Block(name, start, language, "\n".join(lines[start : number - 1]), needs))
            start = needs = None
        elif start is None and line.strip():
            mark = MARK.match(line.strip())
            needs = mark.group(1) if mark else None
            assert needs is None or needs in NEEDS, f"{name}:{number}: {needs!r} is none of {NEEDS}"
    assert start is None, f"{name}: the block of line {start} has no end"
    return result


def commands(code: str) -> list[list[str]]:
    """Return the commands of a bash block as lists of words, without comments, assignments and redirections."""
    result = []
    for line in code.replace("\\\n", " ").splitlines():
        line = re.split(r"\s(?:\|\||\||>)\s", line)[0]
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            while words and (re.match(r"^\w+=", words[0]) or words[0] == "srun"):
                words = words[1:]
            if words and words[0] not in ("export", "if", "."):
                result.append(words)
    return result


def is_config(code: str) -> bool:
    """Return whether a Python block is (a part of) a config file, and not a program."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            return True
        if isinstance(node, ast.Assign) and not _is_eager_call(node.value):
            roots = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            if SECTIONS.intersection(roots):
                return True
    return False


def _is_eager_call(value: ast.expr) -> bool:
    """Return whether a value is a call that runs now, as `create_backbone(...)`, unlike `L(f)(...)` and `dict(...)`."""
    if not isinstance(value, ast.Call) or isinstance(value.func, ast.Call):
        return False
    return not (isinstance(value.func, ast.Name) and value.func.id == "dict")


def tool_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the name and the arguments of a command of `bissl`, or of a script of tools/ run by python or torchrun."""
    if words[0] == "bissl":
        assert words[1] in COMMANDS, f"there is no command bissl {words[1]}"
        return words[1], words[2:]
    for position, word in enumerate(words):
        if re.fullmatch(r"tools/\w+\.py", word) and words[0] in ("python", "torchrun"):
            assert (REPOSITORY / word).is_file(), f"there is no {word}"
            return COMMAND_OF.get(Path(word).stem, Path(word).stem), words[position + 1 :]
    return None


def check_options(module, arguments: list[str]) -> None:
    """Check that options, the config file and the keys of overrides exist, without running the tool."""
    args = module.parse_args(arguments)
    config = getattr(args, "config_file", None)
    if config and not config.startswith(("zoo:", "runs/")):
        LazyConfig.apply_overrides(with_defaults(load_config(config)), getattr(args, "overrides", []), source=config)
