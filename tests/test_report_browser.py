"""The report in a real browser, from its file: search, expand, switch arm, theme, width; nothing from outside."""

import shutil
from pathlib import Path

import pytest
from report_run import HOSTILE, hand_made, write

from polytope_hsae.report.build import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install polytope-hsae[dev])")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package) on the PATH")
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # CI runs as root, where Chromium's sandbox does not start
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Call it with a file: the page, which at the end must have asked for nothing else and reported no error."""
    requests, errors, contexts = [], [], []

    def open_file(path: Path, **options):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert errors == []
    assert [url for url in requests if not url.startswith(("file://", "data:"))] == []
    assert len([url for url in requests if url.startswith("file://")]) == len(contexts)


@pytest.fixture
def report(open_page, finished):
    return open_page(finished / "report.html")


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_wider_than_the_screen(report, width):
    report.set_viewport_size({"width": width, "height": 800})
    assert report.evaluate(OVERFLOW) == 0
    report.locator("details.child > summary").first.click()
    report.evaluate(
        "document.querySelectorAll('main section:not(#tree) details').forEach((one) => { one.open = true; })"
    )
    assert report.evaluate(OVERFLOW) == 0


def test_search_finds_concepts_words_and_numbers(report):
    search, parents = report.locator("#tree-search"), report.locator("details.parent")
    name = report.locator("details.parent .name.concept").first.inner_text()
    search.fill(name)
    assert name in parents.locator(".name").all_inner_texts()
    assert parents.first.locator("mark").first.inner_text().lower() in name.lower()  # every closed row shows its match
    assert all(parent.locator("mark").count() for parent in parents.all())
    assert "match" in report.locator("#tree-count").inner_text()
    search.fill("no such word anywhere")
    assert parents.count() == 0
    assert report.locator("#tree-count").inner_text().startswith("0 of")
    search.fill("#3")
    assert parents.locator(".number").all_inner_texts() == ["3"]
    search.fill("")
    assert parents.count() > 1


def test_parents_open_and_close_and_can_be_ordered(report):
    first, second = (report.locator("details.parent").nth(place) for place in (0, 1))
    assert first.locator("details.child .preview").first.is_visible()
    assert second.locator(".inside").count() == 0  # drawn when it is asked for
    second.locator("> summary").click()
    assert second.locator(".context span.top").first.is_visible()
    assert second.locator("details.child").count() == 6
    child = second.locator("details.child").first
    child.locator("> summary").click()
    assert child.locator(".inside").is_visible()
    second.locator("> summary").click()
    assert not second.locator("> .inside").is_visible()
    report.locator("#tree-order").select_option("latent")
    numbers = [int(text) for text in report.locator("details.parent .number").all_inner_texts()]
    assert numbers == sorted(numbers)
    names = report.locator("details.parent .name").all_inner_texts()
    assert all(any(letter.isalpha() for letter in name) for name in names)


def test_more_parents_and_other_arms_are_a_click_away(report):
    more, parents = report.locator("#tree-more"), report.locator("details.parent")
    before = parents.count()
    while more.is_visible():
        more.click()
    assert before < parents.count() == 32
    assert report.locator("input[name=arm]:checked").get_attribute("value") == "teacher"
    report.locator("#tree-controls label", has_text="flat TopK").click()
    assert "latents" in report.locator("#tree-count").inner_text()
    report.locator("details.parent > summary").first.click()
    assert report.locator("details.child").count() == 0


def test_the_theme_follows_the_system_and_the_button(open_page, finished):
    light = open_page(finished / "report.html", color_scheme="light")
    dark = open_page(finished / "report.html", color_scheme="dark")
    colours = light.evaluate(BACKGROUND), dark.evaluate(BACKGROUND)
    assert colours[0] != colours[1]
    button = light.locator("#theme")
    assert button.inner_text() == "Dark"
    button.click()
    assert light.evaluate(BACKGROUND) == colours[1]
    assert button.inner_text() == "Light"
    button.click()
    assert light.evaluate(BACKGROUND) == colours[0]


def test_markup_from_the_corpus_is_shown_and_not_run(open_page, tmp_path):
    page = open_page(write_report(write(tmp_path, hand_made())))
    for parent in page.locator("details.parent:not([open]) > summary").all():
        parent.click()
    assert page.locator("img").count() == 0
    assert HOSTILE in "".join(page.locator(".context").all_inner_texts())
    steering = page.locator(".steering").inner_text()
    assert "Other words shift by 0.1 nats (along another concept's direction: 0.5)." in steering
    assert "·ing" in "".join(page.locator(".tokens li").all_inner_texts())


def test_without_scripts_the_numbers_are_there(open_page, finished):
    page = open_page(finished / "report.html", java_script_enabled=False)
    assert page.locator("li.target").count() == 5
    assert page.locator("noscript").inner_text() or "scripts are off" in page.content()
    assert not page.locator("#tree-controls").is_visible()
