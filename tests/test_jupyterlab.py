"""A real JupyterLab: a notebook is opened through the server's API and run on a kernel, as a reader would."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket
from PIL import Image

from lt_core import paths
from lt_core.runner import source_of

NOTEBOOK = "notebooks/00_overview.ipynb"
FIGURES = ("F1.png", "F3.png")
SECONDS = 300  # for a start or an answer, on a busy machine


class Lab:
    """A running server, asked as a browser asks it."""

    def __init__(self, address: str, token: str) -> None:
        self.address, self.token = address, token

    def ask(self, path: str, content: dict[str, Any] | None = None) -> bytes:
        """GET, or POST with content."""
        data = None if content is None else json.dumps(content).encode()
        headers = {"Authorization": f"token {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.read()

    def kernel_channels(self, kernel: str) -> websocket.WebSocket:
        address = f"{self.address.replace('http', 'ws', 1)}api/kernels/{kernel}/channels"
        return websocket.create_connection(
            address, header=[f"Authorization: token {self.token}"], timeout=SECONDS
        )


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """JupyterLab on the checkout, with everything that is written below tmp_path."""
    settings = {"JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_CONFIG_DIR": "config", "IPYTHONDIR": "ipython"}
    environment = os.environ | {name: str(tmp_path / folder) for name, folder in settings.items()}
    environment |= {"LT_OUTPUT_ROOT": str(tmp_path / "out"), "PYTHONPATH": str(paths.ROOT)}
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        "--port=0",
    ]
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [*command, f"--ServerApp.root_dir={paths.ROOT}"], env=environment, stdout=log, stderr=log
        )
    try:
        yield started(server, tmp_path)
    finally:
        server.terminate()
        server.wait(60)


def started(server: subprocess.Popen, folder: Path) -> Lab:
    """The server, once it has said where it is and answers there."""
    deadline = time.monotonic() + SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        for file in (folder / "runtime").glob("jpserver-*.json"):
            try:
                said = json.loads(file.read_text(encoding="utf-8"))
                lab = Lab(said["url"], said["token"])
                lab.ask("api/status")
                return lab
            except (OSError, ValueError):  # the file is half written, or the port not yet open
                pass
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start: {(folder / 'log').read_text(encoding='utf-8')}")


def run_cell(channels: websocket.WebSocket, code: str) -> list[dict[str, Any]]:
    """Outputs of a code cell; an error in it fails the test."""
    message = uuid.uuid4().hex
    header = {
        "msg_id": message,
        "msg_type": "execute_request",
        "session": "test",
        "username": "",
        "version": "5.3",
    }
    content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False}
    request = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
    channels.send(json.dumps(request))
    outputs = []
    while True:
        answer = json.loads(channels.recv())
        if answer["parent_header"].get("msg_id") != message:
            continue
        assert answer["msg_type"] != "error", "\n".join(answer["content"]["traceback"])
        if answer["msg_type"] in ("display_data", "execute_result"):
            outputs.append(answer["content"]["data"])
        if answer["msg_type"] == "status" and answer["content"]["execution_state"] == "idle":
            return outputs


@pytest.mark.slow
def test_a_notebook_opens_and_runs_in_jupyterlab(lab: Lab, tmp_path: Path) -> None:
    assert b"JupyterLab" in lab.ask("lab")
    notebook = json.loads(lab.ask(f"api/contents/{NOTEBOOK}"))["content"]
    kernel_name = notebook["metadata"]["kernelspec"]["name"]
    session = {"path": NOTEBOOK, "name": "", "type": "notebook", "kernel": {"name": kernel_name}}
    kernel = json.loads(lab.ask("api/sessions", session))["kernel"]["id"]
    channels = lab.kernel_channels(kernel)
    try:
        cells = [source_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]
        outputs = [output for cell in cells for output in run_cell(channels, cell)]
    finally:
        channels.close()
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) for data in outputs if "image/png" in data
    ]
    assert len(pictures) >= len(FIGURES) and all(picture.width > 600 for picture in pictures)
    made = tmp_path / "out" / "figures" / "embedded"
    assert all((made / name).stat().st_size > 10_000 for name in FIGURES)
