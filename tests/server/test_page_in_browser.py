"""The page and /docs in Debian's Chromium, against the real service over the scripted engine."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright

from server import api_keys
from tests.paths import CLIPS, ROOT
from tests.recording_engine import WORDS, ToneEngine, recording
from tests.serving import Live, running, scripted, slow_down, tone, wav

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")

expect.set_options(timeout=30_000)
AXE = (ROOT / "tests/assets/axe/axe.min.js").read_text(encoding="utf-8")
CLIP = CLIPS / "one-voice.mp3"
VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective}: ${event.blockedURI} ${event.sourceFile}`));
"""


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    """Chromium with a microphone that plays two people talking."""
    microphone = CLIPS / "background-present.wav"
    options = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
    started = playwright.chromium.launch(
        executable_path=CHROMIUM, args=[*options, f"--use-file-for-fake-audio-capture={microphone}%noloop"]
    )
    yield started
    started.close()


@pytest.fixture(scope="module")
def paced() -> Iterator[Live]:
    """A service that writes slowly enough to watch."""
    with running(scripted(scripted_token_interval_s=0.003)) as service:
        yield service


@pytest.fixture
def visit(browser: Browser) -> Iterator[Any]:
    """Opens pages, and checks at the end that none broke its policy or reported an error."""
    pages: list[Page] = []
    problems: list[str] = []

    def open_page(url: str, **options: Any) -> Page:
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write", "microphone"], **options)
        context.add_init_script(VIOLATIONS)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda request: problems.extend(other_hosts(request.url, url)))
        page.goto(url)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        problems += page.evaluate("window.violations")
        page.context.close()
    assert not problems


def other_hosts(requested: str, url: str) -> list[str]:
    """Names a request that leaves the service."""
    origin = "/".join(url.split("/")[:3])
    return [] if requested.startswith((origin, "blob:", "data:")) else [f"request to {requested[:100]}"]


def load(page: Page, clip: Path | dict[str, Any] = CLIP) -> None:
    page.set_input_files("#file", clip)  # pyright: ignore[reportArgumentType]
    expect(page.get_by_role("button", name="Play the clip")).to_be_enabled()


def ask(page: Page, question: str, *choices: str) -> None:
    page.get_by_label("Question about the clip").fill(question)
    if choices:
        page.get_by_text("Choices", exact=True).click()
        for index, choice in enumerate(choices):
            label = f"Choice {chr(65 + index)}"
            if index >= 2:
                page.get_by_role("button", name="Add a choice").click()
            page.get_by_label(label, exact=True).fill(choice)
    page.get_by_role("button", name="Ask", exact=True).click()


def answered(page: Page, state: str = "done") -> str:
    """Waits for the end of a question and returns the answer."""
    expect(page.locator("#answer-card")).to_have_attribute("data-state", state, timeout=60_000)
    return page.locator("#answer-text").inner_text() if state == "done" else ""


