"""The HTML report in a real browser: it works from a file, with keyboard, on a phone, in light and dark, without scripts."""

from __future__ import annotations

from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]  # one Chromium, and each sample is written once

SLOW = pytest.mark.slow(reason="a page of 5,000 cells is drawn from top to bottom")
SAMPLES = ("regression", "all_green", "hostile", "everything", pytest.param("many_cells", marks=SLOW))
DRAWN = "document.querySelectorAll('.drawing svg').length"
LANDED = """section => {
    const top = document.getElementById(section).getBoundingClientRect().top;
    return (top >= 0 && top < 250) || document.documentElement.scrollHeight - window.scrollY - window.innerHeight <= 1;
}"""
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def draw_everything(page: Any) -> None:
    """Open what is folded, so that every plot comes into view and every table exists."""
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    page.wait_for_timeout(100)
    height = page.evaluate("document.documentElement.scrollHeight")
    for top in range(0, min(height, 12_000), 600):
        page.evaluate("(top) => window.scrollTo({ top, behavior: 'instant' })", top)
        page.wait_for_timeout(20)


def shows(page: Any, text: str) -> None:
    """Wait until the filter says so."""
    page.locator("#shown", has_text=text).wait_for()


def has(page: Any, selector: str, count: int) -> None:
    """Wait until there are so many of these."""
    playwright.expect(page.locator(selector)).to_have_count(count)


@pytest.mark.parametrize("name", SAMPLES)
def test_it_opens_without_a_complaint_and_without_the_network(opened: Any, name: str) -> None:
    with opened(name) as page:
        assert page.locator("h1").inner_text()
        draw_everything(page)
        assert page.locator("img").count() == 0
        assert page.evaluate(WIDER) <= 0


def test_a_complaint_is_seen(opened: Any) -> None:
    with pytest.raises(AssertionError, match="as it should"), opened("all_green") as page:
        page.evaluate("() => new Promise((done) => { console.error('as it should'); setTimeout(done, 50); })")


def test_the_network_is_seen_and_closed(opened: Any) -> None:
    with pytest.raises(AssertionError, match="Content Security Policy"), opened("all_green") as page:
        page.evaluate(
            "() => new Promise((done) => { const image = new Image(); image.onerror = done; image.src = 'https://example.com/x.png'; document.body.append(image); })"
        )


@pytest.mark.parametrize("name", SAMPLES)
def test_it_fits_a_phone(opened: Any, name: str) -> None:
    with opened(name, width=360, height=780) as page:
        draw_everything(page)
        assert page.evaluate(WIDER) <= 0


def test_the_first_screen_holds_the_answer(opened: Any) -> None:
    with opened("regression") as page:
        for text in (
            "In transformers 5.8.0 to 5.8.1: Never initialised: ",
            "use transformers 5.9.0 or newer",
        ):
            box = page.get_by_text(text).first.bounding_box()
            assert box["y"] + box["height"] < 800


def test_the_filter_narrows_findings_and_map(opened: Any) -> None:
    with opened("everything") as page:
        shown = page.locator("#shown")
        assert "7 of 7 findings" in shown.inner_text()
        page.fill("#filter [name=text]", "optimizer-underflow")
        shows(page, "1 of 7 findings")
        assert page.locator("#findings .card:visible").count() == 1
        page.fill("#filter [name=text]", "nothing has this")
        shows(page, "0 of 7 findings")
        assert page.get_by_text("No finding matches the filter.").is_visible()
        page.click("#filter [type=reset]")
        shows(page, "7 of 7 findings")
        page.select_option("#filter [name=precision]", "pure-fp16")
        shows(page, "1 of 7 findings, 1 row ")
        page.select_option("#filter [name=precision]", "")
        page.select_option("#filter [name=group]", "train")
        has(page, ".map .check-name", 5)
        page.select_option("#filter [name=status]", "accepted")
        shows(page, "1 of 7 findings, 1 row ")
        assert page.locator(".map td.accepted").count() == 1


def test_a_word_chooses_checks_or_cells(opened: Any) -> None:
    with opened("regression") as page:
        page.fill("#filter [name=text]", "head-init 5.8.1")
        has(page, ".map .check-name", 1)
        assert page.locator(".map tbody tr").count() == 2
        assert page.locator(".map td.failed").count() == 2


def test_links_lead_to_cards_that_the_filter_hides(opened: Any) -> None:
    with opened("everything") as page:
        page.fill("#filter [name=text]", "nothing has this")
        shows(page, "0 of 7 findings")
        page.get_by_role("link", name="Evidence, script and command").click()
        page.locator("#finding-1").wait_for(state="visible")
        assert page.evaluate("document.activeElement.id") == "finding-1"
        assert page.locator("#finding-1").is_visible()


def test_a_link_from_outside_opens_what_is_folded(opened: Any) -> None:
    with opened("everything", anchor="#finding-4") as page:
        page.locator("#finding-4:focus").wait_for(state="attached")


