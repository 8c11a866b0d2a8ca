"""Write files of the checkout into the code blocks of the pages that begin with `# file: PATH`.

python docs/include_files.py      # after a change of a file; a test fails if a block is out of date
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: a block whose first line names a file; the rest is its content
BLOCK = re.compile(r"^(```\w+\n# file: (\S+)\n)(.*?)^```$", re.MULTILINE | re.DOTALL)


def with_files(markdown: str) -> str:
    """Return a page whose blocks hold the present content of the files that they name."""

    def replace(block: re.Match) -> str:
        return f"{block.group(1)}{(ROOT / block.group(2)).read_text(encoding='utf-8').rstrip()}\n```"

    return BLOCK.sub(replace, markdown)


def main() -> None:
    """Update the pages below docs/ and print the names of those that changed."""
    for page in sorted((ROOT / "docs").glob("**/*.md")):
        before = page.read_text(encoding="utf-8")
        if (after := with_files(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
