"""The HTML report in a real browser: headless Chromium, driven by selenium.

Set HEADRACE_PROFILE_SCREENSHOT to a path to keep a picture of it (docs/profile.png).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from headrace.profile import profile_model
from headrace.profile.html import page
from headrace.profile.result import Profile

WIDTHS = (390, 1440)


@pytest.fixture(scope="module")
def driver() -> Iterator[WebDriver]:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver_path = shutil.which("chromedriver")
    assert browser, "install chromium and chromium-driver (Debian) to test the report"
    assert driver_path, "install chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                     "--hide-scrollbars"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver_path)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def profile(smollm2_path: Path) -> Profile:
    return profile_model(smollm2_path, "cpu", tokens=32, label="smollm2")


@pytest.fixture(scope="module")
def report(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    profile.write_html(path)
    return path


@pytest.fixture
def show(driver: WebDriver, report: Path) -> Callable[..., WebDriver]:
    def open_at(width: int, height: int = 900, path: Path = report) -> WebDriver:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        for kind in ("browser", "performance"):
            driver.get_log(kind)
        driver.get(path.as_uri())
        return driver

    return open_at


def every(driver: WebDriver, selector: str) -> list[WebElement]:
    return driver.find_elements(By.CSS_SELECTOR, selector)


def first(driver: WebDriver, selector: str) -> WebElement:
    return driver.find_element(By.CSS_SELECTOR, selector)


def box(driver: WebDriver, selector: str) -> list[dict[str, float]]:
    script = """return [...document.querySelectorAll(arguments[0])].map(node => {
        const b = node.getBoundingClientRect();
        return {left: b.left, right: b.right, top: b.top, bottom: b.bottom};
    })"""
    return driver.execute_script(script, selector)


pytestmark = pytest.mark.real_model


@pytest.mark.parametrize("width", WIDTHS)
def test_the_roofline_is_drawn(show, profile, width):
    """A dot for each part with FLOPs, inside the chart, numbered; two ceilings and the slope."""
    driver = show(width)
    drawn = [g for g in profile.parts if g.cost.flops and not g.host]
    dots = every(driver, "#roofline circle")
    assert len(dots) == len(drawn)
    assert len(every(driver, "#roofline .roof")) == 3
    (chart,) = box(driver, "#roofline")
    assert chart["right"] - chart["left"] > 0.5 * min(width, 700)
    for dot in box(driver, "#roofline circle"):
        assert chart["left"] <= dot["left"] < dot["right"] <= chart["right"]
        assert chart["top"] <= dot["top"] < dot["bottom"] <= chart["bottom"]
    numbers = [node.text for node in every(driver, "#roofline .number")]
    places = [str(1 + i) for i, g in enumerate(profile.parts) if g in drawn]
    assert sorted(numbers, key=int) == places
    labels = box(driver, "#roofline .number")
    for i, a in enumerate(labels):  # no number on another: the boxes are taller than the digits
        for b in labels[:i]:
            apart = a["right"] <= b["left"] or b["right"] <= a["left"]
            assert apart or a["bottom"] <= b["top"] + 6 or b["bottom"] <= a["top"] + 6
    text = first(driver, "#roofline").text
    assert f"{profile.ceilings.bytes_per_second / 1e9:.3g} GB/s reading" in text
    assert "int8 dot" in text
    assert "float32 FMA" in text


def test_the_dots_stand_where_the_figures_say(show, profile):
    """Log-log: equal ratios are equal distances; an area is a share, unless it would vanish."""
    driver = show(1440)
    script = """return [...document.querySelectorAll('#roofline circle')].map(
        d => [+d.dataset.part, ...['cx', 'cy', 'r'].map(name => +d.getAttribute(name))])"""
    drawn = sorted(driver.execute_script(script))
    groups = [profile.parts[int(place)] for place, *_ in drawn]
    _, x, y, radius = np.array(drawn).T
    for at, values in (
        (x, [g.cost.intensity for g in groups]),
        (-y, [g.flops_per_second for g in groups]),
    ):
        scale, start = np.polyfit(np.log10(values), at, 1)
        assert scale > 50
        assert np.abs(scale * np.log10(values) + start - at).max() < 0.5
    shares = np.array([g.seconds.mean for g in groups]) / profile.seconds.mean
    large = radius > radius.min()
    assert large.sum() > 3
    areas = radius[large] ** 2 / shares[large]
    assert areas == pytest.approx(areas[0], rel=0.01)


def test_every_span_and_layer_is_drawn(show, profile):
    driver = show(1440)
    samples = sorted(profile.samples, key=lambda sample: sample.seconds)
    spans = samples[len(samples) // 2].spans
    assert len(every(driver, "#strip rect:not(.wait)")) == len(spans)
    layers = profile.layers[1:-1]
    assert len(every(driver, "#layers rect")) == sum(len(g.records) for g in layers)
    assert f"{len(spans)} parts" in first(driver, "#striptext").text


def test_the_verdict_and_the_key(show, profile):
    driver = show(390)
    assert profile.bottleneck.sentence in first(driver, "#verdict p").text
    keys = [node.text for node in every(driver, "#key li")]
    assert len(keys) == len(profile.parts)
    assert "gate/up matmul" in " ".join(keys)
    assert driver.title == "headrace profile: smollm2"
    assert f"unattributed {profile.unattributed_share:.1%}" in first(driver, "#tiles").text


def test_the_table_sorts(show, profile):
    driver = show(1440)

    def column(i: int) -> list[str]:
        return [row.find_elements(By.TAG_NAME, "td")[i].text for row in every(driver, "tbody tr")]

    assert len(column(0)) == len(profile.parts)
    headings = [node.text for node in every(driver, "thead th")]
    share = headings.index("share")
    for direction in ("descending", "ascending"):
        every(driver, "thead button")[share].click()
        assert every(driver, "thead th")[share].get_attribute("aria-sort") == direction
        shares = [float(text.rstrip("%")) for text in column(share)]
        assert shares == sorted(shares, reverse=direction == "descending")
        assert len(set(shares)) > 3
    every(driver, "#groups button")[3].click()
    assert "layer 29" in column(0)
    assert every(driver, "#groups button")[3].get_attribute("aria-pressed") == "true"


def test_what_is_pointed_at_is_explained(show):
    """By pointer and by keyboard; and the same part lights up everywhere."""
    driver = show(1440)
    dot = every(driver, "#roofline circle")[-1]  # the smallest, above all others
    place = dot.get_attribute("data-part")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", dot)
    webdriver.ActionChains(driver).move_to_element(dot).perform()
    tip = first(driver, "#tip")
    assert tip.is_displayed()
    assert re.search(r"FLOP/byte, \d+% of the roofline", tip.text)
    lit = every(driver, f'[data-part="{place}"].lit')
    assert {node.tag_name for node in lit} >= {"circle", "rect", "li", "tr"}
    webdriver.ActionChains(driver).move_to_element(first(driver, "h1")).perform()
    assert not tip.is_displayed()
    driver.execute_script("arguments[0].focus()", dot)
    assert tip.is_displayed()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_readable(show, width, theme):
    """Nothing is wider than the window; text of 12 px or more, in contrast to what is behind it."""
    driver = show(width)
    dark = first(driver, "#theme").text == "Light"
    if dark != (theme == "dark"):
        first(driver, "#theme").click()
    page_width = "return document.documentElement.scrollWidth"
    assert driver.execute_script(page_width) <= width
    for selector in ("#verdict p", "section > p", "svg text", "#key span", "td", "footer", "dt"):
        node = first(driver, selector)
        assert float(node.value_of_css_property("font-size").rstrip("px")) >= 12
        colour = node.value_of_css_property("fill" if "svg" in selector else "color")
        card = first(driver, "section").value_of_css_property("background-color")
        assert contrast(colour, card) >= 4.5, selector


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of two CSS colours."""

    def luminance(colour: str) -> float:
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_it_is_one_page_without_complaints(show, report):
    driver = show(1440)
    first(driver, "#theme").click()
    driver.execute_script("dispatchEvent(new Event('resize'))")
    asked = set()
    for entry in driver.get_log("performance"):
        asked.update(re.findall(r'"url":"((?:https?|file|ftp)://[^"]+)"', entry["message"]))
    assert asked == {report.as_uri()}
    assert driver.get_log("browser") == []
    text = report.read_text()
    assert set(re.findall(r"https?://[^\s\"'%]+", text)) == {"http://www.w3.org/2000/svg"}


