"""A real HTTP server on the loopback that speaks the chat protocol of UnifiedReward's endpoints, and misbehaves."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class ChatHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        status, reply = server.answer(body["messages"][0]["content"])
        with server.lock:
            server.busy -= 1
        if status is None:  # drop the connection
            self.connection.close()
            return
        if isinstance(reply, str):
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments):
        pass


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

    A reply that is a text is put into an answer of the protocol, bytes go out as they are, status None hangs up.
    `requests` of the server: (path, headers, body) in the order they came.
    """
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return lambda answer: http_server(ChatHandler, answer=answer, requests=[], busy=0, most_busy=0)
