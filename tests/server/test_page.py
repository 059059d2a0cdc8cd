"""The page in a real Chromium, against a real server process."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chromium import launched_chromium

from .process import ServerProcess, running_server
from .slow_demo import save_slow_demo

WAIT_MS = 60_000
KEY = "a-key"
SMALL = ("--kv-cache-memory-bytes", str(32 << 20), "--max-num-seqs", "8")
PROMPT = "class Stack:"

# Pixels of the map in the colour that the legend says live pages have.
LIVE_PIXELS = """() => {
  const data = (canvas) => {
    const copy = new OffscreenCanvas(canvas.width, canvas.height);
    const context = copy.getContext("2d", { willReadFrequently: true });
    context.drawImage(canvas, 0, 0);
    return context.getImageData(0, 0, canvas.width, canvas.height);
  };
  const swatch = data(document.querySelector("#legend canvas"));
  const at = 4 * (Math.floor(swatch.height / 2) * swatch.width + Math.floor(swatch.width / 2));
  const [red, green, blue] = swatch.data.slice(at, at + 3);
  const map = data(document.getElementById("map")).data;
  let count = 0;
  for (let i = 0; i < map.length; i += 4) {
    count += map[i] === red && map[i + 1] === green && map[i + 2] === blue;
  }
  return count;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched_chromium() as launched:
        yield launched


@pytest.fixture(scope="module")
def server(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = save_slow_demo(tmp_path_factory.mktemp("slow_demo"))
    num_bytes = 384 << 20  # as many tokens as the demo model has in 32 MiB
    flags = ("--kv-cache-memory-bytes", str(num_bytes), *SMALL[2:], "--served-model-name", "demo")
    with running_server(model, *flags, "--fused", "off") as process:
        yield process


class Visit:
    """One page, and what it did that it should not have.

    Attributes:
        requests: URLs that it asked for.
        complaints: errors and warnings on its console.
    """

    def __init__(self, browser: Any, url: str, **settings: Any) -> None:
        self.url = url
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 860}, **settings}
        )
        self.context.set_default_timeout(WAIT_MS)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(f"{url}/")

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def wait_for_state(self, text: str) -> None:
        """Until the page says how the server is."""
        self.page.locator("#status-text", has_text=re.compile(f"^{text}$")).wait_for()

    def be_steady(self, max_tokens: int) -> None:
        """Let the likeliest tokens be written: this model repeats itself then, and does not end."""
        settings = {"temperature": 0, "max_tokens": max_tokens}
        for name, value in settings.items():
            self.page.evaluate(
                "([name, value]) => { document.getElementById(name).value = value; }", [name, value]
            )

    def choose(self, mode: str) -> None:
        self.page.locator(f"input[name=mode][value={mode}]").check(force=True)

    def set(self, **settings: object) -> None:
        """Fill in settings, by the ids of their fields."""
        self.page.locator("#settings").evaluate("details => { details.open = true; }")
        for name, value in settings.items():
            self.page.fill(f"#{name}", str(value))

    def send(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def wait_until_idle(self) -> None:
        self.page.locator("#send:not([disabled])").wait_for()

    def until(self, script: str, argument: Any = None) -> None:
        """Until a script is true in the page."""
        self.page.wait_for_function(script, arg=argument)

    @property
    def text(self) -> str:
        """The first completion so far, what it goes on from included."""
        return str(self.page.locator(".turn .choice .text").last.text_content())

    def check(self, *expected: str) -> None:
        """Nothing but the ``expected`` complaints was made, and nobody else was asked."""
        strangers = [url for url in self.requests if not url.startswith(self.url)]
        assert strangers == []
        unexpected = [
            text for text in self.complaints if not any(part in text for part in expected)
        ]
        assert unexpected == []


Open = Callable[..., Visit]


@pytest.fixture
def open_page(browser: Any, server: ServerProcess) -> Iterator[Open]:
    """``open_page(color_scheme="dark")``: a visit to the server, or to ``url``."""
    visits: list[Visit] = []

    def visit(url: str = server.url, **settings: Any) -> Visit:
        visits.append(Visit(browser, url, **settings))
        return visits[-1]

    yield visit
    for one in visits:
        one.context.close()


def running_seqs(server: ServerProcess) -> int:
    count: int = httpx.get(f"{server.url}/page-map").json()["totals"]["running_seqs"]
    return count


def test_text_streams_into_the_page_and_the_map_changes(open_page: Open) -> None:
    visit = open_page()
    visit.wait_for_state("Running")
    page = visit.page
    assert page.title() == "vmalloc"
    assert page.locator("#model-name").text_content() == "demo"
    visit.choose("completion")
    visit.be_steady(1500)
    before = page.locator("#in-use").text_content()
    visit.send(PROMPT)
    visit.until("() => document.querySelector('.turn .text')?.textContent.length > 60")
    first = visit.text
    visit.until(f"() => ({LIVE_PIXELS})() > 200")
    assert page.locator("#map-empty").is_hidden()
    assert page.locator("#in-use").text_content() != before
    num_pixels = page.evaluate(LIVE_PIXELS)
    visit.until(f"(least) => ({LIVE_PIXELS})() > least", num_pixels)  # it grows
    assert page.locator("#output").get_attribute("aria-busy") == "true"
    visit.wait_until_idle()
    assert page.locator("#output").get_attribute("aria-busy") == "false"
    assert visit.text.startswith(first)
    assert visit.text.startswith(PROMPT)
    usage = str(page.locator(".usage").text_content())
    assert re.search(r"\d+ prompt tokens", usage)
    assert "1500 written" in usage
    assert re.search(r"[\d.]+ tokens/s · first after [\d.]+ m?s", usage)
    assert "reached max tokens" in usage
    visit.until(f"() => ({LIVE_PIXELS})() === 0")  # and leaves
    assert float(str(page.locator("#tokens-per-s").text_content()).replace(",", "")) > 0
    visit.check()


def test_cached_tokens_are_shown(open_page: Open) -> None:
    visit = open_page()
    visit.wait_for_state("Running")
    visit.choose("completion")
    visit.set(max_tokens=8)
    for _ in range(2):
        visit.send("import collections\n" * 12)
        visit.wait_until_idle()
    assert re.search(
        r"prompt tokens \(\d+ cached\)", str(visit.page.locator(".usage").text_content())
    )
    visit.check()


def test_a_chat_goes_on_from_what_was_said(open_page: Open) -> None:
    visit = open_page()
    visit.wait_for_state("Running")
    visit.choose("chat")
    visit.set(max_tokens=24, system="You write Python.", seed=3)
    visit.send("import os")
    visit.wait_until_idle()
    with visit.page.expect_request("**/v1/chat/completions") as sent:
        visit.send("and now sys")
    visit.wait_until_idle()
    messages = sent.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"] == "You write Python."
    turns = visit.page.locator(".turn h3").all_text_contents()
    assert turns == ["You", "Model", "You", "Model"]
    assert messages[2]["content"] == visit.page.locator(".turn .choice .text").first.text_content()
    visit.check()


def test_a_seed_gives_the_same_text_and_n_several(open_page: Open) -> None:
    visit = open_page()
    visit.wait_for_state("Running")
    visit.choose("completion")
    visit.set(max_tokens=24, seed=11, n=3, temperature=1)
    texts = []
    for _ in range(2):
        visit.send(PROMPT)
        visit.wait_until_idle()
        texts.append(visit.page.locator(".turn .choice .text").all_text_contents())
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    visit.check()


def test_the_stop_button_ends_the_request_on_the_server(
    open_page: Open, server: ServerProcess
) -> None:
    visit = open_page()
    visit.wait_for_state("Running")
    visit.choose("completion")
    visit.be_steady(1900)
    visit.send(PROMPT)
    visit.until("() => document.querySelector('.turn .text')?.textContent.length > 60")
    visit.page.locator("#stop").click()
    visit.wait_until_idle()
    assert str(visit.page.locator(".usage").text_content()).startswith("Stopped · about")
    assert visit.page.locator("#stop").is_hidden()
    assert visit.page.evaluate("document.activeElement.id") == "prompt"
    deadline = time.monotonic() + 60
    while running_seqs(server):
        assert time.monotonic() < deadline, "the request runs on"
        time.sleep(0.05)
    text = visit.text
    assert len(text) > 60
    # A finished answer would have all of its tokens.
    written = httpx.get(f"{server.url}/page-map").json()["totals"]["generated_tokens"]
    visit.send(PROMPT)  # and the page goes on
    visit.until("() => document.querySelector('.turn .text')?.textContent.length > 60")
    visit.page.keyboard.press("Escape")
    visit.wait_until_idle()
    assert httpx.get(f"{server.url}/page-map").json()["totals"]["generated_tokens"] < written + 1900
    visit.check()


def test_everything_can_be_done_by_keyboard(open_page: Open) -> None:
    visit = open_page()
    visit.wait_for_state("Running")
    visit.be_steady(1900)
    page = visit.page
    stops = tab_stops(visit, until="prompt")
    assert stops[0] == "skip"
    assert {"theme", "mode", "clear", "output"} <= set(stops)
    page.keyboard.type("import os")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("import sys")
    assert page.locator("#prompt").input_value() == "import os\nimport sys"
    page.keyboard.press("Enter")
    visit.until("() => document.querySelector('.turn .text')?.textContent.length > 60")
    tab_stops(visit, until="map")
    visit.until("() => document.getElementById('map-cursor').textContent.includes('Slot')")
    assert page.locator("#tooltip").is_visible()
    # Rows of earlier requests may stand above it, and its own comes with the next frame.
    for step in range(320):
        if "your request" in str(page.locator("#map-cursor").text_content()):
            break
        page.keyboard.press("ArrowDown" if step // 16 % 2 == 0 else "ArrowUp")
    assert re.search(r"Slot \d+ · your request", str(page.locator("#map-cursor").text_content()))
    page.keyboard.press("Escape")  # also stops what is written
    assert page.locator("#tooltip").is_hidden()
    visit.wait_until_idle()
    assert str(page.locator(".usage").text_content()).startswith("Stopped")
    page.locator("input[name=theme][value=auto]").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    visit.check()


def tab_stops(visit: Visit, until: str) -> list[str]:
    """Press Tab until the element of that id has the focus; every stop must be seen to have it."""
    stops: list[str] = []
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        stop, is_marked = visit.page.evaluate(
            """() => {
              const at = document.activeElement;
              const shown = [at, at.nextElementSibling, at.parentElement, at.closest("form")];
              const styles = shown.filter(Boolean).map((one) => getComputedStyle(one));
              const isMarked = styles.some(
                (style) => style.outlineStyle === "solid" || style.boxShadow !== "none");
              return [at.id || at.name || at.className, isMarked];
            }"""
        )
        assert is_marked, f"nothing shows that {stop} has the focus"
        stops.append(stop)
        if stop == until:
            return stops
    raise AssertionError(f"no Tab leads to {until}: {stops}")


def test_the_map_says_what_is_under_the_pointer(open_page: Open) -> None:
    visit = open_page()
    visit.wait_for_state("Running")
    visit.choose("completion")
    visit.be_steady(1900)
    visit.send(PROMPT)
    visit.until(f"() => ({LIVE_PIXELS})() > 400")
    tooltip = visit.page.locator("#tooltip")
    box = visit.page.locator("#map").bounding_box()
    # Rows of earlier requests may stand above it.
    for y in range(32, int(box["height"]), 6):
        visit.page.locator("#map").hover(position={"x": 136, "y": y})
        if tooltip.is_visible() and "your request" in str(tooltip.text_content()):
            break
    assert re.search(
        r"Slot \d+ · your request · [\d,]+ tokens\nPages? .*\n(Live|Shared): ",
        str(tooltip.text_content()),
    )
    visit.page.mouse.move(5, 5)
    tooltip.wait_for(state="hidden")
    visit.page.locator("#stop").click()
    visit.check()


def luminance(visit: Visit) -> float:
    """How light the page is, 0 to 255."""
    text = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = (int(part) for part in re.findall(r"\d+", text)[:3])
    return 0.2 * red + 0.7 * green + 0.1 * blue


def test_light_and_dark(open_page: Open) -> None:
    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    for visit in (light, dark):
        visit.wait_for_state("Running")
    assert luminance(light) > 200
    assert luminance(dark) < 60
    swatch = "() => document.querySelector('#legend canvas').toDataURL()"
    light_swatch, dark_swatch = light.page.evaluate(swatch), dark.page.evaluate(swatch)
    assert light_swatch != dark_swatch
    dark.page.locator("input[name=theme][value=light]").check(force=True)
    assert luminance(dark) > 200
    dark.until(f"(wanted) => ({swatch})() === wanted", light_swatch)
    dark.page.reload()
    assert luminance(dark) > 200  # it was kept
    dark.page.locator("input[name=theme][value=auto]").check(force=True)
    assert luminance(dark) < 60
    dark.page.emulate_media(color_scheme="light")
    assert luminance(dark) > 200
    light.check()
    dark.check()


def test_what_the_server_refuses_is_said_in_words(open_page: Open) -> None:
    visit = open_page()
    visit.wait_for_state("Running")
    visit.choose("completion")
    visit.set(temperature=9)
    visit.send(PROMPT)
    error = visit.page.locator("#error")
    error.wait_for()
    assert "temperature" in str(error.text_content())
    assert "9" in str(error.text_content())
    assert visit.page.locator("#prompt").input_value() == PROMPT  # to send again
    assert visit.page.locator(".turn").count() == 0
    visit.set(temperature=0, max_tokens=8)
    visit.page.press("#prompt", "Enter")
    visit.wait_until_idle()
    visit.until("() => document.querySelector('.turn .text')?.textContent.length > 13")
    assert error.is_hidden()
    visit.check("status of 400")


def test_a_key_is_asked_for_and_stays_in_the_tab(browser: Any, open_page: Open) -> None:
    with running_server("--api-key", KEY, *SMALL) as guarded:
        visit = open_page(guarded.url)
        visit.wait_for_state("API key needed")
        visit.choose("completion")
        visit.set(max_tokens=8)
        visit.send(PROMPT)
        error = visit.page.locator("#error")
        error.wait_for()
        assert str(error.text_content()).startswith("The server wants an API key")
        visit.page.fill("#api-key", KEY)
        visit.page.press("#api-key", "Tab")
        visit.wait_for_state("Running")
        assert visit.page.locator("#model-name").text_content() == "demo"
        visit.send(PROMPT)
        visit.until("() => document.querySelector('.turn .text')?.textContent.length > 13")
        visit.wait_until_idle()
        assert KEY in visit.page.evaluate("JSON.stringify({...sessionStorage})")
        assert KEY not in visit.page.evaluate("JSON.stringify({...localStorage}) + document.cookie")
        assert not any(KEY in url for url in visit.requests)
        visit.page.reload()
        visit.wait_for_state("Running")
        other = open_page(guarded.url)  # another session
        other.wait_for_state("API key needed")
        visit.check("status of 401")
        other.context.close()
        visit.context.close()


def test_the_stream_of_page_maps_comes_back_after_a_drop(open_page: Open, tmp_path: Path) -> None:
    first = ServerProcess(*SMALL, log_path=tmp_path / "server.log")
    visit = open_page(first.url)
    visit.wait_for_state("Running")
    visit.choose("completion")
    first.kill()
    visit.wait_for_state("Reconnecting")
    visit.send(PROMPT)
    error = visit.page.locator("#error")
    error.wait_for()
    assert error.text_content() == "The server cannot be reached."
    with running_server(*SMALL, "--port", str(first.port)):
        visit.wait_for_state("Running")
        visit.page.fill("#max_tokens", "8") if visit.page.locator(
            "#max_tokens"
        ).is_visible() else None
        visit.send(PROMPT)
        visit.until("() => document.querySelector('.turn .text')?.textContent.length > 13")
        visit.wait_until_idle()
        visit.check("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "Failed to load")
        visit.context.close()


def test_no_text_becomes_html(open_page: Open) -> None:
    visit = open_page()
    visit.wait_for_state("Running")
    visit.choose("completion")
    visit.set(max_tokens=4)
    attack = (
        "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
    )
    visit.send(attack)
    visit.wait_until_idle()
    assert visit.text.startswith(attack)
    # A model that answers so, which the real one will not be made to do.
    chunk = {"id": "x", "choices": [{"index": 0, "text": attack, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    visit.page.route(
        "**/v1/completions",
        lambda route: route.fulfill(body=body, headers={"content-type": "text/event-stream"}),
    )
    visit.send("x")
    visit.until(
        "(text) => document.querySelector('.turn .text')?.textContent === 'x' + text", attack
    )
    assert visit.page.locator("#output img, #output script").count() == 0
    assert visit.page.title() == "vmalloc"
    visit.check()


@pytest.mark.parametrize("width", [340, 700, 1000, 1920])
def test_nothing_is_cut_off_at_any_width(open_page: Open, width: int) -> None:
    visit = open_page(viewport={"width": width, "height": 800})
    visit.wait_for_state("Running")
    visit.set(max_tokens=16)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("send", "clear", "api-key", "map"):
        box = visit.page.locator(f"#{name}").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    visit.check()


def test_the_map_is_crisp_on_a_fine_screen(open_page: Open) -> None:
    visit = open_page(device_scale_factor=2)
    visit.wait_for_state("Running")
    visit.until("() => document.getElementById('map').width > 300")
    ratios = visit.page.evaluate(
        """() => [...document.querySelectorAll("canvas")].flatMap((canvas) =>
             [canvas.width / canvas.clientWidth, canvas.height / canvas.clientHeight])"""
    )
    assert all(abs(ratio - 2) < 0.05 for ratio in ratios)
    visit.check()


def test_a_hidden_page_watches_nothing(open_page: Open) -> None:
    visit = open_page()
    visit.wait_for_state("Running")
    num_streams = sum("page-map/events" in url for url in visit.requests)
    assert num_streams == 1
    hide = """(isHidden) => {
      Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    failed = "requestfailed"
    with visit.page.expect_event(failed, lambda request: "page-map/events" in request.url):
        visit.page.evaluate(hide, True)
    with visit.page.expect_request("**/page-map/events"):
        visit.page.evaluate(hide, False)
    visit.wait_for_state("Running")
    visit.check("net::ERR_ABORTED")
