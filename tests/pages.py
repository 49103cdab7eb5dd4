"""What a page would load from outside itself: a report must load nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

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
