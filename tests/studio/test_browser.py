"""The studio in a real browser: each tab used as a person would.

With ``DDIM_SCREENSHOTS=1`` the pictures of the page in docs are made anew.
"""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

DOCS = Path(__file__).parents[2] / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
AXE = "axe-core@4.14.1"
SLOW = 60_000
"""Milliseconds after which a run of a few steps is taken for lost."""


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, or the one that `playwright install chromium` fetched."""
    with sync_api.sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, BROWSERS)), None)
        options = {"executable_path": path} if path else {}
        try:
            # Chromium has no sandbox for root, as in containers.
            found = playwright.chromium.launch(args=["--no-sandbox"], **options)
        except sync_api.Error as error:
            pytest.skip(f"there is no Chromium here ({str(error).splitlines()[0]})")
        yield found
        found.close()


@pytest.fixture
def page(browser, studio):
    """The page, whose requests all go to the studio itself, and whose console tells no error."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(SLOW)
    asked, errors = [], []
    context.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda told: told.type == "error" and errors.append(told.text))
    page.goto(studio)
    page.locator("#about p").wait_for()
    yield page
    context.close()
    foreign = [url for url in asked if urlsplit(url).netloc not in ("", urlsplit(studio).netloc)]
    assert len(asked) > 5
    assert foreign == []
    assert errors == []


def choose(page, name):
    """Chooses a model in the bar."""
    page.locator("#model input").click()
    page.get_by_role("option", name=name).click()


