"""An S3 server that answers as a test says, and settings to use one."""

import http.server
import os
import socket


def use_server(patch, address):
    """Settings that keep a test from the machine's own AWS configuration."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        patch.setenv(name, os.devnull)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_ENDPOINT_URL_S3", address)
    patch.setenv("AWS_ACCESS_KEY_ID", "publisher")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("NO_PROXY", "127.0.0.1")


class Script(http.server.BaseHTTPRequestHandler):
    """Answers each request as the test's function says; keeps method and headers of all."""

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, dict(self.headers), body))
        told = self.server.behaviour(self)
        if told is None:  # hang up without an answer
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        status, headers, content = told
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.close_connection = True

    protocol_version = "HTTP/1.1"  # so that a client that asks before it sends a body is told to go on
    do_GET = do_PUT = do_HEAD = do_DELETE = answer

    def log_message(self, *_):
        """Quiet."""


def refusal(status, code, message="because"):
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
    return lambda request: (status, {"Content-Type": "application/xml"}, body)


def keeps(objects, ignoring=(), lose_answer_to=()):
    """A small S3 that may ignore conditions, or write and not answer."""

    def behaviour(request):
        key, tag = request.path.partition("?")[0], request.headers.get("If-Match")
        if request.command == "PUT":
            taken = request.headers.get("If-None-Match") == "*" and key in objects
            stale = tag is not None and (key not in objects or objects[key][0] != tag)
            if (taken and "If-None-Match" not in ignoring) or (stale and "If-Match" not in ignoring):
                return refusal(412, "PreconditionFailed")(request)
            objects[key] = (f'"{len(request.server.seen)}"', request.headers.get("x-amz-meta-attempt"))
            if any(part in key for part in lose_answer_to):
                return None
            return 200, {"ETag": objects[key][0]}, b""
        if request.command == "DELETE":
            objects.pop(key, None)
            return 204, {}, b""
        if key not in objects:
            return refusal(404, "NoSuchKey")(request)
        return 200, {"ETag": objects[key][0], "x-amz-meta-attempt": objects[key][1]}, b""

    return behaviour
