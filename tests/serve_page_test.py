"""The server's page in a browser: a prompt is typed, its progress seen, and the image downloaded."""

import re

import numpy as np
import pytest
import served
from PIL import Image
from playwright import sync_api

from unclip_jax import provenance

PATIENCE = 60_000
# What a page that takes text for HTML would run.
HTML = "<img src=x onerror=ran=1><b>"

# Keeps all that the page says of its requests, and to those who do not see it.
LISTEN = """
window.said = {state: [], news: []};
document.addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
  const last = [...document.querySelectorAll("#images .state")].at(-1);
  for (const [name, text] of [["state", last?.textContent], ["news", document.getElementById("news").textContent]])
    if (text && window.said[name].at(-1) !== text) window.said[name].push(text);
}).observe(document.body, {subtree: true, childList: true, characterData: true}));
"""


@pytest.fixture(scope="module")
def server(small_export, compile_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with served.running(small_export, folder, f"--compile_cache={compile_cache}", "--queue=30") as found:
        found.ready()
        yield found


class Visitor:
    """Somebody at the page."""

    def __init__(self, chromium, server, **options):
        self.context = chromium.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})
        self.context.add_init_script(LISTEN)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(PATIENCE)
        self.asked, self.errors = [], []
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.goto(server.url)

    def see(self, words):
        sync_api.expect(self.tab.locator("main")).to_contain_text(words)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


@pytest.fixture
def visitor(chromium, server):
    with Visitor(chromium, server) as found:
        yield found
        assert not found.errors


def test_from_a_prompt_to_a_file_by_keys_alone(server, visitor, tmp_path):
    tab = visitor.tab
    ahead = [server.ask("POST", "/api/images", {"prompt": f"number {n}", "seed": n}) for n in range(25)]
    assert {answer[0] for answer in ahead} == {202}
    sync_api.expect(tab.get_by_label("Prompt")).to_be_focused()
    tab.keyboard.type(HTML)
    tab.keyboard.press("Tab")
    sync_api.expect(tab.get_by_label("Seed")).to_be_focused()
    tab.keyboard.type("11")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")  # on the button
    link = tab.get_by_role("link", name="Download")
    link.wait_for()
    said = tab.evaluate("window.said")
    assert re.match(r"Waiting: (place \d+|next) in line", said["state"][0])
    assert re.fullmatch(r"Drawn in \d+ s\.", said["state"][-1])
    assert said["news"][-1] == f"Your image is ready: {HTML}"
    tab.keyboard.press("Tab")
    sync_api.expect(link).to_be_focused()
    with tab.expect_download() as download:
        tab.keyboard.press("Enter")
    download.value.save_as(tmp_path / "image.png")
    assert download.value.suggested_filename == "img-src-x-onerror-ran-1-b-seed11.png"
    # What a program gets is what the export itself draws (serve_test.py), and so is what people get.
    assert (tmp_path / "image.png").read_bytes() == server.ask("POST", "/api/draw", {"prompt": HTML, "seed": 11})[2]
    with Image.open(tmp_path / "image.png") as picture:
        assert picture.size == (16, 16) and np.asarray(picture).std() > 5
        assert picture.text["prompt"] == HTML and picture.text["seed"] == "11"
        assert provenance.SOURCE_TYPE in picture.text["XML:com.adobe.xmp"]
    # What the browser shows is that file, and the prompt is text wherever it stands.
    image = tab.get_by_alt_text("Drawn by a program")
    assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [16, 16]
    sync_api.expect(tab.locator(".words")).to_have_text(HTML)
    assert not tab.evaluate("window.ran") and tab.locator("main b").count() == 0
    # Nothing came from elsewhere.
    assert visitor.asked and all(url.startswith((server.url, "blob:", "data:")) for url in visitor.asked)
    # The prompt again, changed; shift and Enter is a new line, which a prompt has none of.
    tab.get_by_role("button", name="Change the prompt").press("Enter")
    sync_api.expect(tab.get_by_label("Seed")).to_have_value("11")
    tab.get_by_label("Prompt").fill("a blue")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("star")
    tab.keyboard.press("Enter")
    sync_api.expect(tab.get_by_role("link", name="Download: a blue star")).to_be_visible()
    sync_api.expect(tab.locator(".words")).to_have_text(["a blue star", HTML])


def test_what_is_wrong_is_said_where_it_is_wrong(visitor):
    tab, alert = visitor.tab, visitor.tab.get_by_role("alert")
    draw = tab.get_by_role("button", name="Draw")
    draw.click()
    sync_api.expect(alert).to_have_text("The prompt is empty; describe an image in words.")
    sync_api.expect(tab.get_by_label("Prompt")).to_be_focused()
    sync_api.expect(tab.get_by_label("Prompt")).to_have_attribute("aria-invalid", "true")
    tab.get_by_label("Prompt").fill("1 " * 40)
    draw.click()
    sync_api.expect(alert).to_contain_text("The prompt is too long: this model reads 22 tokens")
    for seed in ("-1", "1.5", "x", "2147483648"):
        tab.get_by_label("Seed").fill(seed)
        draw.click()
        sync_api.expect(alert).to_have_text("The seed is a whole number from 0 to 2147483647, or empty.")
        sync_api.expect(tab.get_by_label("Seed")).to_be_focused()
    assert tab.locator("#images li").count() == 0
    tab.get_by_label("Prompt").fill("a star")
    tab.get_by_label("Seed").fill("")
    draw.click()
    sync_api.expect(tab.get_by_role("link", name="Download")).to_be_visible()
    sync_api.expect(alert).to_be_empty()