def assert_accessible(page: Page) -> None:
    """Checks with axe-core that nothing serious is wrong."""
    page.evaluate(AXE)
    result = page.evaluate("axe.run(document, {resultTypes: ['violations'], preload: false})")
    serious = [
        f"{each['id']} ({each['impact']}): {node['html'][:150]} {node['failureSummary']}"
        for each in result["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
    assert not serious, "\n".join(serious)


def test_a_file_is_asked_about_and_the_sections_arrive_one_by_one(visit: Any, paced: Live) -> None:
    page = visit(paced.url)
    expect(page.locator("#service")).to_have_attribute("data-state", "ready")
    load(page)
    expect(page.locator("#clip-size")).to_contain_text("9.6 s")
    sha256s: list[str] = []
    page.on("request", lambda request: sha256s.append(request.headers.get("x-hyper-clip", "")))
    # Slow at first, so that a busy machine sees the answer on its way.
    slow_down(paced, 0.2)
    try:
        ask(page, "What is heard?")
        # The trace is on the page while the model writes it.
        expect(page.locator("#trace li[data-section=PLANNING]")).to_contain_text("Measure")
        assert page.locator("#answer-card").get_attribute("data-state") == "running"
        expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_visible()
    finally:
        slow_down(paced, 0.003)
    assert answered(page) == "9.6 s of loud sound"
    titles = page.locator("#trace h3").all_inner_texts()
    assert titles == ["Plan", "Background", "Voices", "Words", "Description", "Reasoning", "Summary", "Response"]
    expect(page.locator("#trace li[data-section=ENV] .tag")).to_have_text("loud sound")
    expect(page.locator("#live")).to_have_text("Answer: 9.6 s of loud sound")
    assert hashlib.sha256(CLIP.read_bytes()).hexdigest() in sha256s
    page.get_by_text("Details").click()
    expect(page.locator("#fact-list")).to_contain_text("9.6 s, mp3, 16000 Hz")


def test_choices_have_their_probabilities_as_bars(visit: Any, live: Live) -> None:
    page = visit(live.url)
    load(page)
    ask(page, "What is it?", "a bell", "a dog", "<b>rain</b>")
    chosen = answered(page)
    lines = page.locator("#scores li")
    expect(lines).to_have_count(3)
    assert lines.locator(".choice").all_inner_texts() == ["a bell", "a dog", "<b>rain</b>"]
    shares = [float(text.removesuffix(" %")) for text in lines.locator(".score").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=2)
    expect(page.locator("#scores .chosen .choice")).to_have_text(chosen)
    widths = lines.locator(".fill").evaluate_all("all => all.map(each => parseFloat(each.style.width))")
    assert widths == pytest.approx(shares, abs=1)


def test_a_recording_from_the_microphone_is_asked_about(visit: Any, live: Live) -> None:
    page = visit(live.url)
    page.get_by_role("button", name="Record", exact=True).click()
    expect(page.locator("#recording-time")).to_contain_text("0:02")
    page.get_by_role("button", name="Stop and use").click()
    expect(page.get_by_role("button", name="Play the clip")).to_be_enabled()
    ask(page, "What is heard?")
    answer = answered(page)
    assert 1.5 < float(answer.split()[0]) < 6 and answer.endswith("of loud sound")
    page.get_by_text("Details").click()
    expect(page.locator("#fact-list")).to_contain_text("pcm_s16le, 16000 Hz, 1 channel")
    with page.expect_download() as download:
        page.get_by_role("link", name="Save the recording").click()
    assert Path(download.value.path()).read_bytes()[:4] == b"RIFF"
    # Leaving a recording gives the microphone back.
    page.get_by_role("button", name="Remove", exact=True).click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.get_by_role("button", name="Discard").click()
    expect(page.get_by_text("Drop a clip here")).to_be_visible()


def test_a_pause_is_shown_where_it_was_taken(visit: Any, live: Live) -> None:
    page = visit(live.url)
    silence = tone(2.0, amplitude=0.0)
    load(page, {"name": "silence.wav", "mimeType": "audio/wav", "buffer": silence})
    ask(page, "What is heard?")
    answered(page)
    expect(page.locator("#trace li[data-section=REASONING] .pause")).to_contain_text("paused for 64 tokens")
    expect(page.locator("#warnings")).to_contain_text("silent_audio")


def test_windows_of_a_recording_are_marked_and_played(visit: Any, live: Live) -> None:
    """The reply of another service, with the timeline of a recording in it."""
    page = visit(live.url)
    load(page)
    timeline = [
        {"index": 0, "start_s": 0.0, "end_s": 4.5, "status": "done", "environment": ["rain"], "transcript": "hello"},
        {"index": 1, "start_s": 4.5, "end_s": 9.6, "status": "silent"},
    ]

    *events, last = live.ask(CLIP.read_bytes(), stream="true").text.rstrip("\n").split("\ndata: ")
    body = "\ndata: ".join([*events, json.dumps({**json.loads(last), "timeline": timeline})]) + "\n\n"
    page.route("**/v1/audio/qa", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "What is heard?")
    answered(page)
    windows = page.get_by_role("list", name="Windows of the recording").get_by_role("button")
    assert windows.all_inner_texts() == ["0:00.0 to 0:04.5\nrain · hello", "0:04.5 to 0:09.6\nsilent"]
    windows.nth(1).click()
    # It plays from 4.5 s on, and ends at the window's end.
    expect(page.locator("#play-time")).to_have_text(re.compile(r"^0:0([5-9]|4\.[5-9])"))
    page.get_by_role("slider", name="Position in the clip").press("Home")
    expect(page.locator("#play-time")).to_contain_text("0:00")


def test_a_recording_is_asked_about_window_by_window(visit: Any) -> None:
    words = [(4.0, "alpha"), (12.0, "bravo"), (33.0, "charlie"), (58.0, "alpha"), (80.0, "delta")]
    clip = {"name": "long.wav", "mimeType": "audio/wav", "buffer": wav(recording(95, words))}
    with running(scripted(max_queue_wait_s=1000, trim_silence=False), ToneEngine()) as service:
        page = visit(service.url)
        load(page, clip)
        expect(page.locator("#clip-notice")).to_contain_text("The clip has 95.0 s.")
        expect(page.locator("#code")).to_contain_text("long_audio=chunk")
        ask(page, "Which word is said?", "bravo", "foxtrot")
        assert answered(page) == "bravo"

        # The timeline below the waveform has the words of each window.
        windows = page.get_by_role("list", name="Windows of the recording").get_by_role("button")
        texts = windows.all_inner_texts()
        assert (
            len(texts) >= 4 and texts[0].startswith("0:00.0 to ") and texts[-1].splitlines()[0].endswith(" to 1:35.0")
        )
        assert [word for _, word in words] == re.findall("|".join(WORDS), " ".join(texts))
        # The waveform has a mark for each window, from its start to its end.
        regions = page.locator("#wave [part~=region]")
        expect(regions).to_have_count(len(texts))
        edges = [[seconds(text) for text in line.splitlines()[0].split(" to ")] for line in texts]
        frame = page.locator("#wave").bounding_box()
        assert frame
        for index, (start_s, end_s) in enumerate(edges):
            box = regions.nth(index).bounding_box()
            assert box and box["x"] - frame["x"] == pytest.approx(frame["width"] * start_s / 95, abs=3)
            assert box["width"] == pytest.approx(frame["width"] * (end_s - start_s) / 95, abs=3)

        # The evidence is the window with the word, and plays from there.
        evidence = page.get_by_role("list", name="Evidence").get_by_role("button")
        expect(evidence.first).to_contain_text("bravo")
        expect(windows.locator(":scope.cited")).to_have_count(evidence.count())
        assert evidence.first.inner_text().splitlines()[0] == texts[0].splitlines()[0]
        page.get_by_role("slider", name="Position in the clip").press("End")
        evidence.first.click()
        expect(page.locator("#play-time")).to_have_text(re.compile(r"^0:[01]\d\."))
        page.get_by_text("Details").click()
        expect(page.locator("#fact-list")).to_contain_text(f"Windows{len(texts)}")
        assert_accessible(page)

        # Code answers a count from the timeline; that reply has no trace.
        page.get_by_text("Open answer", exact=True).click()
        ask(page, 'How many times is "alpha" said?')
        assert answered(page) == "2"
        expect(evidence).to_have_count(2)
        expect(page.locator("#fact-list")).to_contain_text("code read the answer from the timeline")
        expect(page.locator("#warnings")).to_contain_text("answered_from_timeline")
        page.locator("#history button").filter(has_text="Which word is said?").click()
        expect(evidence.first).to_contain_text("bravo")

        # A clip of one window is asked about as before.
        load(page)
        expect(page.locator("#clip-notice")).to_be_hidden()
        expect(page.locator("#code")).not_to_contain_text("long_audio")


def seconds(text: str) -> float:
    """Reads a time as the page writes it."""
    minutes, _, rest = text.partition(":")
    return 60 * int(minutes) + float(rest)


def test_an_error_is_shown_with_code_message_and_hint(visit: Any, live: Live) -> None:
    page = visit(live.url)
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no audio at all"})
    expect(page.get_by_text("The browser cannot play this format.")).to_be_visible()
    ask(page, "What is heard?")
    answered(page, "failed")
    failure = page.get_by_role("alert").filter(has_text="unsupported_audio")
    error = live.ask(b"no audio at all").json()["error"]
    for text in (error["message"], error["hint"], "Request req_"):
        expect(failure).to_contain_text(text)
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()
    assert_accessible(page)
    load(page)
    expect(failure).to_be_hidden()


def test_a_running_question_is_cancelled(visit: Any, paced: Live) -> None:
    page = visit(paced.url)
    load(page)
    slow_down(paced, 0.05)
    try:
        ask(page, "What is heard?")
        expect(page.locator("#trace li").first).to_be_visible()
        page.keyboard.press("Escape")
        answered(page, "cancelled")
        paced.wait_until_idle()
    finally:
        slow_down(paced, 0.003)
    ask(page, "What is heard?")
    assert answered(page) == "9.6 s of loud sound"
    # A cancelled question is not among those that were answered.
    expect(page.locator("#history button")).to_have_count(1)


def test_past_questions_on_a_clip_come_back(visit: Any, live: Live) -> None:
    page = visit(live.url)
    load(page)
    ask(page, "What is heard?")
    first = answered(page)
    ask(page, "Is it a dog?", "yes", "no")
    answered(page)
    history = page.locator("#history button")
    expect(history).to_have_count(2)
    history.filter(has_text="What is heard?").click()
    expect(page.locator("#answer-text")).to_have_text(first)
    expect(page.locator("#scores")).to_be_hidden()
    load(page, CLIPS / "four-voices.mp3")
    expect(page.locator("#history-card")).to_be_hidden()
    expect(page.get_by_text("The answer appears here")).to_be_visible()
    load(page)
    expect(history).to_have_count(2)


QUESTION = 'What\'s "heard"; at $HOME, `here`?\n@all <now> — ü'


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_the_copied_request_gives_the_same_answer(visit: Any, live: Live, tmp_path: Path, language: str) -> None:
    page = visit(live.url)
    name = 'it\'s "one", two;three.mp3'
    (tmp_path / name).write_bytes(CLIP.read_bytes())
    load(page, tmp_path / name)
    page.get_by_text("Options").click()
    page.get_by_label("Seed").fill("7")
    ask(page, QUESTION, "it's a bell", "@dog", "$(rain)")
    chosen = answered(page)
    page.get_by_text(language, exact=True).click()
    page.get_by_role("button", name=f"Copy as {language}").click()
    expect(page.locator("#copy")).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    command = ["bash", "-c", copied] if language == "curl" else [sys.executable, "-c", copied]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert (json.loads(done.stdout)["answer"]["text"] if language == "curl" else done.stdout.strip()) == chosen


def test_a_key_is_asked_for_and_kept_for_the_session_only(visit: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = api_keys.add(path, name="anna", scopes=("ask",), expires=None)
    with running(scripted(key_file=path)) as service:
        page = visit(service.url)
        expect(page.locator("#service-text")).to_have_text("needs an API key")
        load(page)
        ask(page, "What is heard?")
        answered(page, "failed")
        expect(page.locator("#failure-code")).to_have_text("invalid_api_key")
        page.get_by_role("button", name="Enter an API key").click()
        page.get_by_label("Key", exact=True).fill(secret)
        assert_accessible(page)
        page.get_by_role("button", name="Use the key").click()
        expect(page.locator("#service")).to_have_attribute("data-state", "ready")
        ask(page, "What is heard?")
        assert answered(page) == "9.6 s of loud sound"
        assert page.evaluate("JSON.stringify(localStorage)") == "{}" and secret not in page.url
        expect(page.locator("#code")).to_contain_text("Bearer $HYPER_API_KEY")
        assert secret not in page.locator("#code").inner_text()
        page.goto(f"{service.url}/docs")
        expect(page.get_by_text("/v1/audio/qa").first).to_be_visible()
        other = visit(f"{service.url}/docs")
        other.get_by_label("This service needs an API key").fill("hyp_wrong")
        other.get_by_role("button", name="Load the documentation").click()
        expect(other.get_by_role("alert")).to_contain_text("API key")
        other.get_by_label("This service needs an API key").fill(secret)
        other.get_by_role("button", name="Load the documentation").click()
        expect(other.get_by_text("/v1/audio/qa").first).to_be_visible()


def test_the_service_is_reported_when_it_is_gone(visit: Any) -> None:
    with running(scripted()) as service:
        page = visit(service.url)
        load(page)
    ask(page, "What is heard?")
    answered(page, "failed")
    expect(page.locator("#failure-code")).to_have_text("unreachable")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


def test_the_page_works_by_keyboard_alone(visit: Any, live: Live) -> None:
    page = visit(live.url)
    page.on("filechooser", lambda chooser: chooser.set_files(CLIP))
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the question")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Question about the clip")).to_be_focused()
    page.keyboard.type("What is it?")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#clip-notice")).to_have_text("Choose or record a clip first.")
    expect(page.get_by_role("button", name="Choose a file")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Play the clip")).to_be_enabled()
    slider = page.get_by_role("slider", name="Position in the clip")
    slider.press("ArrowRight")
    # The player seeks in its own time; a key pressed before that starts from the old position.
    expect(slider).to_have_attribute("aria-valuetext", "1.0 of 9.6 seconds")
    slider.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "2.0 of 9.6 seconds")
    page.get_by_label("Open answer").press("ArrowRight")
    page.get_by_label("Choice A", exact=True).focus()
    page.keyboard.type("yes")
    page.keyboard.press("Enter")
    page.keyboard.type("no")
    page.keyboard.press("Control+Enter")
    assert answered(page) in ("yes", "no")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_serious_is_inaccessible_and_nothing_overflows(visit: Any, live: Live, scheme: str, width: int) -> None:
    page = visit(live.url, color_scheme=scheme, viewport={"width": width, "height": 844}, reduced_motion="reduce")
    expect(page.locator("#service")).to_have_attribute("data-state", "ready")
    assert_accessible(page)
    load(page)
    ask(page, "Which of these long words fits the sound best?", "incomprehensibilities" * 3, "b")
    answered(page)
    page.get_by_text("Details").click()
    page.get_by_text("Options").click()
    assert_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 18, 21)"
    assert dark == (scheme == "dark")


def test_the_theme_can_be_chosen_against_the_system(visit: Any, live: Live) -> None:
    page = visit(live.url, color_scheme="light")
    button = page.get_by_role("button", name="Theme")
    button.click()
    button.click()
    expect(button).to_have_attribute("aria-label", "Theme: dark")
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 18, 21)"


def test_the_api_documentation_needs_no_other_host_and_can_be_tried(visit: Any, live: Live) -> None:
    page = visit(f"{live.url}/docs")
    page.get_by_text("/livez").first.click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table tbody .response-col_description")).to_contain_text("alive")
