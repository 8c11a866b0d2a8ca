"""The words of the code and the documentation are those of PyTorch, Detectron2 and timm.

`python tests/test_vocabulary.py PATH...` lists every hit in the given files and folders.
"""

import ast
import io
import math
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CODE = ("bissl_zoo", "tools", "configs", "examples", "benchmarks")
PROSE = ("README.md", "docs", "model_zoo", "benchmarks", "tools", "configs", "examples")

#: pattern in comments, strings and prose -> hits allowed per 10,000 lines, about the frequency in Detectron2 and timm
WORDS = {
    r"\b([Tt]ells?|told|telling)\b": 0.5,  # log, print, report, raise
    r"(?<![./])\b[Ff]igures?\b(?![./]| \d)": 3.5,  # metrics, results; a plot and a paper's "Figure 2" are figures
    r"\bsa(y|ys|id)\b": 3.0,
    r"\b(speak|speaks|spoke) of\b": 0.0,
    r"\b[Ww]here (there (is|are)|nothing|nobody)\b": 0.0,
    r"\b(is|are) there\b": 1.0,  # exists
    r"\b(anew|owed|owes|somebody|nobody)\b": 0.0,
    r"\b[Mm]end(s|ed|ing)?\b": 0.0,
    r"\b([Gg]o|goes|going|went) on\b": 1.0,  # continue
    r"\bof (ours|its own|their own|one's own|your own)\b": 1.0,
    r"\bone's own\b": 0.0,
    r"\bstands? still\b": 0.0,
    r"\bnot told apart\b": 0.0,
    r"(?<!')\bancestors?\b": 0.0,  # lineage, parents (in quotes, the key of old files)
    r"(?<![.\w])(the |a |this |whole )[Ww]alk\b": 0.0,  # pipeline, run
    r"\bthicken\w*|\bthin image": 0.0,  # pad
    r"\bbad images?\b": 0.0,  # image that cannot be decoded
    r"\b[Pp]ictures?\b": 4.0,  # image
    r"\bfor want of\b": 0.0,
    r"\bthat (cannot|can) be$": 0.0,
    r"\bas asked\b": 0.0,
}
ANY_WORD = re.compile("|".join(WORDS))
#: a docstring begins with a verb in the imperative or with a noun phrase, never with one of these
NO_DOCSTRING_START = {"As", "For", "How", "If", "Of", "Such", "That", "There", "Until", "What", "When", "Where"}
NO_DOCSTRING_START |= {"Whether", "Which", "Who"}
#: names that say nothing, and the share of all names of variables and arguments that they may have
EMPTY_NAMES = {"told", "found", "one", "kept", "said", "shown", "figures", "facts", "own", "least"}
EMPTY_NAMES_SHARE = 0.002
#: no part of the name of a function, class or file
NO_NAME_PARTS = {"tell", "tells", "told", "say", "says", "said", "facts", "figures", "ancestors", "thicken"}


def files(paths: Iterable[str], suffix: str) -> list[Path]:
    """Return the files with `suffix` at and below `paths`; relative paths start at the repository."""
    given = [REPOSITORY / path for path in paths]
    return sorted(f for path in given for f in ([path] if path.is_file() else path.rglob("*")) if f.suffix == suffix)


