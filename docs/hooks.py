"""What the site does to a page: equations become MathML, files are shown where a block names one, and links that leave
docs/ go to the page that shows the file.

The Markdown itself is written for GitHub, where links lead to files of the checkout and `$...$` is mathematics. A block
that is `# file: configs/common/train.py` is that file, as it is when the site is built.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

#: files of the checkout that have a page, by their path or the beginning of it
PAGES = {
    "README.md": "index.md",
    "benchmarks/README.md": "measured.md",
    "examples/my_pretext_method/": "guides/pretext_method.md",
    "examples/my_task/": "guides/task.md",
    "examples/my_solver/": "guides/solver.md",
    "configs/common/train.py": "config.md",
    "configs/": "config.md",
    "bissl_zoo/data/": "reference/data.md",
    "bissl_zoo/zoo/": "reference/zoo.md",
    "bissl_zoo/hypergradient/": "reference/hypergradient.md",
    "bissl_zoo/pretext/": "reference/pretext.md",
    "bissl_zoo/downstream/": "reference/downstream.md",
    "bissl_zoo/evaluation/": "reference/evaluation.md",
    "bissl_zoo/engine/": "reference/engine.md",
    "bissl_zoo/report/": "reference/reports.md",
    "bissl_zoo/bilevel/algorithm.py": "reference/bilevel.md",
    "bissl_zoo/backbones/backbone.py": "reference/backbones.md",
}
ROOT = Path(__file__).resolve().parents[1]
SHOWN = re.compile(r"^# file: (\S+)$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"(?<!<pre>)(?<!<span></span>)<code>([^<\n]+)</code>")
BREAK = re.compile(r"(?<=\w[_./=,(])(?=\w)")
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in files, and point links that leave docs/ at pages; where there is none, the text stays without a link."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def point(link: re.Match) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return link.group()
        found = next((name for start, name in PAGES.items() if path == start or path.startswith(start)), None)
        if found is None:
            return text
        return f"[{text}]({posixpath.relpath(f'docs/{found}', folder)}{anchor or ''})"

    done, parts = 0, []
    for fence in FENCED.finditer(markdown):
        parts += [LINK.sub(point, markdown[done : fence.start()]), SHOWN.sub(_file, fence.group())]
        done = fence.end()
    return "".join([*parts, LINK.sub(point, markdown[done:])])


def on_page_content(html: str, **_: Any) -> str:
    """Write equations as MathML, which browsers draw by themselves, and mark where a long name may break."""
    html = NAME.sub(lambda name: f"<code>{BREAK.sub('<wbr>', name.group(1))}</code>", html)
    return EQUATION.sub(_mathml, html)


def _file(named: re.Match) -> str:
    return (ROOT / named.group(1)).read_text(encoding="utf-8").rstrip()


def _mathml(equation: re.Match) -> str:
    tag, latex = equation.groups()
    for name, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        latex = latex.replace(name, character)
    display = "block" if tag == "div" else "inline"
    drawn = convert(latex.strip(), display=display).replace("<mo>&#x02016;", '<mo stretchy="false">&#x02016;')
    return f'<{tag} class="equation">{drawn}</{tag}>'
