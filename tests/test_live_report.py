"""--serve_report: the report of a running training over HTTP, only for this machine."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing

from fastvideo.eval.live import LiveReport

import pytest
from browser import Browser
from conftest import PROMPTS, ROOT, TIME_LIMIT


def get(url, **headers):
    """(status, text) of a request without a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=TIME_LIMIT) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def wait_for(condition):
    """Waits for a true value and returns it."""
    end = time.monotonic() + TIME_LIMIT
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("nothing came within two minutes")


def test_a_browser_that_leaves_prints_nothing_into_the_training(tmp_path, capfd, monkeypatch):
    left = threading.Event()
    handle = LiveReport.handle_error
    monkeypatch.setattr(LiveReport, "handle_error", lambda *args: (handle(*args), left.set()))
    monkeypatch.setattr(LiveReport, "page", lambda self: bytes(50_000_000))  # more than the connection holds
    with LiveReport(tmp_path, 0) as server:
        capfd.readouterr()
        with socket.create_connection(("127.0.0.1", server.server_port)) as browser:
            browser.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert browser.recv(16)
        assert left.wait(TIME_LIMIT)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_running_training_shows_its_report_to_this_machine_alone(
    flags, train, run_at, tmp_path, subprocess_environment, capsys
):
    prompts = tmp_path / "eval.txt"
    prompts.write_text(f"{PROMPTS[0]}\n<script>alert(1)</script> 🐟\n", encoding="utf-8")
    run, output = run_at("run"), tmp_path / "output"
    command = flags(output_dir=run.folder, max_train_steps=1000, serve_report=0, eval_steps=5, eval_prompts=prompts)
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "fastvideo/train_grpo_flux.py", *command],
            cwd=ROOT, env=subprocess_environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        address = wait_for(lambda: re.search(r"http://127\.0\.0\.1:(\d+)/", output.read_text()))
        url, port = address[0], int(address[1])
        wait_for((run.folder / "metrics.jsonl").exists)
        wait_for(lambda: len(run.metrics) > 5)  # two evaluations, whose prompts and pictures are shown
        status, page = get(url)
        assert status == 200 and "of 1,000 planned" in page
        assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page
        shown = int(re.search(r"<dt>Iterations</dt><dd><b>(\d+)</b>", page)[1])
        with closing(Browser(tmp_path / "profile", online=True)) as browser:
            browser.open(url)
            tile = "[...document.querySelectorAll('.tiles div')].find(e => e.innerText.startsWith('Iterations'))"
            iterations = f"parseInt({tile}?.querySelector('b').innerText)"
            first = browser.evaluate(iterations)
            assert first >= shown >= 2
            browser.wait(f"{iterations} > {first}")  # the page loads itself again
        assert process.poll() is None

        assert get(url + "args.json")[0] == get(url + "../args.json")[0] == 404
        assert get(url, Host=f"elsewhere.example:{port}")[0] == 403
        for other in ("127.0.0.2", socket.gethostbyname(socket.gethostname()), "::1"):
            if other != "127.0.0.1":
                with pytest.raises(OSError):
                    socket.create_connection((other, port), timeout=5)

        with pytest.raises(SystemExit):
            train("second", serve_report=port)
        assert f"--serve_report {port}: Address already in use" in capsys.readouterr().err
        assert not (tmp_path / "second").exists()
    finally:
        process.terminate()
        process.wait()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert json.loads((run.folder / "args.json").read_text())["serve_report"] == 0
