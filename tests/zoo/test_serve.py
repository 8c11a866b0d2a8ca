import hashlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.cache import Cache
from bissl_zoo.zoo.serve import ZooServer
from bissl_zoo.zoo.stores.http import HttpStore

REPOSITORY = Path(__file__).resolve().parents[2]
CONTENT = random.Random(0).randbytes(1_000_000)
FILE = "name@2/model.safetensors"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "BISSL_ZOO_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def zoo(tmp_path):
    folder = tmp_path / "zoo"
    (folder / "name@2").mkdir(parents=True)
    (folder / "index.json").write_text("{}")
    (folder / FILE).write_bytes(CONTENT)
    (folder / "name@2" / "empty").write_bytes(b"")
    return folder


@pytest.fixture
def server(zoo):
    with ZooServer(zoo, port=0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def ask(server, path, method="GET", **headers):
    """Status, headers by lower-case name, and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, {name.lower(): value for name, value in response.headers.items()}, body


def test_a_file_comes_with_its_size_type_and_tag(server):
    status, headers, body = ask(server, f"/{FILE}")
    assert (status, body) == (200, CONTENT)
    assert headers["content-length"] == "1000000" and headers["content-type"] == "application/octet-stream"
    assert headers["accept-ranges"] == "bytes" and "Python" not in headers["server"]
    status, json_headers, body = ask(server, "/index.json?x=1")
    assert (status, body, json_headers["content-type"]) == (200, b"{}", "application/json")
    assert json_headers["etag"] != headers["etag"]


def test_head_tells_the_same_without_the_body(server):
    status, headers, body = ask(server, f"/{FILE}", "HEAD")
    got = ask(server, f"/{FILE}")[1]
    assert (status, body) == (200, b"")
    assert all(headers[name] == got[name] for name in ("content-length", "etag", "last-modified", "content-type"))


@pytest.mark.parametrize(
    "wanted, begin, end",
    [
        ("bytes=0-", 0, 1_000_000),
        ("bytes=10-19", 10, 20),
        ("bytes=999990-2000000", 999_990, 1_000_000),
        ("bytes=-10", 999_990, 1_000_000),
        ("bytes=-2000000", 0, 1_000_000),
    ],
)
def test_a_range_is_answered_with_it_alone(server, wanted, begin, end):
    status, headers, body = ask(server, f"/{FILE}", Range=wanted)
    assert (status, body) == (206, CONTENT[begin:end])
    assert headers["content-range"] == f"bytes {begin}-{end - 1}/1000000"


@pytest.mark.parametrize("wanted", ["bytes=1000000-", "bytes=1000000-1000005", "bytes=-0"])
def test_a_range_beyond_the_end_is_refused(server, wanted):
    status, headers, body = ask(server, f"/{FILE}", Range=wanted)
    assert (status, body, headers["content-range"]) == (416, b"", "bytes */1000000")


@pytest.mark.parametrize("wanted", ["bytes=0-1,5-6", "bytes=-", "bytes=5-4", "items=0-1", "bytes=a-b", "bytes=²-"])
def test_what_is_not_one_range_brings_the_whole_file(server, wanted):
    status, _, body = ask(server, f"/{FILE}", Range=wanted.encode())
    assert (status, body) == (200, CONTENT)


def test_a_range_of_a_file_that_has_changed_brings_the_whole_file(zoo, server):
    tag = ask(server, f"/{FILE}", "HEAD")[1]["etag"]
    assert ask(server, f"/{FILE}", Range="bytes=5-", If_Range=tag)[0] == 206
    (zoo / FILE).write_bytes(CONTENT + b"x")
    assert ask(server, f"/{FILE}", Range="bytes=5-", If_Range=tag)[0] == 200


def test_only_names_that_entries_can_have_are_found(zoo, server):
    (zoo.parent / "secret").write_text("secret")
    for hidden in (".lock", ".index.json-ab12", "name@2/.half", ".publishing-1-ab/model.safetensors"):
        (zoo / hidden).parent.mkdir(exist_ok=True)
        (zoo / hidden).write_text("secret")
        assert ask(server, f"/{hidden}")[0] == 404
    (zoo / "name@2" / "deeper").mkdir()
    (zoo / "name@2" / "deeper" / "file").write_text("secret")
    paths = ["/../secret", "/%2e%2e/secret", "/name@2/../../secret", "/..%2fsecret", f"//{zoo.parent}/secret"]
    paths += ["/", "//", "/name@2", "/name@2/", "/name@2/deeper/file", "/absent", "/name@2/absent", "/index.json/x"]
    paths += ["/index.json%00", "/index.json%00.txt", "//[", "index.json", "*", "/%ff", "/name@2//model.safetensors"]
    for path in paths:
        status, _, body = ask(server, path)
        assert status == 404 and b"secret" not in body and b"deeper" not in body, path


def test_links_are_followed_inside_of_the_folder_only(zoo, server):
    outside = zoo.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (zoo / "file").symlink_to(outside / "secret")
    (zoo / "folder").symlink_to(outside)
    (zoo / "circle").symlink_to(zoo / "circle")
    (zoo / "within").symlink_to(zoo / FILE)
    assert [ask(server, path)[0] for path in ("/file", "/folder/secret", "/circle")] == [404] * 3
    assert ask(server, "/within")[2] == CONTENT


def test_a_pipe_is_not_waited_for(zoo, server):
    os.mkfifo(zoo / "pipe")
    assert ask(server, "/pipe")[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_written(zoo, server, method):
    assert ask(server, "/index.json", method)[0] == 501
    assert (zoo / "index.json").read_text() == "{}"


def test_an_empty_file_comes_empty(server):
    assert ask(server, "/name@2/empty")[::2] == (200, b"")
    assert ask(server, "/name@2/empty", Range="bytes=0-")[0] == 416


def test_a_client_that_leaves_is_one_line_and_does_not_stop_the_server(zoo, server, capfd):
    with open(zoo / FILE, "wb") as stream:
        stream.truncate(256 << 20)  # more than the sockets take at once
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(f"GET /{FILE} HTTP/1.1\r\n\r\n".encode())
        connection.recv(10)
    told, deadline = "", time.monotonic() + 60
    while "the client left" not in told:
        assert "Traceback" not in told and time.monotonic() < deadline
        time.sleep(0.01)
        told += capfd.readouterr().err
    assert ask(server, "/index.json")[0] == 200


def test_many_clients_at_once_get_the_same(server):
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda _: hashlib.sha256(ask(server, f"/{FILE}")[2]).hexdigest(), range(64)))
    assert found == [hashlib.sha256(CONTENT).hexdigest()] * 64


def test_the_cache_fetches_from_it_and_continues(tmp_path, server):
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    cache, store = Cache(tmp_path / "cache"), HttpStore(server.address)
    (cache.root / "partial").mkdir(parents=True)
    (cache.root / "partial" / sha256).write_bytes(CONTENT[:400_000])
    assert cache.fetch(store, FILE, sha256, len(CONTENT)).read_bytes() == CONTENT
    assert cache.read_index(store, "index.json", 100).content == b"{}"
    assert cache.read_index(store, "curated.json", 100) is None


def test_a_folder_that_is_no_zoo_is_not_served(tmp_path):
    with pytest.raises(ZooError, match="neither index.json nor curated.json"):
        ZooServer(tmp_path, port=0)
    with pytest.raises(ZooError, match="absent is not served"):
        ZooServer(tmp_path / "absent", port=0)


@pytest.mark.parametrize("host, port", [("127.0.0.1", None), ("127.0.0.1", 70_000), ("no such host", 0)])
def test_an_address_that_cannot_be_taken_is_named(zoo, server, host, port):
    with pytest.raises(ZooError, match=f"Cannot serve at {host}, port .*Choose another"):
        ZooServer(zoo, host, server.server_port if port is None else port)


def test_ipv6_is_served_where_there_is_any(zoo):
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with ZooServer(zoo, "::1", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        assert server.address == f"http://[::1]:{server.server_port}"
        assert HttpStore(server.address).read("index.json", 10).content == b"{}"
        server.shutdown()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_serving_says_who_can_read_and_what_to_type_and_stops_at_ctrl_c(zoo, host):
    program = "import sys; from bissl_zoo.zoo.serve import serve; serve(sys.argv[1], sys.argv[2], 0)"
    paths = filter(None, [os.environ.get("PYTHONPATH"), str(REPOSITORY)])
    with subprocess.Popen(
        [sys.executable, "-c", program, str(zoo), host],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    ) as process:
        told = [process.stdout.readline()]
        while "export" not in told[-1]:
            assert told[-1], process.stderr.read()
            told.append(process.stdout.readline())
        location = told[-1].strip().removeprefix("export BISSL_ZOO=")
        port = location.rpartition(":")[2]
        if host == "0.0.0.0":
            assert location == f"http://{socket.gethostname()}:{port}"
            assert f"Everyone who reaches port {port} of this machine can read it" in "".join(told)
        else:
            assert location == f"http://127.0.0.1:{port}" and "Only this machine" in "".join(told)
        assert json.loads(HttpStore(f"http://127.0.0.1:{port}").read("index.json", 10).content) == {}
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert process.stdout.read() == "\nStopped.\n" and "Traceback" not in process.stderr.read()
