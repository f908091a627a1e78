"""A real HTTP server on the loopback with the chat protocol of UnifiedReward's endpoints. It can misbehave."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class QuietHandler(BaseHTTPRequestHandler):
    """Base class of the tests' HTTP handlers."""

    def read_json(self) -> dict:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def reply(self, status: int | None, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Sends a reply. With status None, closes the connection instead."""
        if status is None:
            self.connection.close()
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class ChatHandler(QuietHandler):
    def do_GET(self):
        models = {"data": [{"id": name, "root": self.server.root} for name in self.server.models]}
        found = json.dumps(models).encode() if self.server.list is None else self.server.list
        self.reply(self.server.list_status, found) if self.path.startswith("/v1/models") else self.reply(404, b"")

    def do_POST(self):
        server, body = self.server, self.read_json()
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        status, reply = server.answer(body["messages"][0]["content"])
        with server.lock:
            server.busy -= 1
        if isinstance(reply, dict):  # first words -> their probabilities
            top = [{"token": token, "logprob": math.log(p)} for token, p in reply.items()]
            logprobs = {"content": [{**top[0], "top_logprobs": top}]}
            message = {"role": "assistant", "content": top[0]["token"]}
            reply = json.dumps({"choices": [{"message": message, "logprobs": logprobs}]}).encode()
        if isinstance(reply, str):
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        self.reply(status, reply)


@pytest.fixture
def http_server():
    """http_server(Handler, name=value, ...) -> a real server with these attributes, its `url` and a `lock`."""
    servers = []

    def start(handler: type, **attributes):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads, server.handle_error = True, lambda *_: None  # clients here hang up on purpose
        server.url, server.lock = f"http://127.0.0.1:{server.server_port}", threading.Lock()
        vars(server).update(attributes)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def chat_server(monkeypatch, http_server):
    """chat_server(answer) starts a server; answer(content of the message) -> (status or None, reply).

    A text reply is wrapped in the protocol, and so are the probabilities of first words, {word: probability}; bytes are
    sent unchanged; status None closes the connection.
    The server's `requests`: (path, headers, body) in order of arrival. Its `models`: ids that /v1/models names;
    `root`: the name of their weights, if it isn't the id. `list`: what /v1/models answers in place of these, with
    `list_status`.
    """
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    answers = {"models": ["judge"], "root": None, "list": None, "list_status": 200}
    return lambda answer: http_server(ChatHandler, answer=answer, requests=[], busy=0, most_busy=0, **answers)
