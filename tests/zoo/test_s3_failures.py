import http.server
import socket
import threading

import pytest
from scripted_s3 import Script, keeps, refusal, use_server

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores.s3 import S3Store
from bissl_zoo.zoo.stores.store import Conflict, Transient

pytest.importorskip("boto3", reason='S3 needs boto3: pip install "bissl_zoo[s3]"')


@pytest.fixture
def scripted(monkeypatch):
    """Start a server that answers as a function says; gives the requests that it has seen."""
    servers = []

    def start(behaviour):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Script)
        server.behaviour, server.seen = behaviour, []
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
        use_server(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        return server.seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def drain(store, path, offset=0):
    with store.open(path, offset) as body:
        return body.start, b"".join(body.blocks)


@pytest.mark.parametrize(
    ("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (429, "TooMany"), (400, "RequestTimeout")]
)
def test_a_busy_server_is_worth_another_attempt_which_the_store_leaves_to_others(scripted, status, code):
    seen = scripted(refusal(status, code))
    with pytest.raises(Transient, match=f"{status} {code}"):
        S3Store("s3://zoo").read("index.json", 10)
    assert len(seen) == 1


def test_a_server_that_hangs_up_or_is_not_there_is_worth_another_attempt(scripted, monkeypatch):
    scripted(lambda request: None)
    with pytest.raises(Transient, match="s3://zoo/index.json"):
        S3Store("s3://zoo").read("index.json", 10)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(Transient, match="Could not connect.*AWS_ENDPOINT_URL_S3"):
            S3Store("s3://zoo").read("index.json", 10)


def test_a_body_that_breaks_off_is_worth_another_attempt(scripted):
    scripted(lambda request: (200, {"Content-Length": "100", "ETag": '"1"'}, b"only this"))
    with pytest.raises(Transient):
        drain(S3Store("s3://zoo"), "x/model")
    with pytest.raises(Transient):
        S3Store("s3://zoo").read("index.json", 1000)


def test_what_the_reader_of_a_body_raises_is_not_taken_for_the_servers(scripted):
    scripted(lambda request: (200, {"ETag": '"1"'}, b"content"))
    with pytest.raises(OSError, match="disk full"), S3Store("s3://zoo").open("x/model"):
        raise OSError("disk full")


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (403, "SignatureDoesNotMatch"), (400, "ExpiredToken")]
)
def test_a_refusal_names_the_rights_that_it_takes(scripted, status, code):
    scripted(refusal(status, code))
    with pytest.raises(ZooError, match=f"{code}.*aws sts get-caller-identity.*s3:ListBucket.*s3:PutObject") as caught:
        S3Store("s3://zoo").read("index.json", 10)
    assert not isinstance(caught.value, Transient)


def test_without_credentials_requests_are_anonymous_and_a_refusal_says_so(scripted, monkeypatch):
    seen = scripted(refusal(403, "AccessDenied"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ZooError, match="No credentials were found.*aws configure"):
        S3Store("s3://zoo").read("index.json", 10)
    assert "Authorization" not in seen[0][2]


@pytest.mark.parametrize("ignored", ["If-None-Match", "If-Match"])
def test_a_server_that_ignores_conditions_is_not_published_to(scripted, ignored):
    objects = {}
    scripted(keeps(objects, ignoring=[ignored]))
    store = S3Store("s3://zoo")
    for write in (lambda: store.create("x/model", b""), lambda: store.replace("index.json", b"", None)):
        with pytest.raises(ZooError, match=f"ignores {ignored.replace('-', '')}.*Publish to a folder and copy it"):
            write()
    assert objects == {}


def test_a_write_whose_answer_is_lost_counts_as_written(scripted):
    objects = {}
    scripted(keeps(objects, lose_answer_to=["index.json", "claim"]))
    store = S3Store("s3://zoo")
    store.create("x/claim", b"mine")
    with pytest.raises(Conflict):
        store.create("x/claim", b"mine")
    store.replace("index.json", b"1", None)
    assert sorted(objects) == ["/zoo/index.json", "/zoo/x/claim"]


def test_a_write_that_did_not_arrive_is_worth_another_attempt(scripted):
    objects = {}
    keep = keeps(objects)
    scripted(lambda request: None if "lost" in request.path and request.command == "PUT" else keep(request))
    with pytest.raises(Transient):
        S3Store("s3://zoo").create("x/lost", b"")
    assert objects == {}


def test_folders_on_a_second_page_are_listed_too(scripted):
    def page(request):
        last = "continuation-token=more" in request.path
        more = "" if last else "<IsTruncated>true</IsTruncated><NextContinuationToken>more</NextContinuationToken>"
        name = "b" if last else "a"
        body = f"<ListBucketResult>{more}<CommonPrefixes><Prefix>f/{name}/</Prefix></CommonPrefixes></ListBucketResult>"
        return 200, {"Content-Type": "application/xml"}, body.encode()

    scripted(page)
    assert S3Store("s3://zoo/f").folders() == ["a", "b"]
