"""--serve_report PORT: the report of a running training at http://127.0.0.1:PORT/, refreshed as metrics.jsonl grows.

Only this machine can reach it. From another machine: ssh -L PORT:127.0.0.1:PORT machine, then the same address.
"""

import html
import re
import socket
import subprocess
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fastvideo.cli import FlagError
from fastvideo.io.messages import is_first

DRAW_LIMIT = 600  # seconds
WAITING = '<!DOCTYPE html><meta http-equiv="refresh" content="5"><title>report</title><p>%s</p>'


class _Handler(BaseHTTPRequestHandler):
    server: "LiveReport"

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost"):  # a page of another site, whose name was pointed at this machine
            self.send_error(403)
        elif self.path == "/":
            self._answer("text/html", self.server.page())
        elif self.path == "/version":
            self._answer("text/plain", self.server.version().encode())
        else:
            self.send_error(404)

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Writes nothing: the terminal belongs to the training."""


class LiveReport(ThreadingHTTPServer):
    """Serves the report of a run's folder on the loopback. A separate process draws it, to not slow training."""

    daemon_threads = True

    def __init__(self, run_dir: str | Path, port: int) -> None:
        """Raises FlagError for a port that is taken."""
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise FlagError("serve_report", port, getattr(error, "strerror", None) or str(error)) from error
        self.run_dir, self._drawing = Path(run_dir), threading.Lock()
        self._page, self._version = b"", ""  # the newest page, and which metrics.jsonl it shows
        print(f"report: http://127.0.0.1:{self.server_port}/", flush=True)

    def handle_error(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        """A browser that leaves before it has the whole page is no error, and no text for the training's terminal."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def page(self) -> bytes:
        """The newest page. Waits until the first page is drawn; later, open pages ask for the `version`."""
        problem = "" if self._page else self._draw()
        return self._page or (WAITING % html.escape(problem)).encode()

    def version(self) -> str:
        """The version of the newest page. Starts to draw a new page if the metrics have changed."""
        if not self._drawing.locked():
            threading.Thread(target=self._draw, daemon=True).start()
        return self._version

    def _draw(self) -> str:
        """Draws a page if the metrics have changed. Returns the reason if there is no page, else an empty string."""
        with self._drawing:
            metrics = self.run_dir / "metrics.jsonl"
            if not metrics.exists():
                return "The first iteration isn't finished yet."
            if str(metrics.stat().st_mtime_ns) == self._version:
                return ""
            command = [sys.executable, "-m", "fastvideo.eval.report", "--run_dir", str(self.run_dir)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=DRAW_LIMIT)
            except subprocess.TimeoutExpired:
                return f"The report was not drawn within {DRAW_LIMIT} seconds."
            if done.returncode:
                return done.stderr[-2000:]
            self._page = (self.run_dir / "report" / "report.html").read_bytes()
            self._version = re.search(rb'data-version="(\d+)"', self._page)[1].decode()
            return ""

    def __enter__(self) -> "LiveReport":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def live_report(run_dir: str | Path, port: int | None) -> AbstractContextManager:
    """A context in which the first of all processes serves the report at the port, if there is one."""
    first = is_first()
    return LiveReport(run_dir, port) if port is not None and first else nullcontext()