def test_names_from_a_file_stay_text(show, fake, profiled, tmp_path):
    """A model may be called anything."""
    import dataclasses

    made = profiled(fake(lambda part: 1e-5), tokens=2)
    name = '</script><script>document.title="broken"</script><img src=x onerror=alert(1)>/*js*/'
    subject = dataclasses.replace(made.subject, model=name, architecture="<b>bold</b>")
    path = tmp_path / "odd.html"
    dataclasses.replace(made, subject=subject).write_html(path)
    driver = show(1440, path=path)
    assert "broken" not in driver.title.split(":")[0]
    assert "<b>bold</b>" in first(driver, "#about").text
    assert every(driver, "#about b, header img") == []
    assert driver.get_log("browser") == []


def test_figures_survive_the_page(fake, profiled):
    runner = fake(lambda part: 1e-5 * len(runner.batches))  # every step is longer than the last
    made = profiled(runner, tokens=5)
    text = page(made.as_json(), made.parts, made.layers, made.samples)
    figures = re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)
    facts = json.loads(figures[1])
    expected = made.as_json()
    assert facts["parts"] == json.loads(json.dumps(expected["parts"]))
    lengths = [span[3] for span in facts["strip"]]
    median = sorted(sample.spans[0].end - sample.spans[0].start for sample in made.samples)[2]
    assert lengths == pytest.approx([median * 1e6] * len(made.samples[0].spans))
    attends = [[place, us] for stack in facts["stacks"] for place, us in stack["parts"]
               if facts["parts"][place]["operation"] == "Attend"]  # fmt: skip
    assert len(attends) == len(facts["stacks"]) == 3
    assert [us for _, us in attends] == pytest.approx([median * 1e6] * 3)


def test_a_picture_for_the_guide(show):
    """docs/profile.png, when it is asked for."""
    driver = show(1200, 1130)
    driver.execute_script("document.documentElement.dataset.theme = 'light'")
    picture = driver.get_screenshot_as_png()
    assert picture.startswith(b"\x89PNG")
    if path := os.environ.get("HEADRACE_PROFILE_SCREENSHOT"):
        Path(path).write_bytes(picture)
