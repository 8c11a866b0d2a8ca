"""Hypothesis strategies for hostile annotations, images, configs, overrides and web answers."""

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

#: sizes of the existing images that the COCO files name
COCO_IMAGES = {"a.png": (16, 12), "b.png": (7, 9), "below/c.png": (1, 1)}
_SQUARE = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1.5, 2, 3, 4], "iscrowd": 0}
coco_files = json_files(
    {
        "images": [{"id": 1, "file_name": "a.png", "width": 16, "height": 12}, {"id": 2, "file_name": "b.png"}],
        "annotations": [_SQUARE, {**_SQUARE, "id": 2, "bbox": [0, 0, 16.01, 12], "segmentation": [[1, 2, 3, 4]]}],
        "categories": [{"id": 2, "name": "dog"}, {"id": 4, "name": "cat"}],
    }
)


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
    *("a", ".", ": ", "[", "]", "{", "}", ", ", "\n", "  ", "- ", "&x ", "*x", "? ", "<<: ", "'", '"', "\\", "\x85"),
    *("#", "|", ">", "%YAML 1.1\n", "---\n", "???", "${", "${oc.env:HOME}", "${a:", "1e400", "0x", "_", "12:30", "="),
    *("\ufeff", "é", "_target_: ", "os.system", "!!python/object/apply:os.system ", "9" * 5000, "[" * 300, "{a: " * 60),
    *("~", "${" * 200),
]
_fragments = st.lists(st.sampled_from(_WORDS), max_size=8).map("".join)
_YAML = b"train:\n  seed: 0\n  lr: [1e-3, '${train.seed}']\n"
yaml_files = json_files(CONFIG) | _fragments.map(str.encode) | damaged([_YAML])

_keys = st.sampled_from(
    ["train.seed", "train.stages.0", "train.stages.2", "train", "solver.1", "train.again.x", *TEXTS]
)
_signs, _ends = st.sampled_from(["", "+", "~"]), st.sampled_from(["=", "", ".x="])
overrides = st.builds("{}{}{}{}".format, _signs, _keys, _ends, _fragments) | _fragments | st.text(max_size=30)

_STATUSES = "200 200 200 206 100 103 204 301 302 307 304 308 401 403 404 410 416 429 500 503 999 99 -1 x".split()
_LOCATIONS = (
    *("file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:x", "data:,x", "//[", "http://[::1", "//", "http:///x"),
    *("", " ", "/again", "?x", "#x", "..", "../" * 40 + "etc/passwd", "/\xff\xfe", "http://127.0.0.1:99999/", "/%00"),
)
_HEADERS = {
    "Content-Length": ["0", "3", "-1", "1e3", "x", "9" * 30, "3, 3", "+3", "\u0663", "10737418240"],
    "Content-Range": ["bytes 0-2/3", "bytes 1-2/3", "bytes */0", "bytes */*", "bytes -1-2/x", "x" * 999, "bytes 9-1/1"],
    "Content-Encoding": ["gzip", "identity", "br, gzip", "", "\x1b[2J"],
    "Transfer-Encoding": ["chunked", "identity", "gzip, chunked", "x"],
    "Location": list(_LOCATIONS),
    "Retry-After": ["0", "999999", "-1", "9" * 30, "Wed, 21 Oct 2015 07:28:00 GMT"],
    "Connection": ["keep-alive", "close", "upgrade"],
    "Set-Cookie": ["a=b; Path=/; Domain=example.org"],
}
_header = st.sampled_from([(name, value) for name, values in _HEADERS.items() for value in values])
_STARTS = ("HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/9.9", "ICY", "http/1.1", "")


def _answer(start: str, status: str, headers: list[tuple[str, str]], tail: bytes, body: bytes, reason="OK") -> bytes:
    head = f"{start} {status} {reason}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers)
    return head.encode("utf-8", "surrogatepass") + tail + b"\r\n" + body


def http_answers(body: bytes) -> st.SearchStrategy[bytes]:
    """Answers of a web server to a request for `body`: valid, with other headers, damaged, or random bytes."""
    length = ("Content-Length", str(len(body)))
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    good = _answer("HTTP/1.1", "200", [length], b"", body)
    chunked = _answer("HTTP/1.1", "200", [("Transfer-Encoding", "chunked")], b"", chunks)
    starts = st.sampled_from(["HTTP/1.1"] * 9 + list(_STARTS))
    headers = st.lists(_header | st.just(length), max_size=4)
    tails = st.sampled_from([b""] * 9 + [b"no colon\r\n", b" folded\r\n", b"a: b\0c\r\n", b"x: y\r\n" * 200])
    bodies = st.sampled_from([body, chunks, body[:-1], body + b"more", b""])
    reasons = st.sampled_from(["OK", "", "\x1b[2J\u202e", "x" * 60_000])
    made = st.builds(_answer, starts, st.sampled_from(_STATUSES), headers, tails, bodies, reasons)
    return st.just(good) | made | damaged([good, chunked]) | st.binary(max_size=60)