def fill(page, name, value):
    """Types into a field, as a number beside its slider where there is one."""
    field = page.locator(f"#{name} input[type=number], #{name} textarea, #{name} input[type=text]")
    field.first.fill(str(value))
    field.first.press("Tab")


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def keep(page, tmp_path, name):
    """A picture of the whole page; for the documentation, if that is asked for."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(400)  # of transitions
    folder = DOCS if os.environ.get("DDIM_SCREENSHOTS") else tmp_path
    page.screenshot(path=folder / f"studio-{name}.png", full_page=True)


def test_draw(page, tmp_path):
    choose(page, "fashion-text")
    page.get_by_label("Prompt").fill("a red sneaker on a black background")
    fill(page, "draw-steps", 200)
    page.locator("#draw-start").click()
    page.locator("#draw-status progress").wait_for()
    page.locator("#draw-pictures img").first.wait_for()  # predicted, while it goes on
    assert page.locator("#draw-start").is_disabled()
    assert "Step" in page.locator("#draw-status").inner_text()
    page.locator("#draw-stop").click()
    page.locator("#draw-status", has_text="Stopped after").wait_for()

    fill(page, "draw-steps", 12)
    page.locator("#draw-start").click()
    page.locator("#draw-download:visible").wait_for()
    assert page.locator("#draw-pictures img").count() == 4
    command = page.get_by_label("The same in a terminal").first.input_value()
    assert command.startswith("ddim sample fashion-text --steps 12")
    assert "num_inference_steps=12" in page.get_by_label("The same in Python").input_value()
    with page.expect_download() as download:
        page.locator("#draw-download").click()
    assert Path(download.value.path()).read_bytes()[:2] == b"PK"
    keep(page, tmp_path, "draw")


def test_an_error_is_a_sentence_and_the_page_goes_on(page):
    choose(page, "fashion-text")
    page.get_by_label("Prompt").fill("secrets.txt")
    page.locator("#draw-start").click()
    error = page.locator("#draw-status [role=alert]")
    error.wait_for()
    assert error.inner_text().startswith("A prompt must not end in .txt")
    assert page.locator("#draw-start").is_enabled()


def test_compare(page, tmp_path):
    tab(page, "Compare")
    fill(page, "compare-steps", "3, 5, 20")
    page.locator("#compare-start").click()
    page.locator("#compare-sheet .empty").first.wait_for()
    page.locator("#compare-download:visible").wait_for()
    assert page.locator("#compare-sheet img").count() == 9
    keep(page, tmp_path, "compare")


def test_latent_space(page, tmp_path):
    tab(page, "Latent space")
    fill(page, "latent-steps", 6)
    page.locator("#latent-start").click()
    page.locator("#latent-download:visible").wait_for()
    assert page.locator("#latent-whole img").count() == 11
    before = page.locator("#latent-here img").get_attribute("src")
    slider = page.locator("#latent-slider input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    page.locator("#latent-here figcaption", has_text="7 of 11").wait_for()
    assert page.locator("#latent-here img").get_attribute("src") != before
    keep(page, tmp_path, "latent")

    page.get_by_label("A square of four").check()
    page.locator("#latent-seed-3").wait_for()
    page.locator("#latent-start").click()
    page.locator("#latent-status", has_text="four corners").wait_for()
    assert page.locator("#latent-whole img").count() == 25


def test_edit(page, tmp_path):
    choose(page, "fashion-text")
    page.get_by_label("Prompt").wait_for()
    tab(page, "Latent space")
    page.get_by_label("Edit under another prompt").check()
    page.get_by_label("It becomes").fill("a blue sneaker on a black background")
    page.locator("#latent-start").click()
    page.locator("#latent-download:visible").wait_for()
    assert page.locator("#latent-here img").count() == 3
    keep(page, tmp_path, "edit")


def test_doctor(page, tmp_path, models):
    choose(page, "washed-out")
    page.get_by_label("Prompt").fill("a sneaker")
    tab(page, "Doctor")
    fill(page, "doctor-steps", 4)
    fill(page, "doctor-seed", 2)
    page.locator("#doctor-start").click()
    page.locator("#doctor-sheet figure:nth-child(2)").wait_for()
    page.locator("#doctor-status", has_text="Examined").wait_for()
    assert page.locator("#doctor-verdict p").inner_text().endswith(".")
    assert "DDIMScheduler" in page.get_by_label("The fix, in Python").input_value()
    keep(page, tmp_path, "doctor")

    config = models / "washed-out" / "scheduler" / "scheduler_config.json"
    page.locator("#doctor-file input[type=file]").set_input_files(config)
    page.locator("#doctor-file", has_text="scheduler_config").wait_for()
    page.locator("#doctor-start").click()
    page.locator("#doctor-status", has_text="nothing to draw").wait_for()
    line = page.locator("#doctor-command textarea").input_value()
    assert line == "ddim doctor scheduler_config.json --steps 4"


def test_the_keyboard_is_enough(page):
    """From the tabs to a picture without a mouse."""
    draw = page.get_by_role("tab", name="Draw")
    draw.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.get_by_role("tab", name="Compare").get_attribute("aria-selected") == "true"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    fill(page, "draw-steps", 3)
    names = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.closest('[id^=draw-]')?.id")
        names.add(name)
        if name == "draw-start":
            page.keyboard.press("Enter")
            break
    assert {"draw-eta", "draw-order", "draw-spacing", "draw-start"} <= names
    page.locator("#draw-download:visible").wait_for()


@pytest.fixture(scope="session")
def axe(tmp_path_factory):
    """The source of axe-core, from npm."""
    folder = tmp_path_factory.mktemp("axe")
    if (npm := shutil.which("npm")) is None:
        pytest.skip("there is no npm here to fetch axe-core with")
    words = [npm, "pack", AXE, "--silent"]
    try:
        subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=60)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            return archive.extractfile("package/axe.min.js").read().decode()
    except (subprocess.SubprocessError, OSError, StopIteration) as error:
        pytest.skip(f"{AXE} cannot be fetched from npm here ({error})")


def test_no_tab_is_closed_to_those_who_do_not_see_or_click(page, axe):
    """No finding that axe-core calls serious or critical."""
    page.evaluate(axe)
    choose(page, "fashion-text")
    page.get_by_label("Prompt").wait_for()
    found = {}
    for name in ("Draw", "Compare", "Latent space", "Doctor"):
        tab(page, name)
        if name == "Draw":
            fill(page, "draw-steps", 2)
            page.locator("#draw-start").click()
            page.locator("#draw-download:visible").wait_for()
        page.wait_for_timeout(300)
        for violation in page.evaluate("axe.run().then(result => result.violations)"):
            if violation["impact"] in ("serious", "critical"):
                nodes = [node["html"][:160] for node in violation["nodes"]]
                found.setdefault(f"{name}: {violation['id']}", nodes)
    assert found == {}
