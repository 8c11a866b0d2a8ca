"""Figures as markup for a page: charts as SVG whose text can be selected, photographs as PNG.

Text in figures may come from strangers. An SVG is parsed and written anew, so that it is well-formed whatever a label
holds, its names are unlike those of all others on the page, and nothing in it refers to anything outside.
"""

import base64
import io
import re
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

#: what charts draw text and axes in, which becomes the page's colour of text
INK = "#010203"
#: points of text, at which a chart of 360 points fits a phone
TEXT = 9.0
_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_XLINK = "{http://www.w3.org/1999/xlink}href"
#: dots per inch of photographs
DPI = 150
_STYLE = {
    "font.size": TEXT,
    "axes.titlesize": TEXT + 1,
    "axes.labelsize": TEXT,
    "xtick.labelsize": TEXT - 1,
    "ytick.labelsize": TEXT - 1,
    "legend.fontsize": TEXT - 1,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-4, 5),
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.4,
    "text.parse_math": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def chart_style() -> rc_context:
    """Draw charts within this; they are small, with text in the page's colour."""
    return rc_context(_STYLE)


def to_svg(figure: Figure, name: str, title: str, paper: bool = False) -> Markup:
    """A chart as an `svg` element.

    Args:
        name: of letters, digits and dashes, of no other chart on the page.
        title: what it shows, for those who cannot see it.
        paper: its colours are those for a white page.
    """
    drawn = io.BytesIO()
    with chart_style(), rc_context({"svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", metadata=_METADATA, transparent=True)
    root = ElementTree.fromstring(drawn.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        if _XLINK in element.attrib:
            element.set("href", element.attrib.pop(_XLINK))
        for key, value in element.attrib.items():
            element.set(key, _attribute(key, value, name))
    width, height = root.attrib["viewBox"].split()[2:]
    root.attrib.clear()
    root.attrib.update({"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": title})
    # what matplotlib says in a style sheet, which would hold for the whole page
    root.attrib.update({"stroke-linejoin": "round", "stroke-linecap": "butt"})
    if paper:
        root.set("class", "paper")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":  # of a part of the drawing, or of a picture that it holds
        return f"#{name}-{value[1:]}" if value.startswith("#") else value
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    if key == "style":
        value = re.sub(r"font: ((?:\w+ )*[\d.]+px) [^;]*", r"font: \1 sans-serif", value)
        value = re.sub(r"font-family: [^;]*", "font-family: sans-serif", value)
    return value.replace(INK, "currentColor")


def to_png(figure: Figure, title: str) -> Markup:
    """Photographs as an `img` element that holds its picture."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
    width, height = (round(inches * DPI) for inches in figure.get_size_inches())
    data = base64.b64encode(drawn.getvalue()).decode()
    tag = Markup('<img src="data:image/png;base64,{}" alt="{}" width="{}" height="{}">')
    return tag.format(data, title, width, height)
