"""The words of the code and the documentation are those of PyTorch, Detectron2 and timm.

`python tests/test_vocabulary.py PATH...` lists every hit in the given files and folders.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

#: pattern -> hits allowed per 10,000 lines; a limit above 0 is about the frequency in Detectron2
WORDS = {
    r"\b(tells?|told|telling)\b": 0.5,  # log, print, report, raise
    r"(?<!plt\.)\b[Ff]igures?\b(?!\.[a-z])": 3.5,  # metrics, results; a plot may be one
    r"\bsa(y|ys|id)\b": 3.0,
    r"\b(speak|speaks|spoke) of\b": 0.0,
    r'"""(What|Whether|Where)\b': 0.0,  # a docstring begins with a verb or a noun phrase
    r"\b[Ww]here (there (is|are)|nothing|nobody)\b": 0.0,
    r"\b(anew|owed|owes|somebody|nobody)\b": 0.0,
    r"\b[Mm]end(s|ed|ing)?\b": 0.0,
    r"\bof (ours|its own|their own|one's own|your own)\b": 1.0,
    r"\bone's own\b": 0.0,
    r"\bstands? still\b": 0.0,
    r"\bnot told apart\b": 0.0,
    r"\bancestors?\b": 0.0,  # lineage, parents
    r"(?<![.\w])(the |a |this )[Ww]alk\b": 0.0,  # pipeline, run
    r"\bthicken\w*|\bthin image": 0.0,  # pad
    r"\bbad images?\b": 0.0,  # image that cannot be decoded
    r"\b[Pp]ictures?\b": 4.0,  # image
    r"\bfor want of\b": 0.0,
    r"\bthat (cannot|can) be\b$": 0.0,
    r"\bas asked\b": 0.0,
}
#: names that say nothing, and the share of all assigned names that they may have
EMPTY_NAMES = {"told", "found", "one", "kept", "said", "shown", "figures", "facts", "own", "least"}
EMPTY_NAMES_SHARE = 0.002

CODE = ("bissl_zoo", "tools", "configs", "examples", "benchmarks")
PROSE = ("README.md", "docs", "model_zoo", "benchmarks", "tools", "configs", "examples")


def files(paths: Iterator[str] | tuple[str, ...], suffix: str) -> list[Path]:
    """Return the files with `suffix` at and below `paths`, relative ones below the repository."""
    given = [REPOSITORY / path for path in paths]
    return sorted(f for path in given for f in ([path] if path.is_file() else path.rglob("*")) if f.suffix == suffix)


def hits(path: Path) -> Iterator[tuple[str, int, str]]:
    """Yield (pattern, line number, line) for each hit in a file."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for pattern in WORDS:
            for _ in re.finditer(pattern, line):
                yield pattern, number, line.strip()


def assigned_names(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each name that a file assigns, arguments included, with its line number."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def over_the_limit(paths: list[Path]) -> dict[str, float]:
    """Return hits per 10,000 lines of the patterns that exceed their limits."""
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    counts = dict.fromkeys(WORDS, 0)
    for path in paths:
        for pattern, _, _ in hits(path):
            counts[pattern] += 1
    rates = {pattern: 10_000 * count / max(lines, 1) for pattern, count in counts.items()}
    return {pattern: round(rate, 2) for pattern, rate in rates.items() if rate > WORDS[pattern]}


def test_code_uses_the_words_of_the_field():
    assert over_the_limit(files(CODE, ".py")) == {}


def test_documentation_uses_the_words_of_the_field():
    assert over_the_limit(files(PROSE, ".md")) == {}


def test_names_say_what_they_hold():
    names = [name for path in files(CODE, ".py") for name, _ in assigned_names(path)]
    empty = [name for name in names if name in EMPTY_NAMES]
    assert len(empty) <= EMPTY_NAMES_SHARE * len(names), sorted(set(empty))


def main(paths: list[str]) -> None:
    """Print every hit and every empty name in `paths`, or in all code and documentation."""
    listed = [str(Path(path).resolve()) for path in paths]
    for path in files(listed or CODE, ".py") + files(listed or PROSE, ".md"):
        for pattern, number, line in hits(path):
            print(f"{path}:{number}: [{pattern}] {line}")
        for name, number in assigned_names(path) if path.suffix == ".py" else ():
            if name in EMPTY_NAMES:
                print(f"{path}:{number}: [name] {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
