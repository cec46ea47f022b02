"""The studio's page: cancellation and errors, tokens, foreign files, the slider and the gallery."""

import struct
import zlib

import pytest

from tests.serve.browser import complains, sample, says, studio, tiles
from tests.waiting import wait_until


def test_previews_are_shown_while_sampling_which_can_be_cancelled(page, engine) -> None:
    engine.hold()
    sample(page, prompt="moss", n=2, steps=4)
    tiles(page).nth(1).wait_for()
    assert page.locator("#sample").is_disabled()
    assert page.locator("#sheet").get_attribute("aria-busy") == "true"
    page.locator("#step-text", has_text="4 of 4: the newest estimate").wait_for()
    page.get_by_role("button", name="Cancel").click()
    says(page, "Cancelled.")
    wait_until(lambda: engine.jobs[0].cancelled.is_set())
    assert page.locator(".waiting:visible").all_inner_texts() == ["cancelled"] * 2
    assert page.locator("#step-field").is_hidden()
    assert page.locator("#sample").is_enabled()
    assert page.locator("#thumbs button").count() == 0
    # Side by side, what waits for its turn is not started.
    page.get_by_role("button", name="Each routing").click()
    wait_until(lambda: len(engine.jobs) == 5)
    page.get_by_role("button", name="Cancel").click()
    says(page, "Cancelled.")
    assert len(engine.jobs) == 5
    assert page.locator(".waiting:visible").all_inner_texts() == ["cancelled"] * 7


def test_a_page_that_is_left_gives_its_job_up(page, engine) -> None:
    engine.hold()
    sample(page, prompt="moss")
    tiles(page).first.wait_for()
    page.goto("about:blank")
    wait_until(lambda: engine.jobs[0].cancelled.is_set())


def test_errors_are_shown_in_words(browser, serve, engine) -> None:
    server = serve(max_n=8)
    with studio(browser, server.url, refusals=(400,)) as page:
        sample(page, prompt="fail", n=1)
        complains(page, "The ensemble answered with NaN.")
        sample(page, prompt="refuse")
        complains(page, "Steps is 0; expected at least 1.")
        # The browser itself knows the limits, and names the field.
        sample(page, prompt="moss", n=9)
        complains(page, "Images: expected a whole number from 1 to 8.")
        assert page.locator("#n").get_attribute("aria-invalid") == "true"
        assert page.evaluate("document.activeElement.id") == "n"
        page.locator("#n").fill("1")
        assert page.locator("#error").is_hidden()
        assert page.locator("[aria-invalid]").count() == 0
        # A field in a closed part is opened.
        sample(page, n=1, steps="")
        complains(page, "Steps: expected a whole number from 1 to 250.")
        page.locator("#more summary").click()
        page.locator("#range_low").fill("0.9")
        page.locator("#range_high").fill("0.1")
        page.locator("#more summary").click()
        sample(page, steps=3)
        complains(page, "Guidance_range is 0.9 to 0.1; expected the smaller time first.")
        assert page.locator("#range_low").is_visible()
        page.locator("#range_low").fill("0")
        sample(page)
        says(page, "The image is ready.")


def test_a_server_that_is_gone_says_so(browser, serve) -> None:
    server = serve()
    with studio(browser, server.url, refusals=("ERR_CONNECTION_REFUSED",)) as page:
        page.route("**/v1/jobs", lambda route: route.abort("connectionrefused"))
        sample(page, prompt="moss")
        complains(page, "The server does not answer. Is it running?")


@pytest.mark.slow  # two seconds, which the server demands
def test_a_busy_server_is_tried_again(browser, serve, engine) -> None:
    server = serve()
    with studio(browser, server.url, refusals=(503,)) as page:
        engine.full = True
        with page.expect_response(lambda response: response.status == 503):
            sample(page, prompt="moss", n=1)
        engine.full = False
        says(page, "The image is ready.")


def test_replicas_without_jobs_say_so(browser, serve) -> None:
    with studio(browser, serve(replicated=True).url, refusals=(404,)) as page:
        sample(page, prompt="moss")
        complains(page, "This server has no jobs, which the studio needs.")


