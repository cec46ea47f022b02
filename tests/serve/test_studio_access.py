"""Who can use the studio: by keyboard, with a screen reader, on a phone, in the dark; and nothing from elsewhere."""

import re

import pytest

from atoll.serve.pages import STATIC
from tests.serve.browser import complains, sample, says, studio, tiles


def test_everything_works_by_keyboard(page) -> None:
    page.keyboard.press("Tab")
    assert page.locator(".skip").is_visible()
    page.keyboard.press("Enter")
    page.keyboard.type("moss")
    page.keyboard.press("Control+Enter")
    says(page, "4 images are ready.")
    assert page.evaluate("document.activeElement.id") == "prompt"
    # Tab reaches every control, and each has a visible focus.
    expected = set(page.evaluate(CONTROLS))
    reached: set[int] = set()
    while (focused := page.evaluate(FOCUSED))["place"] not in reached:
        assert focused["outline"] == "3px solid" or focused["place"] == 0, focused
        reached.add(focused["place"])
        page.keyboard.press("Tab")
    assert expected
    assert expected <= reached
    # An image is chosen and downloaded.
    page.locator("#tiles button").first.focus()
    page.keyboard.press("Enter")
    page.locator("#download").focus()
    with page.expect_download():
        page.keyboard.press("Enter")
    page.locator("#clear").focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").is_hidden()
    assert page.evaluate("document.activeElement.id") == "clear"


# Controls are named by their places in the document.
PLACE = "(element) => [...document.querySelectorAll('*')].indexOf(element)"
FOCUSED = f"""() => {{
    const element = document.activeElement, style = getComputedStyle(element);
    const outline = `${{style.outlineWidth}} ${{style.outlineStyle}}`;
    return {{place: element === document.body ? 0 : ({PLACE})(element), outline, html: element.outerHTML}};
}}"""
CONTROLS = f"""() => [...document.querySelectorAll("a, button, input, select, textarea, summary")]
    .filter((element) => element.checkVisibility() && !element.matches(":disabled")).map({PLACE})"""


def test_every_control_has_a_name_for_screen_readers(page) -> None:
    sample(page, prompt="moss", n=2, steps=3)
    says(page, "2 images are ready.")
    tiles(page).first.click()
    session = page.context.new_cdp_session(page)
    roles = {"button", "textbox", "combobox", "spinbutton", "checkbox", "slider", "link", "image", "img", "progressbar"}
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    names = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert len(names) > 30
    assert [role for role, name in names if not name] == []
    expected = {"Prompt", "Negative prompt", "Seed", "Lock seed", "Routing", "Step", "Sample"}
    assert expected <= {name for _, name in names}
    assert page.locator("[role=status]").count() == page.locator("[role=alert]").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_is_legible(browser, server, scheme) -> None:
    options = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "reduced_motion": "reduce"}
    with studio(browser, server.url, **options) as page:
        prompt = "a-word-without-any-space-" * 12
        sample(page, prompt=prompt, n=5, steps=3)
        says(page, "5 images are ready.")
        # The images come into view by themselves, and an error is seen beside its field.
        assert page.evaluate("document.querySelector('#results').getBoundingClientRect().top") < 370
        sample(page, n=0)
        complains(page, "Images: expected")
        for name in ("error", "n"):
            box = page.locator(f"#{name}").bounding_box()
            assert 0 <= box["y"] <= 740 - box["height"]
        assert page.locator("#run").is_hidden()
        page.locator("#tiles button").first.click()
        for part in ("weights", "about", "more"):
            page.locator(f"#{part} summary").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate(CONTRASTS) == []
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 23)"
        assert dark == (scheme == "dark")
        assert page.evaluate("getComputedStyle(document.querySelector('button')).transitionDuration") in ("0s", "")


# All text with a contrast below 4.5, and all edges of controls below 3.
CONTRASTS = """() => {
    const channel = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => 0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
    const contrast = (a, b) => {
        const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
        return (high + 0.05) / (low + 0.05);
    };
    const behind = (element) => {
        for (let one = element; one; one = one.parentElement) {
            const colour = parse(getComputedStyle(one).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const weak = [];
    for (const element of document.querySelectorAll("body *")) {
        if (!element.checkVisibility() || element.matches(":disabled, :disabled *, option, optgroup, svg *")) continue;
        const style = getComputedStyle(element), back = behind(element);
        const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        const ratio = contrast(parse(style.color), back);
        const name = element.outerHTML.slice(0, 80);
        if ((text || element.matches("input, textarea, select")) && ratio < 4.5) weak.push([name, ratio]);
        if (element.matches("input:not([type=range], [type=checkbox]), textarea, select, .swatch")) {
            const edge = element.matches(".swatch") ? style.backgroundColor : style.borderTopColor;
            const outside = contrast(parse(edge), behind(element.parentElement));
            if (outside < 3) weak.push([name, outside]);
        }
    }
    return weak;
}"""


def test_the_page_needs_nothing_from_elsewhere_and_has_no_inline_code() -> None:
    html = (STATIC / "index.html").read_text()
    assert re.findall(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=\"/static/)", html) == []
    for file in STATIC.iterdir():
        text = file.read_text()
        assert len(text.splitlines()) < 400
        urls = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)) - {"http://www.w3.org"}
        assert urls == set(), file
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            file
        )