def test_the_map_is_used_with_the_keyboard(opened: Any) -> None:
    with opened("regression") as page:
        tiles = page.locator(".map td[tabindex='0']")
        assert tiles.count() == 1
        tiles.focus()
        for key in ("ArrowRight", "ArrowDown", "ArrowDown"):
            page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.at") == "2:1"
        assert tiles.count() == 1
        page.keyboard.press("End")
        assert page.evaluate("document.activeElement.dataset.at") == "2:4"
        page.keyboard.press("Home")
        for _ in range(4):
            page.keyboard.press("ArrowDown" if _ else "ArrowUp")
        assert (
            page.evaluate("document.activeElement.getAttribute('aria-label')")
            == "load.head-init, 5.8.0 / glm-tiny: failed"
        )
        detail = page.locator("#detail").inner_text()
        assert "load.head-init" in detail
        assert "uninitialised NaN of 0" in detail
        page.locator("#detail a").click()
        assert page.evaluate("document.activeElement.id") == "finding-1"


def test_the_page_is_walked_with_tab(opened: Any) -> None:
    with opened("regression") as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        assert page.locator(".skip").bounding_box()["x"] >= 0
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('header.hero') !== null")
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid"


@pytest.mark.slow
def test_rows_of_the_map_can_be_joined(opened: Any) -> None:
    with opened("many_cells") as page:
        assert page.locator(".map").get_attribute("aria-rowcount") == "126"
        page.select_option("#rows", label="every cell")
        assert 20 < page.locator(".map tbody tr").count() < 200
        assert page.locator(".map").get_attribute("aria-rowcount") == "5001"
        page.locator(".map td[tabindex='0']").focus()
        for _ in range(30):
            page.keyboard.press("PageDown")
        assert page.evaluate("document.activeElement.dataset.at") == "300:0"
        page.evaluate("document.querySelector('#grid').scrollTop = 1e9")
        page.locator("[data-at='4999:0']").wait_for(state="attached")


def test_sections_of_a_large_page_are_where_links_lead(opened: Any) -> None:
    with opened("large") as page:
        for link, section in (
            ("Training", "training"),
            ("Checks", "map"),
            ("Environment", "environment"),
            ("Headroom", "headroom"),
        ):
            page.get_by_role("link", name=link, exact=True).click()
            page.wait_for_function(LANDED, arg=section)


def test_plots_wait_until_they_are_seen_and_say_what_their_tables_say(opened: Any) -> None:
    with opened("everything") as page:
        before = page.evaluate(DRAWN)
        draw_everything(page)
        assert page.evaluate(DRAWN) > before + 10
        page.locator("#training figure.plot").first.scroll_into_view_if_needed()
        assert page.locator("#training .drawing svg[role=img]").first.get_by_text("NaN").count() == 1
        assert page.locator("#training .drawing svg[role=img]").first.get_by_text("step 1: not finite").count() == 1
        assert page.locator("#training figure.plot").first.locator("td", has_text="NaN").count() >= 1


def test_a_table_that_was_left_as_text_becomes_one(opened: Any) -> None:
    with opened("large") as page:
        folded = page.locator("#precision .subject").last
        assert folded.locator(".tsv").count() == 1
        lines = folded.locator(".tsv").text_content().split("\n")
        folded.locator("summary").first.click()
        folded.locator("table").wait_for(state="attached")
        rows = folded.locator("tbody tr")
        assert rows.count() == len(lines) - 1
        cells = rows.nth(3).locator("th, td")
        assert [cells.nth(at).text_content() for at in range(cells.count())] == [
            cell.rstrip("!") for cell in lines[4].split("\t")
        ]
        assert folded.locator(".drawing svg").count() > 3


def test_light_and_dark(opened: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with opened("all_green") as page:
        light = page.evaluate(background)
        page.get_by_role("button", name="Switch to the dark theme").click()
        dark = page.evaluate(background)
        assert dark != light
        page.get_by_role("button", name="Switch to the light theme").click()
        assert page.evaluate(background) == light
    with opened("all_green", dark=True) as page:
        assert page.evaluate(background) == dark


def test_a_command_is_copied(opened: Any) -> None:
    with opened("regression") as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.locator("#finding-1 summary", has_text="Reproduce").click()
        button = page.locator("#finding-1").get_by_role("button", name="Copy: command of finding 1")
        button.click()
        playwright.expect(button).to_have_text("Copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == page.locator("#finding-1 .copyable code").first.text_content()
        assert copied.startswith("numerics-suite matrix fixture:glm")


def test_without_scripts_it_still_reads(opened: Any) -> None:
    with opened("everything", scripts=False) as page:
        assert "In transformers 5.8.0 to 5.8.1: Never initialised: " in page.locator("h1").inner_text()
        assert page.locator("#findings .card").count() == 7
        assert not page.locator("#filter").is_visible()
        page.locator("#checks summary").click()
        assert page.locator("#checks table").is_visible()
        page.locator("#training .numbers summary").first.click()
        assert page.locator("#training table").first.is_visible()


@pytest.mark.parametrize(
    ("name", "dark", "width"),
    [
        ("everything", True, 1280),
        ("regression", False, 360),
        pytest.param("regression", True, 360, marks=pytest.mark.slow),
        pytest.param("everything", False, 360, marks=pytest.mark.slow),
        pytest.param("all_green", False, 1280, marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing(opened: Any, name: str, dark: bool, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    with opened(name, dark=dark, width=width) as page:
        draw_everything(page)
        found = axe.Axe().run(
            page,
            options={
                "resultTypes": ["violations"],
                "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
            },
        )
        told = [
            f"{item['id']}: {item['help']}: {[node['html'][:120] for node in item['nodes'][:3]]}"
            for item in found.response["violations"]
        ]
        assert told == []