def test_a_token_is_requested_and_sent(browser, serve) -> None:
    server = serve(tokens=("secret-token",))
    with studio(browser, server.url, refusals=(401,), ready=False) as page:
        complains(page, "This server needs a token.")
        assert page.evaluate("document.activeElement.id") == "token"
        page.get_by_label("Access token").fill("wrong-token")
        page.get_by_role("button", name="Use", exact=True).click()
        complains(page, "The server does not accept this token.")
        page.get_by_label("Access token").fill("secret-token")
        page.keyboard.press("Enter")
        page.locator("#routing option").first.wait_for(state="attached")
        sample(page, prompt="moss", n=1)
        says(page, "The image is ready.")
        # It stays for this tab, and is in no address.
        page.reload()
        page.locator("#routing option").first.wait_for(state="attached")
        assert "secret" not in page.url
        page.get_by_role("button", name="Forget").click()
        complains(page, "This server needs a token.")


def chunk(kind: bytes, data: bytes, damage: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ damage)


SIGNATURE, END = b"\x89PNG\r\n\x1a\n", chunk(b"IDAT", b"") + chunk(b"IEND", b"")
FILES = {
    "is no PNG file": b"GIF89a, or anything else",
    "is no PNG file.": b"",
    "has no settings of Atoll": SIGNATURE + chunk(b"tEXt", b"parameters\0Steps: 3") + END,
    "has no settings of Atoll.": SIGNATURE + chunk(b"IDAT", b"") + chunk(b"tEXt", b'atoll\0{"format": 1}') + END,
    "is damaged: it ends too early": SIGNATURE,
    "is damaged": SIGNATURE + struct.pack(">I", 2**32 - 1) + b"tEXtatoll\0",
    "its settings do not have their checksum": SIGNATURE + chunk(b"tEXt", b"atoll\0{}", 1) + END,
    "settings that are too long": SIGNATURE + chunk(b"tEXt", b"atoll\0" + b" " * 2**21) + END,
    "settings that cannot be read": SIGNATURE + chunk(b"tEXt", b"atoll\0[1]") + END,
    "settings of format 2, but this page reads format 1": SIGNATURE + chunk(b"tEXt", b'atoll\0{"format": 2}') + END,
    "settings without a prompt": SIGNATURE + chunk(b"tEXt", b'atoll\0{"format": 1, "seed": 3}') + END,
    "seed is not a whole number": SIGNATURE
    + chunk(b"tEXt", b'atoll\0{"format": 1, "prompt": "", "seed": 9007199254740993}')
    + END,
    "guidance_range is not two numbers": SIGNATURE
    + chunk(b"tEXt", b'atoll\0{"format": 1, "prompt": "", "guidance_range": [1, 0]}')
    + END,
    "compressed settings": SIGNATURE + chunk(b"iTXt", b"atoll\0\1\0\0\0x") + END,
}


def test_files_without_usable_settings_change_nothing_and_say_why(page) -> None:
    page.locator("#prompt").fill("as before")
    for words, content in FILES.items():
        page.locator("#file").set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": content})
        complains(page, words.rstrip("."))
        assert page.locator("#error").inner_text().startswith("The file x.png ")
        assert page.locator("#prompt").input_value() == "as before"


def test_text_from_a_file_stays_text(page) -> None:
    prompt = "<img src=x onerror=alert(1)> \u2603"
    text = f'{{"format": 1, "prompt": "{prompt}", "seed": 3, "routing": "<b>x</b>"}}'
    content = SIGNATURE + chunk(b"iTXt", b"atoll\0\0\0\0\0" + text.encode()) + END
    page.locator("#file").set_input_files({"name": "<b>.png", "mimeType": "image/png", "buffer": content})
    says(page, "The settings of <b>.png are restored.")
    assert page.locator("#prompt").input_value() == prompt
    page.locator("#routing").select_option("top-2")
    sample(page)
    says(page, "The image is ready.")
    assert page.locator("#sheet-title").inner_text() == prompt
    assert prompt in page.locator("#settings").inner_text()
    assert page.locator("h2 img, dd img, #status b").count() == 0


