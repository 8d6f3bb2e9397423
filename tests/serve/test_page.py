"""The chat page in a real browser: headless Chromium, driven by selenium.

Set HEADRACE_SCREENSHOT to a path to keep a picture of it (docs/chat-page.png).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait
from serve_process import SLOW, Server

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def driver() -> Iterator[WebDriver]:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver_path = shutil.which("chromedriver")
    assert browser, "install chromium and chromium-driver (Debian) to test the chat page"
    assert driver_path, "install chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver_path)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_window_size(1440, 900)
    yield driver
    driver.quit()


class Page:
    def __init__(self, driver: WebDriver, url: str) -> None:
        self.driver = driver
        driver.get(url)
        driver.execute_script("localStorage.clear(); sessionStorage.clear()")
        driver.get(url)
        self.wait(lambda: "tokens of context" in self.text("model"))

    def find(self, name: str):
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self.find(name).text

    def wait(self, condition) -> None:
        WebDriverWait(self.driver, 60).until(lambda _: condition())

    def say(self, text: str) -> None:
        self.find("message").send_keys(text + Keys.ENTER)

    def turns(self, role: str) -> list[str]:
        found = self.driver.find_elements(By.CSS_SELECTOR, f".turn.{role} .text")
        return [turn.text for turn in found]

    def notes(self) -> list[str]:
        return [note.text for note in self.driver.find_elements(By.CSS_SELECTOR, ".turn .note")]

    def set(self, name: str, value: str) -> None:
        field = self.find(name)
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.driver.execute_script(script, field, value)

    def press(self, label: str) -> None:
        xpath = f"//button[not(@hidden)][text()='{label}']"
        self.driver.find_elements(By.XPATH, xpath)[-1].click()

    def settle(self) -> None:
        self.wait(lambda: self.find("send").is_displayed())


@pytest.fixture
def page(driver: WebDriver, server: Server) -> Page:
    return Page(driver, server.url)


def test_a_conversation(page: Page) -> None:
    page.set("temperature", "0")
    page.set("max_completion_tokens", "40")
    page.say("What is the capital of France? Answer in one sentence.")
    page.wait(lambda: page.turns("assistant") and page.turns("assistant")[0])
    page.settle()
    assert page.turns("user") == ["What is the capital of France? Answer in one sentence."]
    assert "Paris" in page.turns("assistant")[0]
    assert re.search(r"\d+ tokens · [\d.]+ tok/s · first after [\d.]+ s", page.notes()[0])
    page.say("And of Italy?")
    page.wait(lambda: len(page.notes()) == 2)
    assert len(page.turns("assistant")) == 2
    assert "complete" in page.find("status").get_attribute("textContent")
    _keep_screenshot(page)
    turns = page.turns("user"), page.turns("assistant")
    page.driver.refresh()
    page.wait(lambda: len(page.turns("assistant")) == 2)  # the tab keeps it
    assert (page.turns("user"), page.turns("assistant")) == turns
    page.find("clear").click()
    assert page.turns("assistant") == []
    assert page.find("empty").is_displayed()


def test_it_streams_and_stops(page: Page, server: Server) -> None:
    page.set("system", "You tell very long stories.")
    page.set("seed", "1")
    page.say("Tell me a very long story about the sea.")
    page.wait(lambda: len(page.turns("assistant")[0]) > 20)
    assert page.find("stop").is_displayed()  # text is there before the end
    assert not page.driver.find_elements(By.ID, "last")  # nor can it be tried again yet
    page.find("message").send_keys(Keys.ESCAPE)
    page.settle()
    assert "stopped" in page.notes()[0]
    assert page.driver.switch_to.active_element.get_attribute("id") == "message"
    server.check_pages()
    before = page.turns("assistant")[0]
    page.set("seed", "2")
    page.set("max_completion_tokens", "12")
    page.press("Try again")
    page.settle()
    page.wait(lambda: "longest" in page.notes()[0])
    assert len(page.turns("assistant")) == 1
    assert page.turns("assistant")[0] != before


def test_markup_in_messages_stays_text(page: Page) -> None:
    page.set("max_completion_tokens", "1")
    page.say("<img src=x onerror=document.title='broken'><b>bold</b>")
    page.settle()
    assert page.turns("user") == ["<img src=x onerror=document.title='broken'><b>bold</b>"]
    assert page.driver.title == "headrace"
    assert not page.driver.find_elements(By.CSS_SELECTOR, ".turn img, .turn b")


ANSWER = """# A *title*
Some **bold** and `co*d*e <b>`, 2 * 3 * 4, snake_case_name,
<b>no tag</b>, **open

