"""Looks at pages: what one would load from outside itself, and how a browser shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import websocket

LOADING = {
    "img": ("src", "srcset"),
    "script": ("src",),
    "link": ("href",),
    "iframe": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "track": ("src",),
    "input": ("src",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
    "base": ("href",),
}


class _Loads(HTMLParser):
    """Collects what a browser would fetch for a page; links to click on are not among it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = tag if tag in ("script", "style") else ""
        for name, value in attributes:
            if value and name in LOADING.get(tag, ()) and not value.startswith(("data:", "#")):
                self.found.append(f"<{tag} {name}={value}>")
            if value and name == "style":
                self._style(value)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, text: str) -> None:
        if self.inside == "style":
            self._style(text)
        elif self.inside == "script":
            self.found += re.findall(r"(?:https?:)?//[\w.-]+\.\w+/[^\s\"'`]*", text)

    def _style(self, text: str) -> None:
        self.found += re.findall(r"@import[^;]*", text)
        self.found += re.findall(r"url\(\s*[\"']?(?!data:|#)[^)]+\)", text)


def external_references(page: str) -> list[str]:
    """Everything that a page would load from outside itself: scripts, styles, fonts, images, frames."""
    loads = _Loads()
    loads.feed(page)
    loads.close()
    return loads.found


# --- A browser -----------------------------------------------------------------------------------------


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Headless Chromium, asked over its debugging protocol; a context manager."""

    def __init__(self, program: str, folder: Path) -> None:
        self.folder, self.requests, self.number = folder, [], 0
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command += ["--remote-allow-origins=*", f"--user-data-dir={folder}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, start_new_session=True, **quiet)

    def __enter__(self) -> Browser:
        file, end = self.folder / "DevToolsActivePort", time.monotonic() + 60
        while not file.is_file() or file.read_text().count("\n") < 1:
            if time.monotonic() > end:
                raise TimeoutError("Chromium did not start")
            time.sleep(0.1)
        port = file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=60) as answer:
            page = next(one for one in json.load(answer) if one["type"] == "page")
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=120)
        self.ask("Page.enable")
        self.ask("Network.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result; requests of the page are kept on the way."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            self._keep(message)
            if message.get("id") == self.number:
                return message["result"]

    def open(self, file: Path, width: int, height: int = 900) -> None:
        """Load a page in a window of that size; `requests` are the addresses that it asked for."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.requests.clear()
        self.ask("Page.navigate", url=file.resolve().as_uri())
        while self._keep(json.loads(self.socket.recv())) != "Page.loadEventFired":
            pass

    def _keep(self, message: dict[str, Any]) -> str:
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message.get("method", "")

    def value(self, script: str) -> Any:
        """What a JavaScript expression gives on the page."""
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")
