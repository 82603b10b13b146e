"""The server's page in a real Chromium, that of Debian."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright
from serving import Server, serving

from tdaengine import TDA, Engine
from tdaengine.server.app import PAGE, PAGE_FILES, PAGE_HEADERS
from tdaengine.server.markdown import to_html

SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"
STORY = "Write a long story about a dragon and a princess."
ASKED = {"max_new_tokens": 256, "temperature": 0, "parse_special": False}
# Markup, a script, a link that runs one, terminal escapes and a change of direction.
HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<a href='javascript:0'>a</a> &amp; \x1b[31mred\x1b[0m \u202ereversed\n"
    "```html\n<b>bold</b>\n```\n[a](javascript:0) ![b](https://example.com/b.png) **strong**"
)
# The same with its Markdown rendered: the code, the word that is strong, and a picture as a link.
RENDERED = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<a href='javascript:0'>a</a> & \x1b[31mred\x1b[0m \u202ereversed"
    "\n<b>bold</b>\n\n[a](javascript:0) !b strong\n"
)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    assert SMOLLM2.is_dir(), f"{SMOLLM2} is missing: run `make model`"
    return SMOLLM2


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    program = shutil.which("chromium")
    assert program, "install Debian's package chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    """Whatever the browser complains about fails the test."""
    page = chromium.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: complaints.append(message.text) if message.type == "error" else None,
    )
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    yield page
    page.close()
    assert complaints == []


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Server]:
    with serving(smollm2, "--weights", "graded", "--name", "smol") as server:
        yield server


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.keyboard.press("Enter")


def ask_by_hand(page: Page, question: str, tda: str, tokens: int) -> None:
    """With options of TDA as JSON."""
    page.get_by_text("Settings").click()
    page.get_by_label("New tokens at most").fill(str(tokens))
    page.locator("#tda").select_option("hand")
    page.get_by_label("Options of TDA").fill(tda)
    ask(page, question)


def shares(layers: Locator, kind: str) -> list[float]:
    """As the page has set them, by layer."""
    bars = layers.locator(f".{kind}").all()
    return [float(bar.evaluate("bar => parseFloat(bar.style.height)")) / 100 for bar in bars]


def heights(layers: Locator, kind: str) -> list[float]:
    """As the browser shows them."""
    boxes = [bar.bounding_box() for bar in layers.locator(f".{kind}").all()]
    whole = layers.bounding_box()
    assert whole
    return [box["height"] / whole["height"] if box else 0 for box in boxes]


def text_of(markdown: str) -> str:
    """What is left to read of it."""
    return unescape(re.sub("<[^>]*>", "", to_html(markdown)))


def test_both_answers_come_with_their_figures(page: Page, server: Server, smollm2: Path):
    engine = Engine(smollm2, weights="graded", threads=1)
    page.goto(server.url)
    expect(page.locator("#model")).to_contain_text("smol, weights graded")
    expect(page.get_by_label("Question")).to_be_focused()
    first = {"role": "user", "content": QUESTION}
    second = {"role": "user", "content": "And of Italy?"}
    ask(page, QUESTION)
    expect(page.get_by_role("status")).to_have_text("Both answers are there.")
    ask(page, second["content"])
    expect(page.get_by_role("status")).to_have_text("Both answers are there.")
    for side, name, tda in ((".dense", "Dense answer", False), (".tda", "Answer with TDA", TDA())):
        out = engine.chat([first], tda=tda, **ASKED)
        section = page.get_by_role("region", name=name)
        assert section.locator(".text").nth(0).text_content() == text_of(out.text)
        # Each side goes on from what it said itself.
        said = [first, {"role": "assistant", "content": out.text}, second]
        out = engine.chat(said, tda=tda, **ASKED)
        assert section.locator(".text").nth(1).text_content() == text_of(out.text)
        figures = page.locator(f"{side} .figures").nth(1)
        megabytes = f"{out.stats.bytes_per_token / 1e6:.1f} MB per token"
        expect(figures).to_contain_text(f"{out.stats.new_tokens} tokens")
        expect(figures).to_contain_text(megabytes)
        expect(figures).to_contain_text("tokens/s")
        layers = page.locator(f"{side} .layers").nth(1)
        coarse = out.stats.ffn_coarse_by_layer
        exact = [a - c for a, c in zip(out.stats.ffn_active_by_layer, coarse, strict=True)]
        assert shares(layers, "exact") == pytest.approx(exact, abs=0.001)
        assert shares(layers, "coarse") == pytest.approx(coarse, abs=0.001)
        assert heights(layers, "exact")[5] == pytest.approx(exact[5], abs=0.05)
        assert heights(layers, "coarse")[5] == pytest.approx(coarse[5], abs=0.05)
        assert "Neurons of 30 layers" in (layers.get_attribute("aria-label") or "")
        expect(page.locator(f"{side} .legend .exact").nth(1)).to_have_text(
            f"{100 * sum(exact) / 30:.0f}% exact"
        )


def test_the_picture_moves_and_escape_stops(page: Page, server: Server):
    page.goto(server.url)
    page.get_by_text("Settings").click()
    page.get_by_label("New tokens at most").fill("3000")
    ask(page, STORY)
    figures = page.locator(".dense .figures")
    expect(figures).to_contain_text("tokens/s")
    before = figures.text_content()
    expect(figures).not_to_have_text(before or "")
    expect(page.locator(".dense .layers > span")).to_have_count(30)
    page.keyboard.press("Escape")
    expect(page.locator(".dense .error")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()
    server.wait_for("running", 0)


def skip_dense(route: Route) -> None:
    """Answers at once what is asked of the dense side."""
    if json.loads(route.request.post_data or "")["tda"] is False:
        route.fulfill(body="data: [DONE]\n\n", content_type="text/event-stream")
    else:
        route.continue_()


def test_the_picture_has_shares_that_move(page: Page, server: Server, smollm2: Path):
    """With thresholds they differ from token to token."""
    page.route("**/v1/chat/completions", skip_dense)
    page.goto(server.url)
    ask_by_hand(page, STORY, '{"inputs": 0.3, "active": 0.4}', tokens=100)
    layers = page.locator(".tda .layers")
    expect(layers.locator("> span")).to_have_count(30)
    seen, status = set(), page.get_by_role("status")
    while status.text_content() == "TDA: computing":
        seen.add(layers.get_attribute("aria-label"))
    assert len(seen) > 5
    tda = TDA(inputs=0.3, active=0.4)
    asked = ASKED | {"max_new_tokens": 100}
    engine = Engine(smollm2, weights="graded", threads=1)
    stats = engine.chat([{"role": "user", "content": STORY}], tda=tda, **asked).stats
    coarse = stats.ffn_coarse_by_layer
    dropped = [1 - active for active in stats.ffn_active_by_layer]
    expected = {
        "exact": [1 - d - c for d, c in zip(dropped, coarse, strict=True)],
        "coarse": coarse,
        "dropped": dropped,
    }
    for kind, values in expected.items():
        assert shares(layers, kind) == pytest.approx(values, abs=1e-3)
        assert heights(layers, kind) == pytest.approx(values, abs=0.05)
        mean = sum(values) / 30
        assert mean > 0.1 or kind == "dropped"
        expect(page.locator(f".tda .legend .{kind}")).to_contain_text(f"{100 * mean:.0f}% {kind}")
        assert f"{100 * mean:.0f}% {kind}" in (layers.get_attribute("aria-label") or "")


def test_the_picture_is_of_the_latest_tokens(page: Page, server: Server):
    page.goto(server.url)
    before, now = {"new_tokens": 3, "x": [0.5, 1]}, {"new_tokens": 6, "x": [0.8, 0.4]}
    latest = "([now, before]) => latest('x', now, before)"
    assert page.evaluate(latest, [now, before]) == pytest.approx([1, 0])
    assert page.evaluate(latest, [now, None]) == [0.8, 0.4]
    assert page.evaluate(latest, [now, now]) == [0.8, 0.4]


def test_errors_are_told(chromium: Browser, server: Server):
    page = chromium.new_page()
    page.goto(server.url)
    ask_by_hand(page, QUESTION, '{"active": 2}', tokens=3)
    expect(page.get_by_role("status")).to_have_text(
        "Not both answers are complete.", timeout=60_000
    )
    expect(page.locator(".dense .error")).to_be_hidden()
    expect(page.locator(".tda .error")).to_have_text(
        "tda active 2: expected more than 0, at most 1"
    )
    page.close()


def test_light_dark_and_narrow(chromium: Browser, server: Server):
    grounds = {}
    for scheme in ("light", "dark"):
        page = chromium.new_page(color_scheme=scheme, viewport={"width": 400, "height": 800})
        page.goto(server.url)
        grounds[scheme] = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        wide = page.evaluate("() => document.documentElement.scrollWidth")
        assert wide <= 400
        page.close()
    assert grounds == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}


class Hostile(BaseHTTPRequestHandler):
    """Serves the page as the server does, and answers that no model of ours writes."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path in PAGE_FILES:
            name, kind = PAGE_FILES[self.path]
            self._send((PAGE / name).read_bytes(), kind, PAGE_HEADERS)
        else:
            model = {"id": HOSTILE, "weights": HOSTILE, "max_context": 1, "tda": HOSTILE}
            self._send(json.dumps({"data": [model]}).encode(), "application/json", {})

    def do_POST(self) -> None:
        if self.path == "/markdown":
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(to_html(body["text"]).encode(), "text/html; charset=utf-8", PAGE_HEADERS)
            return
        stats = {
            "new_tokens": 1,
            "tokens_per_second": 1,
            "bytes_per_token": 1,
            "ffn_active": 1,
            "ffn_coarse": 0,
            "ffn_bytes_fraction": 1,
            "ffn_active_by_layer": [1],
            "ffn_coarse_by_layer": [0],
            "tda": HOSTILE,
            "warnings": [HOSTILE],
        }
        choice = {"delta": {"content": HOSTILE}, "finish_reason": "stop", "stats": stats}
        event = json.dumps({"choices": [choice]})
        self._send(f"data: {event}\n\ndata: [DONE]\n\n".encode(), "text/event-stream", {})

    def _send(self, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def test_a_hostile_answer_stays_text(page: Page):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as fake:
        threading.Thread(target=fake.serve_forever, daemon=True).start()
        page.goto(f"http://127.0.0.1:{fake.server_port}/")
        ask(page, HOSTILE)
        expect(page.get_by_role("status")).to_have_text("Both answers are there.")
        assert page.locator(".question").text_content() == HOSTILE
        for answer in page.locator(".text").all():
            assert answer.text_content() == RENDERED
            assert answer.locator("strong").text_content() == "strong"
            assert answer.locator("pre code").text_content() == "<b>bold</b>\n"
            (link,) = answer.locator("a").all()
            assert link.get_attribute("href") == "https://example.com/b.png"
        assert HOSTILE in (page.locator(".warnings").first.text_content() or "")
        assert page.locator(".turn script, .turn img, .turn b, header img").count() == 0
        assert page.title() == "tdaengine"
        fake.shutdown()


def test_the_policy_holds_what_gets_in_after_all(chromium: Browser, server: Server):
    page = chromium.new_page()
    page.goto(server.url)
    page.evaluate(
        "html => document.body.insertAdjacentHTML('beforeend', html)",
        "<img src='data:,' onerror='document.title = 1'><button onclick='document.title = 2'>b",
    )
    page.get_by_role("button", name="b", exact=True).click()
    assert page.title() == "tdaengine"
    page.close()


def test_a_key_is_asked_for(chromium: Browser, smollm2: Path):
    with serving(smollm2, "--max-context", "64", key="s3cret") as server:
        page = chromium.new_page()
        page.goto(server.url)
        expect(page.locator("#model")).to_contain_text("expected Bearer and the API key")
        page.get_by_label("API key").fill("s3cret")
        page.keyboard.press("Tab")
        expect(page.locator("#model")).to_contain_text(smollm2.name)
        page.close()
