"""The site builds without a warning, and its pages load nothing from the network."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import browser, find_browser

pytestmark = pytest.mark.slow  # builds the site in a process

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")

#: types a word into the search and counts the results
SEARCH = """(async () => {
  const field = document.querySelector(".md-search__input")
  field.focus()
  field.value = "damping"
  field.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }))
  const found = () => document.querySelectorAll(".md-search-result__item").length
  for (let tries = 0; tries < 200 && !found(); tries++) await new Promise(done => setTimeout(done, 50))
  return found()
})()"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site into a temporary folder, as `make docs` does."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f'the site needs {", ".join(missing)}: pip install "bissl_zoo[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        environment[name] = "http://127.0.0.1:9"  # a closed port
    built = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_is_built_and_in_the_navigation(site):
    index = (site / "index.html").read_text(encoding="utf-8")
    for page in REPOSITORY.glob("docs/**/*.md"):
        name = page.relative_to(REPOSITORY / "docs").with_suffix(".html").as_posix()
        assert (site / name).is_file() and (f'href="{name}"' in index or name == "index.html"), name


def test_pages_load_nothing_from_the_network(site):
    pages = list(site.rglob("*.html"))
    for page in pages:
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text(encoding="utf-8")):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), f"{page.name}: {tag}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    assert len(pages) > 20


def test_equations_are_mathml_and_pages_show_the_files_they_name(site):
    ideas = (site / "ideas.html").read_text(encoding="utf-8")
    assert ideas.count("<math") > 20 and "arithmatex" not in ideas and "$$" not in ideas
    config = (site / "config.html").read_text(encoding="utf-8")
    assert "pretext_warmup" in config
    assert "Benchmarks" in (site / "measured.html").read_text(encoding="utf-8")


def test_sections_of_docstrings_are_parsed_and_roles_removed(site):
    for page in site.glob("reference/*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(?m)^(?:<p>)?(?:Returns|Raises|Yields): ", text), page.name
        assert not re.search(r":(?:class|func|data|meth):", text), page.name


@pytest.mark.skipif(find_browser() is None, reason="needs Chromium")
def test_pages_opened_from_a_folder_can_be_searched_and_fit_a_phone(site):
    with browser() as page:
        for file in sorted(set(site.rglob("*.html")) - {site / "404.html"}):  # for servers only
            page.open(file, width=390)
            assert page.value("document.documentElement.scrollWidth") <= 390, file.name
        page.open(site / "index.html", width=1440)
        assert page.value(SEARCH) > 3 and not page.complaints


def test_relative_links_lead_to_files():
    pages = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("*/README.md")]
    pages += REPOSITORY.glob("examples/*/README.md")
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"`[^`\n]*`", "", text)
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
            assert (page.parent / target).exists(), f"{page.relative_to(REPOSITORY)}: {target}"
