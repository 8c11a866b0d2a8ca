import contextlib
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
from faulty_server import Answer, FaultyServer

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores import Missing, Transient, http
from bissl_zoo.zoo.stores.http import HttpStore

pytestmark = pytest.mark.slow
FILE = "name@2/model.safetensors"
CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server():
    with FaultyServer() as server:
        server.files[f"/zoo/{FILE}"] = CONTENT
        yield server


@pytest.fixture
def store(server):
    return HttpStore(f"{server.address}/zoo/", timeout=0.5)


def plan(server, *answers):
    server.plans[f"/zoo/{FILE}"] = list(answers)


def redirect(server, path, target, status=302):
    server.plans[path] = [Answer(status=status, headers={"Location": target}) for _ in range(20)]


def read(store, start=0, path=FILE):
    return b"".join(store.read(path, start))


def refused(call, *arguments):
    """Return the message of a `ZooError` that a retry does not solve."""
    with pytest.raises(ZooError) as raised:
        call(*arguments)
    assert not isinstance(raised.value, Transient), raised.value
    return str(raised.value)


def test_a_file_is_read_from_any_byte(server, store):
    assert store.location == f"{server.address}/zoo"
    assert read(store) == CONTENT
    assert read(store, 100_000) == CONTENT[100_000:]
    assert read(store, len(CONTENT)) == b""
    assert server.ranges() == [None, "bytes=100000-", f"bytes={len(CONTENT)}-"]
    assert server.requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("status", [404, 410])
def test_an_absent_file_is_missing(server, store, status):
    plan(server, *[Answer(status=status)] * 3)
    assert store.read_index(FILE) is None
    with pytest.raises(Missing, match=f"{FILE} answered {status}"):
        read(store)


@pytest.mark.parametrize("headers", [{}, {"Content-Length": None}])
def test_an_index_is_not_read_beyond_its_limit(server, store, monkeypatch, headers):
    plan(server, Answer(headers=headers, body=bytes(64 << 20)))
    monkeypatch.setenv("BISSL_ZOO_MAX_INDEX_BYTES", "100000")
    assert "the limit is 100,000" in refused(store.read_index, FILE)
    assert server.sent < 32 << 20  # the buffers of two sockets


def test_a_chunked_body_is_read(server, store):
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (CONTENT[:5], CONTENT[5:])) + b"0\r\n\r\n"
    plan(server, Answer(headers={"Content-Length": None, "Transfer-Encoding": "chunked"}, body=chunks))
    assert read(store) == CONTENT


def test_of_a_server_without_ranges_the_first_bytes_are_dropped(server, store):
    plan(server, Answer(ranges=False))
    assert read(store, 100_000) == CONTENT[100_000:]


@pytest.mark.parametrize("content_range", ["bytes 99999-299999/300000", "items 100000-1/2", None])
def test_another_range_than_requested_is_refused(server, store, content_range):
    plan(server, Answer(headers={"Content-Range": content_range}))
    assert "bytes from 100000 on" in refused(read, store, 100_000)


def test_a_range_beyond_the_end_is_refused(store):
    assert "shorter than the index lists" in refused(read, store, len(CONTENT) + 1)


@pytest.mark.parametrize("status", [408, 429, 503])
def test_a_busy_server_is_transient_and_may_ask_to_wait(server, store, status):
    plan(server, Answer(status=status, headers={"Retry-After": "7"}), Answer(status=status))
    for seconds in (7, 0):
        with pytest.raises(Transient, match=f"answered {status}") as raised:
            read(store)
        assert raised.value.retry_after == seconds


@pytest.mark.parametrize("status", [204, 400, 401])
def test_other_statuses_are_permanent_errors(server, store, status):
    plan(server, Answer(status=status))
    assert f"{server.address}/zoo/{FILE} answered {status}" in refused(read, store)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(sends=150_000),
        Answer(sends=150_000, end="reset"),
        Answer(sends=150_000, end="stall"),
        Answer(raw=b"", end="reset"),
        Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Le", end="stall"),
        Answer(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"),
    ],
    ids=["cut", "reset", "stall", "reset first", "half a header", "cut chunk"],
)
def test_a_broken_connection_is_transient(server, store, answer):
    plan(server, answer)
    with pytest.raises(Transient, match=f"{server.address}/zoo/{FILE}"):
        read(store)


ENDLESS = {
    "100 Continue": [b"HTTP/1.1 100 Continue\r\n\r\n"],
    "a header of single bytes": [b"HTTP/1.1 200 OK\r\nX: ", b"x"],
    "chunk extensions": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x"],
}


