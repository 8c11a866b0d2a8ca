import base64
import hashlib
import random
import shutil
import socket
import ssl
import subprocess

import pytest
from faulty_server import Answer, FaultyServer

from bissl_zoo import __version__
from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores.http import Busy, HttpStore
from bissl_zoo.zoo.stores.store import Transient

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
    return HttpStore(f"{server.address}/zoo/")


@pytest.fixture
def hasty(server):
    return HttpStore(f"{server.address}/zoo/", timeout=0.3)


def plan(server, *answers, path=f"/zoo/{FILE}"):
    server.plans[path] = list(answers)


def received(store, offset=0, path=FILE):
    """Where the body began, and all of it."""
    with store.open(path, offset) as body:
        return body.start, b"".join(body.blocks)


def refused(call, *arguments):
    """The message of a `ZooError` that trying again does not mend."""
    with pytest.raises(ZooError) as raised:
        call(*arguments)
    assert not isinstance(raised.value, Transient), raised.value
    return str(raised.value)


def passing(call, *arguments):
    """The `Transient` that a call raises."""
    with pytest.raises(Transient) as raised:
        call(*arguments)
    return raised.value


def test_a_file_is_read_whole_under_its_name_with_a_version(server, store):
    found = store.read(FILE, limit=len(CONTENT))
    assert found.content == CONTENT
    assert found.tag == hashlib.sha256(CONTENT).hexdigest()
    [request] = server.requests
    assert request.path == f"/zoo/{FILE}"
    assert request.headers["user-agent"] == f"bissl_zoo/{__version__}"
    assert request.headers["accept-encoding"] == "identity"
    assert store.location == f"{server.address}/zoo"


@pytest.mark.parametrize("status", [404, 410])
def test_an_absent_file_is_none_to_read_and_an_error_to_open(server, store, status):
    plan(server, Answer(status=status), Answer(status=status))
    assert store.read(FILE, limit=10) is None
    assert f"{server.address}/zoo/{FILE} answered {status}" in refused(received, store)


def test_an_announced_length_above_the_limit_is_refused_before_anything_is_read(server, store):
    # reading on would end in the timeout, which is transient
    plan(server, Answer(headers={"Content-Length": str(10 * 2**30)}, body=b"", end="stall"))
    assert "more than 1,000,000 bytes" in refused(store.read, FILE, 1_000_000)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_no_announced_length_is_not_read_beyond_the_limit(server, store, chunked):
    endless = bytes(64 << 20)
    headers = {"Content-Length": None}
    if chunked:
        headers["Transfer-Encoding"] = "chunked"
        endless = b"4000000\r\n" + endless
    plan(server, Answer(headers=headers, body=endless))
    assert "more than 100,000 bytes" in refused(store.read, FILE, 100_000)
    assert server.sent < 32 << 20  # what fits into the buffers of two sockets


def test_a_file_of_just_the_limit_is_read_without_an_announced_length(server, store):
    plan(server, Answer(headers={"Content-Length": None}))
    assert store.read(FILE, limit=len(CONTENT)).content == CONTENT


def test_a_chunked_body_is_read(server, store):
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (CONTENT[:5], CONTENT[5:])) + b"0\r\n\r\n"
    plan(server, Answer(headers={"Content-Length": None, "Transfer-Encoding": "chunked"}, body=chunks))
    assert received(store) == (0, CONTENT)


def test_a_body_begins_where_it_is_asked_to(server, store):
    assert received(store) == (0, CONTENT)
    assert received(store, 100_000) == (100_000, CONTENT[100_000:])
    assert server.ranges() == [None, "bytes=100000-"]


def test_a_server_without_ranges_begins_at_the_start(server, store):
    plan(server, Answer(ranges=False))
    assert received(store, 100_000) == (0, CONTENT)


@pytest.mark.parametrize(
    "told", ["bytes 99999-299999/300000", "bytes 0-299999/300000", "items 100000-1/2", "bytes 100000", None]
)
def test_another_range_than_asked_for_is_refused(server, store, told):
    plan(server, Answer(headers={"Content-Range": told}))
    assert "bytes from 100000 on" in refused(received, store, 100_000)


def test_a_range_at_the_end_is_empty_and_one_beyond_it_an_error(server, store):
    assert received(store, len(CONTENT)) == (len(CONTENT), b"")
    assert "has no byte 300001 (bytes */300000)" in refused(received, store, len(CONTENT) + 1)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("call", ["read", "open"])
def test_a_busy_server_may_be_asked_again(server, store, status, call):
    plan(server, Answer(status=status, headers={"Retry-After": "7"}), Answer(status=status))
    ask = (lambda: store.read(FILE, 10)) if call == "read" else (lambda: received(store))
    error = passing(ask)
    assert isinstance(error, Busy) and error.retry_after == 7 and f"answered {status}" in str(error)
    assert passing(ask).retry_after == 0