def test_the_slider_shows_each_step_of_all_images(page) -> None:
    sample(page, prompt="moss", n=2, steps=4)
    says(page, "2 images are ready.")
    slider, sources = page.locator("#step"), []
    slider.press("End")
    for text in ("4 of 4: the image", "3 of 4: the estimate", "2 of 4", "1 of 4"):
        assert text in page.locator("#step-text").inner_text() == slider.get_attribute("aria-valuetext")
        sources += [image.get_attribute("src") for image in tiles(page).all()]
        slider.press("ArrowLeft")
    assert len(set(sources)) == 8
    assert page.locator(".marker:visible").count() == 2


def test_the_gallery_stays_and_can_be_deleted(page) -> None:
    sample(page, prompt="moss", n=3, steps=2)
    says(page, "3 images are ready.")
    page.reload()
    thumbs = page.locator("#thumbs button")
    thumbs.nth(2).wait_for()
    assert "3 of at most 200 images" in page.locator("#gallery-text").inner_text()
    # An image of the gallery has its steps and its weights.
    thumbs.first.click()
    says(page, "The image is open")
    assert page.locator("#step-field").is_visible()
    assert page.locator(".strip").is_visible()
    page.get_by_role("button", name="Delete from the gallery").click()
    says(page, "The image is deleted")
    assert thumbs.count() == 2
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("button", name="Keep them").click()
    assert thumbs.count() == 2
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete all").click()
    says(page, "The gallery is empty")
    page.reload()
    page.locator("#gallery-text", has_text="Finished images stay here").wait_for()
    assert thumbs.count() == 0


def test_the_gallery_is_bounded(page) -> None:
    script = """async () => {
        const store = await import("/static/store.js");
        const blob = new Blob([new Uint8Array(10)], {type: "image/png"});
        const common = {blob, width: 1, height: 1, steps: [], total: 1, experts: [], weights: [], times: []};
        const ids = [];
        for (let seed = 0; seed < 203; seed += 1) ids.push(await store.addImage({...common, settings: {seed}}));
        const large = {...common, settings: {seed: 999}, steps: [{step: 1, blob: {size: store.MAX_BYTES - 25}}]};
        const few = await store.listImages();
        await store.addImage(large);
        const seeds = (await store.listImages()).map((image) => image.settings.seed);
        return [few.length, few.at(-1).settings.seed, await store.loadImage(ids[0]), seeds];
    }"""
    assert page.evaluate(script) == [200, 3, None, [999, 202]]


def test_of_many_experts_the_lightest_share_a_colour(page) -> None:
    script = """async () => {
        const {classesOf, inWords, legendOf} = await import("/static/strip.js");
        const experts = Array.from({length: 12}, (_, i) => `e${i}`);
        const trace = {experts, weights: [experts.map((_, i) => (i === 11 ? 0.5 : i / 110))]};
        const classes = classesOf([trace]);
        const legend = legendOf([trace], classes).map((item) => item.textContent);
        return [[...classes.values()].filter((one) => one === "e-others").length, legend.at(-1), inWords(trace)];
    }"""
    count, legend, words = page.evaluate(script)
    assert (count, legend) == (5, "5 others ")
    assert words.startswith("e11 50 %, e10 9 %, e9 8 %, ")


def test_events_are_parsed_wherever_the_stream_is_cut(page) -> None:
    script = """async (size) => {
        const {parse} = await import("/static/api.js");
        const first = ': ping\\r\\n\\r\\nid: 1\\nevent: started\\ndata: {"a": "\\u00e9\\u2603"}\\n\\n';
        const text = first + 'id: 2\\ndata:{"b":\\ndata: 2}\\n\\nid: 3\\ndata: {}';
        const bytes = new TextEncoder().encode(text);
        const stream = new ReadableStream({start(controller) {
            for (let i = 0; i < bytes.length; i += size) controller.enqueue(bytes.slice(i, i + size));
            controller.close();
        }});
        const events = [];
        for await (const event of parse(stream)) events.push([event.id, event.name, event.data]);
        return events;
    }"""
    for size in (1, 7, 1000):
        assert page.evaluate(script, size) == [["1", "started", {"a": "\u00e9\u2603"}], ["2", "message", {"b": 2}]]