- one
  - two
- three
2. second
   and more

```python
if a < b:

    print("**<b>")
```
[link](https://evil.example) ![x](https://evil.example/x.png)
```
cut"""
DRAWN = (
    "<h3>A <em>title</em></h3>"
    "<p>Some <strong>bold</strong> and <code>co*d*e &lt;b&gt;</code>, 2 * 3 * 4, snake_case_name,\n"
    "&lt;b&gt;no tag&lt;/b&gt;, **open</p>"
    "<ul><li>one</li><li>two</li><li>three</li><li>second\nand more</li></ul>"
    '<figure><pre><code>if a &lt; b:\n\n    print("**&lt;b&gt;")</code></pre></figure>'
    "<p>[link](https://evil.example) ![x](https://evil.example/x.png)</p>"
    "<figure><pre><code>cut</code></pre></figure>"
)


def test_markdown_in_answers_is_drawn_and_html_is_not(page: Page) -> None:
    """The same whether the answer comes at once or letter by letter."""
    script = """
        const [whole, parts] = [document.createElement("div"), document.createElement("div")];
        draw(whole, arguments[0]);
        for (let n = 1; n <= arguments[0].length; n++) draw(parts, arguments[0].slice(0, n));
        return [whole, parts].map((div) => {
            div.querySelectorAll("figcaption").forEach((caption) => caption.remove());
            return div.innerHTML;
        });
    """
    found = page.driver.execute_script(script, ANSWER)
    assert [re.sub(' (style|value)="[^"]*"', "", html) for html in found] == [DRAWN, DRAWN]


def test_errors_are_shown(page: Page) -> None:
    page.set("message", "word " * 2500)
    page.find("message").send_keys(Keys.ENTER)
    page.wait(lambda: page.notes())
    assert "context" in page.notes()[0]
    page.settle()
    page.set("max_completion_tokens", "2")
    page.say("Hi")  # the message that failed is not sent again
    page.wait(lambda: len(page.notes()) == 2)
    assert "context" not in page.notes()[1]
    assert len(page.driver.find_elements(By.CSS_SELECTOR, ".turn.failed")) == 2


def test_a_message_can_be_edited(page: Page) -> None:
    page.set("max_completion_tokens", "2")
    page.press("Explain gravity in one sentence.")  # one of the examples
    page.settle()
    assert page.turns("user") == ["Explain gravity in one sentence."]
    page.press("Edit message")
    assert page.turns("user") == page.turns("assistant") == []
    assert page.find("message").get_attribute("value") == "Explain gravity in one sentence."
    page.say(" Or two.")
    page.settle()
    assert page.turns("user") == ["Explain gravity in one sentence. Or two."]


def test_a_server_that_has_gone_is_said(driver: WebDriver, start: Callable[..., Server]) -> None:
    server = start(device=SLOW)
    page = Page(driver, server.url)
    page.say("Hello")
    page.wait(lambda: page.turns("assistant") and page.turns("assistant")[0])
    server.process.kill()
    page.settle()
    assert "network" in page.notes()[0] or "answer" in page.notes()[0]
    page.say("Are you there?")
    page.wait(lambda: len(page.notes()) == 2)
    assert page.notes()[1] == "the server does not answer"


def test_with_a_key_the_browser_s_own_dialogue_is_enough(
    driver: WebDriver, start: Callable[..., Server]
) -> None:
    key = "a-secret-key"
    server = start(ready=False, env={**os.environ, "HEADRACE_API_KEYS": key})
    server.wait_ready({"Authorization": f"Bearer {key}"})
    driver.get(server.url.replace("//", f"//anyone:{key}@"))  # what the dialogue makes of it
    page = Page(driver, server.url)
    page.set("max_completion_tokens", "2")
    page.say("Hello")
    page.settle()
    page.wait(lambda: "2 tokens" in page.notes()[0])


def test_nothing_can_be_sent_while_the_model_loads(
    driver: WebDriver, start: Callable[..., Server]
) -> None:
    server = start(ready=False, device=("--load-seconds", "3"))
    driver.get(server.url)
    name = driver.find_element(By.ID, "name")
    WebDriverWait(driver, 60).until(lambda _: name.text == "the model is loading …")
    assert not driver.find_element(By.ID, "send").is_enabled()
    WebDriverWait(driver, 60).until(lambda _: name.text == "tiny")
    assert driver.find_element(By.ID, "send").is_enabled()


def test_settings_last_and_the_theme_can_be_chosen(page: Page, server: Server) -> None:
    toggle = page.find("toggle")
    assert toggle.get_attribute("aria-expanded") == "false"
    toggle.click()
    assert page.find("settings").is_displayed()
    assert toggle.get_attribute("aria-expanded") == "true"
    page.set("temperature", "1.25")
    colours = {}
    for theme in ("light", "dark"):
        page.set("theme", theme)
        colours[theme] = page.driver.find_element(By.TAG_NAME, "body").value_of_css_property(
            "background-color"
        )
    assert colours["light"] != colours["dark"]
    page.driver.get(server.url)
    assert page.find("temperature").get_attribute("value") == "1.25"
    assert page.find("theme").get_attribute("value") == "dark"
    page.find("toggle").click()
    page.find("reset").click()
    page.driver.get(server.url)
    assert page.find("temperature").get_attribute("value") == "0.8"
    assert page.find("theme").get_attribute("value") == ""


def test_every_control_has_a_name_and_can_be_reached_by_keyboard(page: Page) -> None:
    page.find("toggle").click()
    for control in page.driver.find_elements(By.CSS_SELECTOR, "button, input, textarea, select"):
        if control.is_displayed():
            assert control.accessible_name, control.get_attribute("id")
    reached = set()
    for _ in range(30):  # once round, past the browser's own
        webdriver.ActionChains(page.driver).send_keys(Keys.TAB).perform()
        active = page.driver.switch_to.active_element
        reached.add(active.get_attribute("id") or active.get_attribute("class"))
    for name in ("skip", "toggle", "message", "send", "system", "temperature", "theme", "reset"):
        assert name in reached


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.driver.set_window_size(max(width, 500), 844)
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.set("max_completion_tokens", "1")
        page.say("x" * 300)
        page.settle()
        for opened in (False, True):
            if opened:
                page.find("toggle").click()
            wide = page.driver.execute_script(
                "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
            )
            assert not wide
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.set_window_size(1440, 900)


def test_nothing_comes_from_elsewhere_and_nothing_is_blocked(page: Page) -> None:
    outside = set()
    for entry in page.driver.get_log("performance"):
        for url in re.findall(r'"url":"(https?://[^"]+)"', entry["message"]):
            if urlsplit(url).hostname != "127.0.0.1":  # where the servers of these tests are
                outside.add(url)
    assert not outside
    complaints = [
        entry["message"]
        for entry in page.driver.get_log("browser")
        if entry["level"] == "SEVERE" and not re.search("400|503|ERR_", entry["message"])
    ]
    assert complaints == []


def _keep_screenshot(page: Page) -> None:
    if path := os.environ.get("HEADRACE_SCREENSHOT"):
        page.driver.save_screenshot(str(Path(path)))
