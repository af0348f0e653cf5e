"""The page for raters in a browser, from a file, by real keys; what it saves is what `score` reads."""

import json
import re
import shutil

import pytest
from compared_images import write_folder
from playwright import sync_api

from unclip_jax.human_study import answers, captioned_images, page, questions, scores

MODELS = ("ours", "theirs")
LONG = 'a caption of "two" lines & <b>marks</b>, ' * 4


# A test fails after this time, in milliseconds; on a machine that does much else at once a browser is slow.
PATIENCE = 60_000


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two models, four captions, three kinds: twelve questions. Returns the study and its folder."""
    root = tmp_path_factory.mktemp("study")
    captions = [LONG, "a cat", "two dogs", "a red ring"]
    folders = {name: str(write_folder(root / name, captions, seed=len(name), samples=16)) for name in MODELS}
    images = {name: captioned_images.read(folder) for name, folder in folders.items()}
    drawn = questions.draw(images, kinds=list(questions.KINDS), captions=0, seed=0)
    return page.write(root / "out", drawn, models=folders, seed=0, size=0), root / "out"


class Rater:
    """Somebody at the page: presses keys once what they are about is in sight."""

    def __init__(self, context, out):
        self.asked, self.errors = [], []
        self.tab = context.new_page()
        self.tab.set_default_timeout(PATIENCE)
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.goto((out / "page" / "index.html").as_uri())

    def press(self, key):
        self.tab.keyboard.press(key)

    def begin(self, name="Ann"):
        self.tab.locator("#name").fill(name)
        self.press("Enter")
        self.start()

    def start(self):
        self.tab.locator("#start").wait_for()
        self.press("Enter")
        self.see()

    def see(self, place=""):
        """Waits until a question may be answered; `place` as in "Caption 2 of 4"."""
        if place:
            sync_api.expect(self.tab.locator("#place")).to_contain_text(place)
        self.tab.locator("#question:not(.loading)").wait_for()

    def answer(self, key, then):
        """Presses a key and waits for what comes: a place, "instructions" or "end"."""
        self.press(key)
        if then in ("instructions", "end"):
            self.tab.locator(f"#{then}").wait_for()
        else:
            self.see(then)

    def done(self):
        return self.tab.locator("#done").inner_text()

    def saved(self, path, by="s"):
        with self.tab.expect_download() as download:
            self.press(by)
        download.value.save_as(path)
        return download.value.suggested_filename


@pytest.fixture
def context(chromium):
    found = chromium.new_context(viewport={"width": 1280, "height": 720})
    yield found
    found.close()


def test_from_the_first_key_to_the_scores(study, context, tmp_path):
    """All questions by keys alone, one of them changed; the scores are those of what was pressed."""
    known, out = study
    rater = Rater(context, out)
    assert "12 questions in all" in " ".join(rater.tab.locator("#welcome").inner_text().split())
    rater.begin()
    keys = {"left": "ArrowLeft", "right": "ArrowRight", "not_sure": "ArrowDown"}
    titles = {name: kind.title for name, kind in questions.KINDS.items()}
    pressed = {}
    for number, question in enumerate(known.questions, 1):
        own = [other for other in known.questions if other.kind == question.kind]
        rater.see(f"{titles[question.kind]} {own.index(question) + 1} of 4")
        assert rater.tab.locator("#caption").is_visible() == (question.kind == "caption_similarity")
        if question.kind == "caption_similarity":
            assert rater.tab.locator("#caption").inner_text() == question.caption
        # Our side, but for one question of each kind.
        pressed[number] = "not_sure" if number % 4 == 2 else "left" if question.left == "ours" else "right"
        last = own[-1] is question
        following = "end" if number == 12 else "instructions" if last else f"{own.index(question) + 2} of 4"
        rater.answer(keys[pressed[number]], following)
        if following == "instructions":
            rater.start()
    # Back to the eleventh question, which is marked as it was answered, and now answered otherwise.
    rater.tab.get_by_text("Look at the last question").click()
    rater.answer("Backspace", "Variety 3 of 4")
    assert rater.tab.locator(f"#{pressed[11]}.chosen").is_visible()
    pressed[11] = "not_sure"
    rater.answer("ArrowDown", "Variety 4 of 4")
    rater.answer("Enter", "end")
    assert rater.tab.locator("#end_title").inner_text().startswith("That was the last question")
    assert rater.saved(tmp_path / "a.json", by="Enter") == f"answers-{known.study[:6]}-Ann.json"

    [ballot] = answers.read([tmp_path / "a.json"], known, partial=False)
    assert ballot.rater == "Ann" and ballot.choices == pressed and all(0 < s < 60 for s in ballot.seconds.values())
    results = scores.score(known, [ballot])
    shares = {kind: found["pairs"][0]["probability"] for kind, found in results["questions"].items()}
    assert shares == {"photorealism": 3.5 / 4, "caption_similarity": 3.5 / 4, "diversity": 3 / 4}
    # Nothing came from elsewhere, and nothing went wrong.
    assert rater.asked and all(url.startswith(("file:///", "blob:")) for url in rater.asked)
    assert not rater.errors


def test_a_closed_tab_loses_nothing(study, context, tmp_path):
    known, out = study
    first = Rater(context, out)
    first.begin()
    first.answer("ArrowLeft", "2 of 4")
    first.answer("ArrowRight", "3 of 4")
    first.tab.close()
    second = Rater(context, out)
    assert second.tab.locator("#name").input_value() == "Ann"
    sync_api.expect(second.tab.locator("#begin")).to_have_text("Go on (2 answered)")
    second.begin()
    second.see("Realism 3 of 4")
    # Another rater at the same browser begins anew, and a tab of the same rater sees what the other answers.
    third = Rater(context, out)
    third.begin("Bob")
    assert third.done() == "0 of 12 answered"
    fourth = Rater(context, out)
    fourth.begin()
    second.tab.bring_to_front()
    second.answer("ArrowDown", "4 of 4")
    sync_api.expect(fourth.tab.locator("#done")).to_have_text("3 of 12 answered")
    # A file goes on elsewhere, where nothing is kept yet.
    second.saved(tmp_path / "a.json")
    elsewhere = context.browser.new_context()
    fifth = Rater(elsewhere, out)
    (tmp_path / "other.json").write_text(json.dumps({"study": "another", "rater": "Eve", "answers": []}))
    fifth.tab.set_input_files("#file", tmp_path / "other.json")
    sync_api.expect(fifth.tab.locator("#load_note")).to_have_text("other.json holds no answers to these questions.")
    fifth.tab.set_input_files("#file", tmp_path / "a.json")
    sync_api.expect(fifth.tab.locator("#begin")).to_have_text("Go on (3 answered)")
    fifth.tab.locator("#begin").click()
    fifth.start()
    fifth.see("Realism 4 of 4")
    fifth.saved(tmp_path / "b.json")
    elsewhere.close()
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads((tmp_path / "a.json").read_text())
    [ballot] = answers.read([tmp_path / "b.json"], known, partial=True)
    assert ballot.choices == {1: "left", 2: "right", 3: "not_sure"}
    for rater in (second, third, fourth, fifth):
        assert not rater.errors


def test_nothing_is_answered_by_accident(study, context, tmp_path):
    """A key held down is one answer; keys with Ctrl, and keys before both images are there, are none."""
    known, out = study
    rater = Rater(context, out)
    rater.begin()
    rater.press("Control+ArrowLeft")
    rater.press("Enter")  # goes on only from what is answered
    rater.press("x")
    assert rater.done() == "0 of 12 answered"
    rater.tab.keyboard.down("ArrowLeft")
    rater.see("2 of 4")
    rater.tab.keyboard.down("ArrowLeft")  # what a key that is held down sends again and again
    rater.tab.wait_for_timeout(300)
    assert rater.done() == "1 of 12 answered"
    rater.tab.keyboard.up("ArrowLeft")
    # By the mouse.
    rater.tab.locator("#right img").click()
    rater.see("3 of 4")
    rater.tab.locator("#not_sure").click()
    rater.see("4 of 4")
    assert rater.done() == "3 of 12 answered"

    broken = tmp_path / "copy"
    shutil.copytree(out, broken)
    content = re.search(r'id="study">(.*?)</script>', (out / "page" / "index.html").read_text())
    assert content
    (broken / "page" / json.loads(content[1])["questions"][0]["left"]).unlink()
    rater = Rater(context, broken)
    rater.tab.locator("#name").fill("Cat")
    rater.press("Enter")
    rater.tab.locator("#start").click()
    rater.tab.locator("#broken").wait_for()
    rater.press("ArrowLeft")
    assert rater.done() == "0 of 12 answered"
    rater.answer("Enter", "2 of 4")


def test_a_browser_that_keeps_nothing_says_so(study, context, tmp_path):
    known, out = study
    context.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('full'); }")
    rater = Rater(context, out)
    rater.begin()
    rater.answer("ArrowLeft", "2 of 4")
    assert rater.tab.locator("#not_kept").is_visible()
    rater.saved(tmp_path / "a.json")
    assert answers.read([tmp_path / "a.json"], known, partial=True)[0].choices == {1: "left"}


def test_all_of_a_question_is_in_sight(study, context):
    """No scrolling between images and answers, with the longest caption too; both sides are equally large."""
    known, out = study
    rater = Rater(context, out)
    rater.begin()
    for number in range(1, 9):
        assert (rater.tab.locator("#caption").inner_text() == LONG.strip()) == (number - 1 == longest(known))
        for width, height in ((1280, 720), (1920, 1080), (1024, 640)):
            rater.tab.set_viewport_size({"width": width, "height": height})
            names = ("asked", "left", "right", "not_sure", "back")
            boxes = [rater.tab.locator(f"#{name}").bounding_box() for name in names]
            assert all(box["y"] >= 0 and box["y"] + box["height"] <= height for box in boxes), boxes
            assert boxes[1]["width"] == boxes[2]["width"] > 0.25 * width and boxes[1]["y"] == boxes[2]["y"]
        rater.answer("ArrowLeft", "instructions" if number % 4 == 0 else f"{number % 4 + 1} of 4")
        if number % 4 == 0:
            rater.start()


def longest(known):
    """Index of the question that shows the longest caption."""
    asked = [question.kind == "caption_similarity" and len(question.caption) > 99 for question in known.questions]
    return asked.index(True)


def test_a_thousand_questions_are_as_quick_as_ten(study, context, tmp_path):
    """A page with 3,000 questions loads the images of those in sight and next, and shows a question in no time."""
    known, out = study
    drawn = [questions.Question(q.kind, q.caption, q.left, q.right, q.left_images[:1], q.right_images[:1])
             for q in known.questions if q.kind != "diversity"]  # fmt: skip
    many = sorted(drawn * 375, key=lambda q: q.kind == "caption_similarity")
    page.write(tmp_path / "many", many, models=known.models, seed=0, size=0)
    rater = Rater(context, tmp_path / "many")
    rater.begin()
    assert rater.done() == "0 of 3,000 answered"
    assert (tmp_path / "many" / "page" / "index.html").stat().st_size < 500_000
    # Of one question and two more: at most six images.
    assert sum(url.endswith(".png") for url in rater.asked) <= 6
    took = rater.tab.evaluate(
        """async () => {
          const [place, question, left] = ["place", "question", "left"].map((id) => document.getElementById(id));
          const frame = () => new Promise(requestAnimationFrame);
          const began = performance.now();
          for (let n = 0; n < 20; n++) {
            const before = place.textContent;
            while (question.classList.contains("loading")) await frame();
            left.click();
            while (place.textContent === before) await frame();
          }
          return (performance.now() - began) / 20;
        }"""
    )
    assert took < 1000  # of which 140 ms show what was chosen
    assert rater.done() == "20 of 3,000 answered"
