"""MkDocs hooks: render equations as MathML, and redirect links that leave docs/.

The Markdown is written for GitHub, where links lead to files of the checkout and `$...$` is mathematics.
"""

import posixpath
import re
from typing import Any

from latex2mathml.converter import convert

#: path of a file of the checkout, or the beginning of it -> the page that shows it
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
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"(?<!<pre>)(?<!<span></span>)<code>([^<\n]+)</code>")
BREAK = re.compile(r"(?<=\w[_./=,(])(?=\w)")
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Redirect links that leave docs/ to pages; a link without a page becomes plain text."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def redirect(link: re.Match) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return link.group()
        target_page = next((name for start, name in PAGES.items() if path == start or path.startswith(start)), None)
        if target_page is None:
            return text
        return f"[{text}]({posixpath.relpath(f'docs/{target_page}', folder)}{anchor or ''})"

    end, parts = 0, []
    for fence in FENCED.finditer(markdown):
        parts += [LINK.sub(redirect, markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, LINK.sub(redirect, markdown[end:])])


def on_page_content(html: str, **_: Any) -> str:
    """Convert equations to MathML, which browsers render without a script, and allow line breaks in long names."""
    html = NAME.sub(lambda name: f"<code>{BREAK.sub('<wbr>', name.group(1))}</code>", html)
    return EQUATION.sub(_mathml, html)


def _mathml(equation: re.Match) -> str:
    tag, latex = equation.groups()
    for name, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        latex = latex.replace(name, character)
    display = "block" if tag == "div" else "inline"
    mathml = convert(latex.strip(), display=display).replace("<mo>&#x02016;", '<mo stretchy="false">&#x02016;')
    return f'<{tag} class="equation">{mathml}</{tag}>'