@pytest.mark.parametrize("parts", ENDLESS.values(), ids=ENDLESS)
def test_a_server_that_never_ends_its_headers_is_left(monkeypatch, parts):
    monkeypatch.setattr(http, "STEP_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(1000)
                connection.sendall(parts[0])
                while True:
                    connection.sendall(parts[-1])
                    time.sleep(0.01)

        threading.Thread(target=drip, daemon=True).start()
        start = time.monotonic()
        message = refused(read, HttpStore(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=5))
        assert "more than 0.3 s for headers or one block" in message and time.monotonic() - start < 5


def test_a_redirect_from_a_public_to_a_private_address_is_not_followed(monkeypatch):
    monkeypatch.setattr(http, "is_public", lambda address: address == "127.0.0.2")
    with FaultyServer("127.0.0.2") as outside, FaultyServer() as inside:
        inside.files["/secret"] = CONTENT
        redirect(outside, "/f", f"{inside.address}/secret")
        assert "redirect from a public to the private address 127.0.0.1" in refused(
            read, HttpStore(outside.address), 0, "f"
        )
        assert inside.requests == []
        redirect(inside, "/f", f"{inside.address}/secret")  # from a private address
        assert read(HttpStore(inside.address), path="f") == CONTENT


def test_addresses_of_the_internet_are_public():
    for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"):
        assert http.is_public(address)
    for address in (
        "127.0.0.1",
        "::1",
        "10.1.2.3",
        "192.168.0.1",
        "169.254.169.254",
        "fe80::1%eth0",
        "::ffff:10.0.0.1",
    ):
        assert not http.is_public(address)


def test_a_refused_connection_is_transient():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(Transient):
            read(HttpStore(f"http://127.0.0.1:{unused.getsockname()[1]}"))


def test_an_unknown_host_is_reported(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "unknown host" in refused(read, HttpStore("http://zoo.invalid"))


def test_a_compressed_body_is_refused(server, store):
    plan(server, Answer(headers={"Content-Encoding": "gzip"}))
    assert "compressed" in refused(read, store)


@pytest.mark.parametrize("line", [b"HTTP/1.1 403 \x1b[2J" + b"x" * 50_000, b"\x1b[2J" * 1000])
def test_text_of_a_server_is_escaped_and_cut(server, store, line):
    plan(server, Answer(raw=line + b"\r\nContent-Length: 0\r\n\r\n"))
    message = refused(read, store)
    assert "\x1b" not in message and "\\u001b[2J" in message and len(message) < 1000


@pytest.mark.parametrize("status", [301, 308])
def test_a_redirect_is_followed_with_the_range(server, store, status):
    redirect(server, f"/zoo/{FILE}", "../files/it%20is?signature=a/b", status)
    server.files["/zoo/files/it%20is?signature=a/b"] = CONTENT
    assert read(store, 1000) == CONTENT[1000:]
    assert server.ranges() == ["bytes=1000-"] * 2


def test_the_number_of_redirects_is_limited_and_queries_are_not_shown(server, store):
    redirect(server, f"/zoo/{FILE}", "/signed?token=SECRET")
    redirect(server, "/signed?token=SECRET", "/signed?token=SECRET")
    message = refused(read, store)
    assert "limit of 5 redirects" in message and f"{server.address}/signed" in message and "SECRET" not in message
    assert len(server.requests) == 6


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://host/x", "data:text/plain,x", "https://", "//[", ""])
def test_a_redirect_to_another_scheme_is_refused(server, store, target):
    redirect(server, f"/zoo/{FILE}", target)
    assert "not a web address" in refused(read, store)
    assert len(server.requests) == 1


def test_the_proxy_of_the_environment_is_used_except_for_no_proxy(server, monkeypatch):
    with FaultyServer() as proxy:
        monkeypatch.setenv("http_proxy", proxy.address)
        proxy.files["http://zoo.invalid/index.json"] = b"{}"
        assert HttpStore("http://zoo.invalid").read_index("index.json") == b"{}"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert read(HttpStore(f"{server.address}/zoo")) == CONTENT
        assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    "location",
    [
        "https://",
        "https://me:PASS@host/zoo",
        "http://me:PASS@:80",
        "http://me:PASS@host:no",
        "http://me:PA/SS@host",
        "http://me:PASS@host:0/",
    ]
    + ["https://me:PASS@host/zoo?token=1", "https://me:PASS@host/zoo#x", "http://[::1"],
)
def test_an_invalid_address_is_refused_without_showing_the_password(location):
    message = refused(HttpStore, location)
    assert "is not the address of a zoo" in message and "PA" not in message and "SS@" not in message


@pytest.fixture
def https_server(tmp_path):
    """An HTTPS server and the file of its self-signed certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=zoo"
    options = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *options], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with FaultyServer() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.address = server.address.replace("http:", "https:")
        server.files["/f"] = CONTENT
        yield server, certificate


def test_https_needs_a_valid_certificate(https_server, monkeypatch):
    server, certificate = https_server
    assert "SSL_CERT_FILE" in refused(read, HttpStore(server.address), 0, "f")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert read(HttpStore(server.address), 0, "f") == CONTENT


def test_redirects_go_from_http_to_https_and_never_back(https_server, server, store, monkeypatch):
    secure, certificate = https_server
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    redirect(server, f"/zoo/{FILE}", f"{secure.address}/f")
    assert read(store) == CONTENT
    requests = len(server.requests)
    redirect(secure, "/index.json", f"{server.address}/zoo/{FILE}")
    assert "redirects from https to http" in refused(read, HttpStore(secure.address), 0, "index.json")
    assert len(server.requests) == requests
