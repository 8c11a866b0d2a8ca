"""Files in the grammars of annotations, images and configs, with what a stranger may put into them."""

import io
from typing import Any

from hostile_input import TEXTS, damaged, json_files, png_of
from hypothesis import strategies as st
from PIL import Image

_BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
_OBJECT = f"<object><name>dog</name><difficult>0</difficult>{_BOX}</object>"
_XML = f"<annotation><size><width>50</width><height>40</height></size>{_OBJECT}</annotation>"
_XML_TEXTS = st.sampled_from([*TEXTS, "7", "1e5", "2e9", "&x;", "&#0;", "<b/>", "]]>", "\ufffe", "<a>" * 5000])
_ENCODINGS = st.sampled_from(
    "utf-8 utf-16 latin-1 utf-7 idna undefined hex rot13 big5 unknown".split() + ["x" * 300, ""]
)
DOCTYPES = {
    "entities that multiply": '<!DOCTYPE a [<!ENTITY x "x"><!ENTITY y "&x;&x;">]>',
    "a file": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
    "a parameter entity": '<!DOCTYPE a [<!ENTITY % x SYSTEM "http://127.0.0.1:9/x"> %x;]>',
    "another document": '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/x.dtd">',
    "nothing": "",
}


@st.composite
def _annotations(draw: Any) -> bytes:
    xml = _XML
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from([">50<", ">40<", ">dog<", ">0<", ">1<", ">9<"]))
        xml = xml.replace(place, f">{draw(_XML_TEXTS)}<", 1)
    if draw(st.booleans()):
        doctype = draw(st.sampled_from(list(DOCTYPES.values())))
        xml = f'<?xml version="1.0" encoding="{draw(_ENCODINGS)}"?>{doctype}{xml}'
    return xml.encode("utf-8", "surrogatepass")


annotation_files = _annotations() | damaged([_XML.encode()]) | st.binary(max_size=60)


def _image(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((16, 12)).convert("RGB").save(stream, kind)
    return stream.getvalue()


readable_images = [_image(kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")]
_others = [_image(kind) for kind in ("EPS", "PPM", "TGA", "ICO")]
_sides = st.sampled_from([0, 1, 16, 65_535, 1 << 20, (1 << 31) - 1, (1 << 32) - 1])
_depths = st.sampled_from([1, 8, 16]) | st.integers(0, 255)
_pngs = st.builds(png_of, _sides, _sides, _depths, st.integers(0, 7), st.binary(max_size=99))
image_files = damaged([*readable_images, *_others]) | _pngs | st.binary(max_size=60)

CONFIG = {
    "train": {"seed": 0, "stages": ["a", "b"], "again": "${train.seed}"},
    "solver": {"_target_": "a.b", "1": None},
}
_WORDS = [
    *(
        "a",
        ".",
        ": ",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "\n",
        "  ",
        "- ",
        "&x ",
        "*x",
        "? ",
        "<<: ",
        "'",
        '"',
        "\\",
        "\x85",
        "#",
    ),
    *(
        "#",
        "|",
        ">",
        "%YAML 1.1\n",
        "---\n",
        "???",
        "${",
        "${oc.env:HOME}",
        "${a:",
        "1e400",
        "0x",
        "_",
        "12:30",
    ),
    *("\ufeff", "é", "_target_: ", "os.system", "!!python/object/apply:os.system ", "9" * 5000, "[" * 300, "{a: " * 60),
    *("=", "~", "${" * 200),
]
_fragments = st.lists(st.sampled_from(_WORDS), max_size=8).map("".join)
_YAML = b"train:\n  seed: 0\n  lr: [1e-3, '${train.seed}']\n"
yaml_files = json_files(CONFIG) | _fragments.map(str.encode) | damaged([_YAML])

_keys = st.sampled_from(
    ["train.seed", "train.stages.0", "train.stages.2", "train", "solver.1", "train.again.x", *TEXTS]
)
_signs, _ends = st.sampled_from(["", "+", "~"]), st.sampled_from(["=", "", ".x="])
overrides = st.builds("{}{}{}{}".format, _signs, _keys, _ends, _fragments) | _fragments | st.text(max_size=30)