@pytest.mark.parametrize("status", [204, 304, 400, 401, 403, 405])
def test_other_answers_are_errors_at_once(server, store, status):
    plan(server, Answer(status=status), Answer(status=status))
    for call in (lambda: store.read(FILE, 10), lambda: received(store)):
        message = refused(call)
        assert f"{server.address}/zoo/{FILE} answered {status}" in message
        assert ("PASSWORD" in message) == (status in (401, 403))


@pytest.mark.parametrize(
    "answer",
    [
        Answer(sends=150_000),
        Answer(sends=150_000, end="reset"),
        Answer(sends=150_000, end="stall"),
        Answer(headers={"Content-Length": "300001"}),
        Answer(raw=b"", end="close"),
        Answer(raw=b"", end="reset"),
        Answer(raw=b"", end="stall"),
        Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Le", end="stall"),
        Answer(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"),
    ],
    ids=["cut", "reset", "stall", "too long", "nothing", "reset first", "stall first", "half a header", "cut chunk"],
)
def test_a_connection_that_breaks_is_transient(server, hasty, answer):
    plan(server, answer, answer)
    assert str(passing(received, hasty)).startswith(f"{server.address}/zoo/{FILE}")
    assert str(passing(hasty.read, FILE, 1 << 20)).startswith(f"{server.address}/zoo/{FILE}")


def test_what_arrived_before_a_break_is_handed_out(server, hasty):
    plan(server, Answer(sends=150_000, end="stall"))
    arrived = bytearray()
    with pytest.raises(Transient), hasty.open(FILE) as body:
        for block in body.blocks:
            arrived += block
    assert arrived == CONTENT[:150_000]


def test_a_refused_connection_is_transient():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        passing(HttpStore(f"http://127.0.0.1:{unused.getsockname()[1]}").read, FILE, 10)


def test_what_speaks_another_protocol_is_an_error_at_once(server, store):
    plan(server, Answer(raw=b"SSH-2.0-OpenSSH_9.9\r\n"))
    assert f"{server.address}/zoo/{FILE} cannot be read" in refused(store.read, FILE, 10)


def test_a_host_that_no_name_server_knows_is_named(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "http://zoo.invalid/index.json: no host has this name" in refused(
        HttpStore("http://zoo.invalid").read, "index.json", 10
    )


def test_an_encoded_body_is_refused(server, store):
    plan(server, Answer(headers={"Content-Encoding": "gzip"}), Answer(headers={"Content-Encoding": "identity"}))
    assert "encoded as 'gzip'" in refused(received, store)
    assert received(store) == (0, CONTENT)


def test_errors_of_whoever_reads_the_body_stay_what_they_are(store):
    with pytest.raises(ConnectionResetError, match="mine"), store.open(FILE):
        raise ConnectionResetError("mine")


def redirect(server, path, target, status=302):
    server.plans[path] = [Answer(status=status, headers={"Location": target}) for _ in range(20)]


@pytest.mark.parametrize("line", [b"HTTP/1.1 403 \x1b[2J" + b"x" * 50_000, b"\x1b[2J" * 1000])
def test_what_a_server_says_is_cut_and_a_terminal_may_show_it(server, store, line):
    plan(server, Answer(raw=line + b"\r\nContent-Length: 0\r\n\r\n"))
    told = refused(store.read, FILE, 100)
    assert "\x1b" not in told and "\\u001b[2J" in told and len(told) < 1000


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_with_the_range(server, store, status):
    redirect(server, f"/zoo/{FILE}", "../files/it%20is?signature=a/b", status)
    server.files["/zoo/files/it%20is?signature=a/b"] = CONTENT
    assert received(store, 1000) == (1000, CONTENT[1000:])
    assert server.ranges() == ["bytes=1000-"] * 2


def test_a_redirect_loop_ends(server, store):
    redirect(server, f"/zoo/{FILE}", f"/zoo/{FILE}")
    assert "redirected more than 5 times" in refused(received, store)
    assert len(server.requests) == 6


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://host/x", "data:text/plain,x", "https://", "//[", ""])
def test_a_redirect_to_anything_but_a_web_server_is_refused(server, store, target):
    redirect(server, f"/zoo/{FILE}", target)
    assert "redirects to no address of a web server" in refused(store.read, FILE, 10)
    assert len(server.requests) == 1


def test_the_body_of_a_redirect_is_not_read(server, store):
    plan(server, Answer(status=302, headers={"Location": "/x", "Content-Length": str(2**40)}, body=b"", end="stall"))
    server.files["/x"] = CONTENT
    assert received(store) == (0, CONTENT)


def test_messages_leave_out_the_query_of_a_redirect(server, store):
    redirect(server, f"/zoo/{FILE}", "/signed?token=SECRET")
    redirect(server, "/signed?token=SECRET", "/signed?token=SECRET")
    message = refused(store.read, FILE, 10)
    assert f"{server.address}/signed" in message and "SECRET" not in message


def test_user_and_password_of_the_address_are_sent_and_never_shown(server):
    store = HttpStore(f"http://me:p%40ss@127.0.0.1:{server.server_port}/zoo")
    assert received(store)[1] == CONTENT
    assert base64.b64decode(server.requests[0].headers["authorization"].removeprefix("Basic ")) == b"me:p@ss"
    assert store.location == f"{server.address}/zoo"
    plan(server, Answer(status=401), Answer(status=503), Answer(raw=b""), Answer(raw=b"rubbish\n"))
    for _ in range(4):
        with pytest.raises(ZooError) as raised:
            store.read(FILE, 10)
        assert "p%40ss" not in str(raised.value) and "p@ss" not in str(raised.value)


def test_credentials_do_not_go_along_to_another_host(server):
    with FaultyServer() as other:
        store = HttpStore(server.address, headers={"authorization": "Bearer SECRET", "X-Token": "SECRET"})
        redirect(server, "/f", "/same")
        redirect(server, "/same", f"http://you:too@127.0.0.1:{other.server_port}/there")
        redirect(other, "/there", f"{server.address}/back")
        server.files["/back"] = CONTENT
        assert received(store, path="f") == (0, CONTENT)
    here, there = [request.headers for request in server.requests], other.requests[0].headers
    assert [one.get("authorization") for one in here] == ["Bearer SECRET", "Bearer SECRET", None]
    assert [one.get("x-token") for one in here] == ["SECRET", "SECRET", None]
    assert "authorization" not in there and "x-token" not in there


def test_a_proxy_of_the_environment_is_used_unless_no_proxy_names_the_host(server, monkeypatch):
    with FaultyServer() as proxy:
        monkeypatch.setenv("http_proxy", proxy.address)
        proxy.files["http://zoo.invalid/index.json"] = b"{}"
        assert HttpStore("http://zoo.invalid").read("index.json", 10).content == b"{}"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert received(HttpStore(f"{server.address}/zoo")) == (0, CONTENT)
        assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    "location",
    [
        "ftp://host/zoo",
        "file:///zoo",
        "https://",
        "https:///zoo",
        "http://me:PASS@:80",
        "http://me:PASS@host:no",
        "http://me:PA/SS@host",
        "http://me:PASS@host:0/",
        "https://me:PASS@host/zoo?token=1",
        "https://me:PASS@host/zoo#x",
        "http://[::1",
    ],
)
def test_what_is_no_address_of_a_web_server_is_refused_without_showing_the_password(location):
    message = refused(HttpStore, location)
    assert "is not the address of a zoo on a web server" in message
    assert "PA" not in message.replace("PASSWORD", "") and "SS@" not in message


def test_a_header_that_would_make_two_is_refused():
    message = refused(HttpStore, "http://host", {"Authorization": "Bearer SECRET\r\nX: y"})
    assert "'Authorization'" in message and "SECRET" not in message


@pytest.fixture
def https_server(tmp_path):
    """An HTTPS server with a certificate of its own making, and the file of that."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command, which makes the certificate, is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=zoo"
    options = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *options], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with FaultyServer() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.address = server.address.replace("http:", "https:")
        yield server, certificate


def test_https_reads_where_the_certificate_is_known_and_nowhere_else(https_server, monkeypatch):
    server, certificate = https_server
    server.files["/index.json"] = b"{}"
    assert "SSL_CERT_FILE" in refused(HttpStore(server.address).read, "index.json", 10)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert HttpStore(server.address).read("index.json", 10).content == b"{}"


def test_a_redirect_from_https_to_http_is_refused(https_server, server, monkeypatch):
    secure, certificate = https_server
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    redirect(secure, "/index.json", f"{server.address}/zoo/{FILE}")
    assert "redirects from https to http" in refused(HttpStore(secure.address).read, "index.json", 1 << 20)
    assert server.requests == []


def test_a_redirect_from_http_to_https_is_followed(https_server, server, monkeypatch):
    secure, certificate = https_server
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    secure.files["/f"] = CONTENT
    redirect(server, f"/zoo/{FILE}", f"{secure.address}/f")
    assert received(HttpStore(f"{server.address}/zoo")) == (0, CONTENT)


def test_https_cut_off_without_a_farewell_is_transient(https_server, monkeypatch):
    server, certificate = https_server
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server.files["/f"] = CONTENT
    server.plans["/f"] = [Answer(sends=1000, end="reset"), Answer(sends=1000)]
    store = HttpStore(server.address)
    passing(received, store, 0, "f")
    passing(received, store, 0, "f")
