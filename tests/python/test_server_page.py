"""The page at / in a browser: chat, a job from its file to its end, and the numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from served import CHAT_ROWS, ENGINE, Served, json_lines, serving, wait_for, write_model

import flexcore as fc


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(fc.LLM(write_model(tmp_path / "model"), **ENGINE), tmp_path / "data", api_keys=("right",)) as server:
        yield server


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def pictures(tmp_path: Path) -> Path:
    """Where a person may look at them."""
    return Path(os.environ.get("FLEXCORE_SCREENSHOTS", tmp_path))


def test_page(served: Served, browser: Browser, tmp_path: Path) -> None:
    browser.go(served.url)
    wait_for(lambda: browser.run("!document.getElementById('key').hidden"))  # it asks for the key
    browser.errors.clear()  # of the 401s
    browser.run("key.value = 'right'; key.onchange()")
    wait_for(lambda: browser.run("document.getElementById('model').options.length") == 1)

    browser.run("document.getElementById('prompt').value = 'hello <b>there</b>'; send()")
    wait_for(lambda: browser.run("writing === null && messages.length") == 2)
    said = browser.run("document.querySelector('.assistant').textContent")
    assert said and said == browser.run("messages[1].content")
    assert browser.run("document.querySelector('.user').innerHTML") == "hello &lt;b&gt;there&lt;/b&gt;"

    data = tmp_path / "train.jsonl"
    data.write_bytes(json_lines(CHAT_ROWS * 4))
    browser.choose_file("input[type=file]", data)
    browser.run("document.querySelector('input[name=suffix]').value = 'page'")
    browser.run("document.querySelector('input[name=epochs]').value = 300")
    browser.run("document.getElementById('start').requestSubmit()")
    status = "document.querySelector('.status')?.textContent"
    wait_for(lambda: browser.run(status) == "running")
    wait_for(lambda: browser.run("document.querySelector('svg.loss path')?.getAttribute('d').length") > 200)
    wait_for(lambda: float(browser.run("document.getElementById('trained').textContent")) > 0)
    for name, dark in (("page", False), ("page-dark", True)):
        browser.dark(dark)
        assert browser.screenshot(pictures(tmp_path) / f"{name}.png")[:4] == b"\x89PNG"
    browser.run("document.querySelector('[data-act=pause]').click()")
    wait_for(lambda: browser.run(status) == "paused")
    browser.run("document.querySelector('[data-act=resume]').click()")
    wait_for(lambda: browser.run(status) == "running")
    browser.run("document.querySelector('[data-act=cancel]').click()")
    wait_for(lambda: browser.run(status) == "cancelled")
    assert served.state.store.select("SELECT status FROM jobs")[0]["status"] == "cancelled"
    assert browser.run("document.getElementById('explain').textContent")
    assert browser.errors == []


def test_an_upload_that_is_refused_says_so(served: Served, browser: Browser, tmp_path: Path) -> None:
    browser.go(served.url)
    browser.run("key.value = 'right'; key.onchange()")
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n')
    browser.choose_file("input[type=file]", tmp_path / "bad.jsonl")
    browser.run("document.getElementById('start').requestSubmit()")
    wait_for(lambda: browser.run("document.querySelector('.status')?.textContent") == "failed")
    assert "bad.jsonl:1" in browser.run("document.querySelector('.job').textContent")