def test_each_state_is_told_as_the_server_tells_it(visitor):
    """With answers of a server that is slow, full, failing, or gone."""
    tab, states = visitor.tab, []
    ticket = {"id": "an_id", "prompt": "a star", "seed": 1, "waited": 2.0, "drawn": 0.0}

    def answer(route):
        if route.request.method == "DELETE":
            states.append({**ticket, "state": "stopped", "error": "this request was taken back"})
        found = states[0] if len(states) == 1 else states.pop(0)
        if found is None:
            return route.abort()
        return route.fulfill(status=found.get("status", 200), json=found)

    def asked(*found):
        states[:] = found
        tab.get_by_label("Prompt").fill("a star")
        tab.get_by_label("Prompt").press("Enter")

    tab.route("**/api/images*", answer)
    tab.route("**/api/images/**", answer)
    waiting = {**ticket, "state": "waiting", "position": 3, "starting": False, "left": 75.2}
    asked(waiting)
    visitor.see("Waiting: place 3 in line, about 76 s")
    card = tab.locator("#images li").first
    sync_api.expect(card.get_by_role("progressbar", name="Progress of: a star")).to_have_js_property("max", 1)
    states[:] = [{**waiting, "position": 1, "starting": True, "left": None}]
    visitor.see("The server is still getting ready; next in line")
    assert not card.locator("progress").evaluate("bar => bar.hasAttribute('value')")
    card.get_by_role("button", name="Cancel").click()
    visitor.see("This request was taken back.")

    step = {"number": 2, "of": 3, "part": "upsampler_1"}
    asked({**ticket, "state": "drawing", "step": step, "left": 130.0, "drawn": 20.0})
    visitor.see("Drawing, step 2 of 3 (upsampler 1): about 2 min 10 s left")
    sync_api.expect(tab.get_by_role("status")).to_have_text("Drawing, step 2 of 3 (upsampler 1)")
    card = tab.locator("#images li").first
    assert 0.1 < card.locator("progress").evaluate("bar => bar.value") < 0.2
    assert card.get_by_role("button", name="Cancel").count() == 0  # too late
    states[:] = [None]
    visitor.see("The server does not answer. Is it still running? Trying again …")
    states[:] = [{**ticket, "state": "failed", "error": "drawing failed <b>"}]
    visitor.see("Drawing failed <b>.")
    count = tab.locator("#images li").count()
    asked({"status": 429, "error": "too many requests wait already; try again in 7 s"})
    sync_api.expect(tab.get_by_role("alert")).to_have_text("Too many requests wait already; try again in 7 s.")
    sync_api.expect(tab.get_by_label("Prompt")).to_have_value("a star")  # nothing has to be typed again
    asked(None)
    sync_api.expect(tab.get_by_role("alert")).to_have_text("The server does not answer. Is it still running?")
    assert tab.locator("#images li").count() == count


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read_in_both_schemes(chromium, server, scheme):
    options = {"color_scheme": scheme, "viewport": {"width": 400, "height": 800}}
    with Visitor(chromium, server, **options) as visitor:
        tab = visitor.tab
        tab.get_by_label("Prompt").fill("w" * 200)
        tab.get_by_label("Prompt").press("Enter")
        visitor.see("too long")
        tab.get_by_label("Prompt").fill("a star")
        tab.get_by_label("Prompt").press("Enter")
        tab.get_by_role("link", name="Download").wait_for()
        for width in (1400, 400):
            tab.set_viewport_size({"width": width, "height": 800})
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.get_by_label("Prompt").bounding_box()["width"] > min(300, width / 2)
        for name in ("h1", ".soft", ".help", "label", ".words", ".state", "footer p", "#draw", ".download", ".again"):
            assert contrast(tab, name) >= 4.5, name  # WCAG 2.2, 1.4.3
        assert not visitor.errors


def contrast(tab, selector):
    """WCAG's contrast of a text and what is behind it."""
    ink, behind = tab.locator(selector).first.evaluate(
        """element => {
          const opaque = (one) => {
            const colour = getComputedStyle(one).backgroundColor;
            return colour === "rgba(0, 0, 0, 0)" && one.parentElement ? opaque(one.parentElement) : colour;
          };
          return [getComputedStyle(element).color, opaque(element)];
        }"""
    )

    def luminance(colour):
        channels = np.array([int(n) for n in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    high, low = sorted((luminance(ink), luminance(behind)), reverse=True)
    return (high + 0.05) / (low + 0.05)
