"""The report in a browser, on a desk and on a phone: pages of the last run, and the one that is committed.

Skipped without Chromium. Pages of a run are there after `./run_all.sh` (LT_OUTPUT_ROOT: in another place).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from pages import CHROMIUM, Browser

from lt_core import paths

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

DESK, PHONE = (1280, 900), (390, 844)  # pixels
SCREENS = 2  # within which answer and main result stand
OWN = sorted(paths.reports("embedded").glob("*.html"))
COMMITTED = [file for file in [paths.ROOT / "docs" / "report.html"] if file.is_file()]
PAGES = [*OWN, *COMMITTED] or [
    pytest.param(None, marks=pytest.mark.skip(reason="no pages: run ./run_all.sh"))
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page and page.stem)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(CHROMIUM, tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@each_page
def test_no_request_leaves_the_machine(browser: Browser, page: Path) -> None:
    browser.open(page, *DESK)
    assert browser.requests
    assert [url for url in browser.requests if urlparse(url).scheme not in ("file", "data")] == []


@each_page
def test_nothing_scrolls_sideways_on_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, *PHONE)
    browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.value("document.documentElement.scrollWidth") <= PHONE[0]


@each_page
def test_the_total_is_seen_without_a_swipe(browser: Browser, page: Path) -> None:
    """Of every table of results, also of those in a fold, at both widths."""
    for width, height in (DESK, PHONE):
        browser.open(page, width, height)
        browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
        ends = browser.value(
            "[...document.querySelectorAll('.lt-table')].flatMap(table => [...table.rows].map("
            "row => row.lastElementChild.getBoundingClientRect().right))"
        )
        assert all(0 < end <= width for end in ends)


@each_page
def test_the_head_of_a_table_stays(browser: Browser, page: Path) -> None:
    for width, height in (DESK, PHONE):
        browser.open(page, width, height)
        browser.value("var rows = document.querySelectorAll('.lt-table tbody tr'); rows[7]?.scrollIntoView()")
        head = (
            "rows[7]?.closest('table').querySelector('thead th:last-child').getBoundingClientRect().top ?? 0"
        )
        assert abs(browser.value(head)) < 4


@pytest.mark.parametrize("page", OWN or PAGES[:1], ids=lambda page: page and page.stem)
def test_answer_and_main_result_come_first(browser: Browser, page: Path) -> None:
    """The answer and the top of the first table, figure or list of results stand within two screens."""
    answer = "[...document.querySelectorAll('strong, .lead')].find(e => /^Here.$|^Of /.test(e.textContent))"
    result = "document.querySelector('.shown table:not(.claims), .lt-table, figure, .results')"
    for width, height in (DESK, PHONE):
        browser.open(page, width, height)
        for what in (answer, result):
            top = browser.value(f"{what}?.getBoundingClientRect().top + scrollY")
            assert top is not None and top < SCREENS * height


@each_page
def test_links_resolve(browser: Browser, page: Path) -> None:
    browser.open(page, *DESK)
    for link in browser.value("[...document.links].map(link => link.href)"):
        address = urlparse(link)
        if address.scheme != "file":
            continue
        file = Path(unquote(address.path))
        assert file.is_file(), link
        if address.fragment:
            assert re.search(rf'id="{re.escape(address.fragment)}"', file.read_text(encoding="utf-8")), link


@each_page
def test_every_picture_is_shown_and_described(browser: Browser, page: Path) -> None:
    browser.open(page, *DESK)
    assert browser.value("[...document.images].every(image => image.alt && image.naturalWidth > 0)")
