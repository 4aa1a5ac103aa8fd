"""The page in a real browser: chromium, without a screen."""

import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from cmtool.data.decoding import read_image
from cmtool.models import ASSETS
from tests.page.test_server import png_header

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(None in (CHROMIUM, DRIVER), reason="needs chromium and chromedriver"),
]
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
BUTTONS = "button, input, select, canvas[tabindex], a[href]"
NAMELESS = """
return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent && !(
    e.textContent.trim() || e.getAttribute('aria-label') || (e.labels && e.labels.length)
    || e.querySelector('img[alt]'))).map(e => e.outerHTML)
"""


@contextmanager
def served(folder, *arguments):
    """The address of a page that a shell started in a folder."""
    command = [sys.executable, "-m", "cmtool", "edit", "page", "--port", "0", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process.stdout.readline().strip()
        process.terminate()
        said = process.communicate(timeout=30)
        assert process.returncode == 0, said
        assert "Traceback" not in said[1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def address(folder):
    shutil.copy(ASSETS / "digits-cd.safetensors", folder / "m.safetensors")
    with served(folder, "-c", "m.safetensors") as address:
        yield address


@pytest.fixture
def browser(folder, address):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument("--window-size=1280,1000")
    saving = {"download.default_directory": str(folder)}
    saving["profile.default_content_setting_values.automatic_downloads"] = 1  # several, unasked
    options.add_experimental_option("prefs", saving)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get(address)
        wait_for(lambda: driver.find_element("id", "model").text == "m.safetensors")
        wait_for(lambda: driver.find_element("id", "save-picture").get_attribute("href"))
        yield driver
    finally:
        driver.quit()


def wait_for(what, seconds=30):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return found


def status(browser):
    return browser.find_element("id", "status").text


def draw_half(browser):
    """Draw a mask over some of the picture with the mouse."""
    from selenium.webdriver.common.action_chains import ActionChains

    canvas = browser.find_element("id", "canvas")
    moves = ActionChains(browser).move_to_element_with_offset(canvas, -100, -100).click_and_hold()
    for x, y in ((0, 150), (60, 0), (0, -150)):
        moves = moves.move_by_offset(x, y)
    moves.release().perform()


def click(browser, name):
    browser.find_element("id", name).click()


def saved(browser, folder, link, name):
    """The file that a link of the page saves."""
    path = folder / name
    path.unlink(missing_ok=True)
    link.click()
    wait_for(lambda: path.exists() and path.stat().st_size)
    return path


def errors(browser):
    return [line for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]


def test_a_mask_is_drawn_and_the_answer_is_what_the_command_makes(browser, folder):
    draw_half(browser)
    click(browser, "make")
    wait_for(lambda: browser.find_elements("css selector", ".answer"))
    assert status(browser).startswith("Done in")
    for link, name in (("save-picture", "picture.png"), ("save-mask", "mask.png")):
        saved(browser, folder, browser.find_element("id", link), name)
    given, mask = (read_image(folder / name) for name in ("picture.png", "mask.png"))
    is_kept = mask[0] < 128
    assert 8 < int(is_kept.sum()) < 60
    figures = browser.find_elements("css selector", "#answers figure:has(.answer)")
    assert len(figures) == 2  # one step, and several
    for figure in figures:
        link = figure.find_element("css selector", "a[download]")
        name = link.get_attribute("download")
        answer = saved(browser, folder, link, name).read_bytes()
        picture = read_image(answer)
        assert torch.equal(picture[:, is_kept], given[:, is_kept])
        assert not torch.equal(picture, given)
        (folder / name).unlink()
        words = shlex.split(figure.find_element("tag name", "code").text)
        subprocess.run([sys.executable, "-m", *words], cwd=folder, check=True, capture_output=True)
        assert (folder / name).read_bytes() == answer
    assert errors(browser) == []


def test_keys_alone_do_it_too(browser):
    from selenium.webdriver.common.keys import Keys

    canvas = browser.find_element("id", "canvas")
    canvas.send_keys(Keys.ARROW_LEFT, Keys.ARROW_UP, " ", "]", Keys.ARROW_LEFT, " ")
    assert "painted" in browser.find_element("id", "place").get_property("textContent")
    browser.find_element("id", "seed").send_keys(Keys.ENTER)
    wait_for(lambda: browser.find_elements("css selector", ".answer"))
    canvas.send_keys("e")
    assert browser.find_element("id", "erase").is_selected()
    browser.find_element("id", "tab-edit").send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element.get_attribute("id") == "tab-sample"
    assert browser.find_element("id", "panel-sample").is_displayed()
    assert errors(browser) == []


def test_every_control_has_a_name_and_every_edit_an_answer(browser):
    names = [row.get_attribute("value") for row in browser.find_elements("name", "edit")]
    assert len(names) == 8
    draw_half(browser)
    for name in names:
        browser.find_element("css selector", f"[value={name}]").click()
        assert not browser.find_elements("css selector", ".answer")
        if name == "outpaint":
            browser.execute_script("document.getElementById('amount').value = 1")
        click(browser, "make")
        wait_for(lambda: browser.find_elements("css selector", ".answer"))
        assert browser.execute_script(NAMELESS, BUTTONS) == []
    assert errors(browser) == []


def test_samples_and_a_morph(browser, folder):
    click(browser, "tab-sample")
    count = browser.find_element("id", "levels-count")
    count.send_keys("2")
    assert len(browser.find_elements("css selector", "#levels input")) == 2
    click(browser, "draw")
    pictures = wait_for(lambda: browser.find_elements("css selector", "#samples .pictures button"))
    assert len(pictures) == 16
    link = browser.find_element("css selector", "#samples a[download]")
    grid = saved(browser, folder, link, "grid.png").read_bytes()
    (folder / "grid.png").unlink()
    words = shlex.split(browser.find_element("css selector", "#samples code").text)
    subprocess.run([sys.executable, "-m", *words], cwd=folder, check=True, capture_output=True)
    assert (folder / "grid.png").read_bytes() == grid
    click(browser, "morph")
    wait_for(lambda: browser.find_elements("css selector", "#morphed a[download]"))
    assert browser.execute_script(NAMELESS, BUTTONS) == []
    pictures[3].click()
    assert "Seed 3" in status(browser)
    assert browser.find_element("id", "panel-edit").is_displayed()
    assert errors(browser) == []


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out(width, browser, folder):
    browser.set_window_size(width, 900)
    draw_half(browser)
    click(browser, "make")
    wait_for(lambda: browser.find_elements("css selector", ".answer"))
    for tab in ("tab-sample", "tab-edit"):
        click(browser, tab)
        wide = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1]
    browser.save_screenshot(str(folder / f"{width}.png"))
    assert errors(browser) == []


def test_hostile_files_are_errors_on_the_page_and_it_goes_on(browser, tmp_path):
    files = {
        "large.png": png_header(60_000, 60_000),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        "notes.png": b"<script>alert(1)</script>",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        browser.execute_script("document.getElementById('status').textContent = ''")
        browser.find_element("id", "file").send_keys(str(tmp_path / name))
        wait_for(lambda: "What to do:" in status(browser))
        assert browser.find_element("id", "status").get_attribute("class") == "error"
    click(browser, "example")
    wait_for(lambda: status(browser) == "")
    click(browser, "make")
    wait_for(lambda: "nothing is painted" in status(browser))


def test_many_clicks_end_in_one_answer(browser):
    draw_half(browser)
    for _ in range(40):
        browser.execute_script("document.getElementById('make').click()")
    wait_for(lambda: status(browser).startswith("Done in"))
    assert len(browser.find_elements("css selector", ".answer")) == 2
    assert errors(browser) == []


def test_a_model_that_vanishes_is_told_of(browser, folder):
    draw_half(browser)
    model = folder / "m.safetensors"
    model.rename(folder / "elsewhere")
    try:
        click(browser, "make")
        wait_for(lambda: "is gone" in status(browser))
    finally:
        (folder / "elsewhere").rename(model)
    click(browser, "make")
    wait_for(lambda: status(browser).startswith("Done in"))


def test_a_field_that_is_hidden_does_not_hold_the_others_up(browser):
    """A number beyond its range, in a field that the next edit has not."""
    draw_half(browser)
    browser.find_element("css selector", "[value=outpaint]").click()
    browser.execute_script("document.getElementById('amount').value = 99")
    browser.find_element("css selector", "[value=inpaint]").click()
    click(browser, "make")
    wait_for(lambda: status(browser).startswith("Done in"))


def test_an_answer_that_came_too_late_is_not_shown_as_another(browser):
    draw_half(browser)
    browser.find_element("css selector", "[value=outpaint]").click()
    click(browser, "make")
    browser.find_element("css selector", "[value=denoise]").click()
    wait_for(lambda: "you went on" in status(browser))
    assert not browser.find_elements("css selector", ".answer")


def test_work_can_be_cancelled(browser):
    browser.find_element("css selector", "[value=outpaint]").click()
    browser.execute_script(
        "document.getElementById('steps').value = 40; document.getElementById('amount').value = 8;"
        "document.getElementById('variations').value = 8"
    )
    click(browser, "make")
    wait_for(lambda: browser.find_element("id", "cancel").is_enabled())
    click(browser, "cancel")
    wait_for(lambda: status(browser) == "Cancelled")
    browser.find_element("css selector", "[value=denoise]").click()
    click(browser, "make")
    wait_for(lambda: status(browser).startswith("Done in"))


def test_what_is_drawn_can_be_taken_back(browser):
    def marked():
        return browser.execute_script(
            "const c = document.getElementById('canvas');"
            "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].join()"
        )

    clean = marked()
    draw_half(browser)
    drawn = marked()
    click(browser, "noise")
    wait_for(lambda: marked() != drawn)
    click(browser, "undo")
    assert marked() == drawn
    click(browser, "undo")
    assert marked() == clean