def text_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of the comments and strings of a Python file, or of the prose of a page.

    Code blocks and `code` in a page are left out, and so are strings that are a single quoted key, as "ancestors".
    """
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        in_block = False
        for number, line in enumerate(content.splitlines(), start=1):
            if line.lstrip().startswith("```"):
                in_block = not in_block
            elif not in_block:
                yield number, re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)
        return
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type in kinds and not re.fullmatch(r"[rbf]?([\"'])[\w/.]*\1", token.string):
            for number, line in enumerate(token.string.splitlines(), start=token.start[0]):
                yield number, line


def names_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (name, line number) for each variable and argument that a file assigns."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def word_hits(path: Path) -> Iterator[tuple[str, int, str]]:
    """Yield (pattern, line number, line) for each hit of `WORDS` in a file."""
    draws = re.search("matplotlib|svg|<figure", path.read_text(encoding="utf-8"))  # where a figure is a plot
    for number, line in text_of(path):
        if draws:
            line = re.sub(r"\b[Ff]igures?\b", "", line)
        for pattern in WORDS if ANY_WORD.search(line) else ():
            for _ in re.finditer(pattern, line):
                yield pattern, number, line.strip()


def definition_hits(path: Path) -> Iterator[tuple[str, int, str]]:
    """Yield (rule, line number, text) for docstrings and names of definitions that the style guide excludes."""
    if (NO_NAME_PARTS - {"figures"}).intersection(path.stem.lower().split("_")):  # a file may draw figures
        yield "file name", 0, path.stem
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if NO_NAME_PARTS.intersection(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", node.name).lower().split("_")):
                yield "name", node.lineno, node.name
        elif not isinstance(node, ast.Module):
            continue
        start = re.match(r"\w+", ast.get_docstring(node) or "")
        if start and start.group() in NO_DOCSTRING_START:
            yield "docstring", getattr(node, "lineno", 1), (ast.get_docstring(node) or "").splitlines()[0]


def over_the_limit(paths: list[Path]) -> dict[str, list[str]]:
    """Return, for each pattern of `WORDS` with more hits than its limit allows, where the hits are."""
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    found: dict[str, list[str]] = {pattern: [] for pattern in WORDS}
    for path in paths:
        for pattern, number, _ in word_hits(path):
            found[pattern].append(f"{path}:{number}")
    allowed = {pattern: math.ceil(limit * lines / 10_000) for pattern, limit in WORDS.items()}
    return {pattern: places for pattern, places in found.items() if len(places) > allowed[pattern]}


def test_code_uses_the_words_of_the_field():
    assert over_the_limit(files(CODE, ".py")) == {}


def test_documentation_uses_the_words_of_the_field():
    assert over_the_limit(files(PROSE, ".md")) == {}


def test_docstrings_begin_with_a_verb_or_a_noun_and_names_of_definitions_are_plain():
    assert [(str(path), *hit) for path in files(CODE, ".py") for hit in definition_hits(path)] == []


def test_names_of_variables_describe_their_values():
    names = Counter(name for path in files(CODE, ".py") for name, _ in names_of(path))
    empty = {name: names[name] for name in EMPTY_NAMES if names[name]}
    allowed = EMPTY_NAMES_SHARE * names.total()
    assert sum(empty.values()) <= allowed, empty


def test_hits_are_found_in_text_and_not_in_code(tmp_path):
    module = tmp_path / "facts_file.py"
    module.write_text('"""What a run told."""\nfigures = figure.figures["told"]  # Figure 2; figures of a run\n')
    assert [number for _, number, _ in word_hits(module)] == [1, 2]
    assert [rule for rule, _, _ in definition_hits(module)] == ["file name", "docstring"]
    page = tmp_path / "page.md"
    page.write_text("A run is told\n```\ntold\n```\n`told` [a](figures/told.svg)\n")
    assert [number for _, number, _ in word_hits(page)] == [1]


def main(paths: list[str]) -> None:
    """Print every hit in `paths`, or in all code and documentation."""
    listed = [str(Path(path).resolve()) for path in paths]
    for path in files(listed or CODE, ".py"):
        for rule, number, line in [*word_hits(path), *definition_hits(path)]:
            print(f"{path}:{number}: [{rule}] {line}")
        for name, number in names_of(path):
            if name in EMPTY_NAMES:
                print(f"{path}:{number}: [variable] {name}")
    for path in files(listed or PROSE, ".md"):
        for rule, number, line in word_hits(path):
            print(f"{path}:{number}: [{rule}] {line}")


if __name__ == "__main__":
    main(sys.argv[1:])
