"""Actions of a visitor in the browser."""

from typing import TYPE_CHECKING

from bench_studio import type_number

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page


def open_tab(page: "Page", name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def field(page: "Page", name: str) -> "Locator":
    return page.locator(f"#{name} input, #{name} textarea").first


def select(page: "Page", group: str, *names: str) -> None:
    for name in names:
        page.locator(f"#{group}").get_by_label(name, exact=True).check()


def choose(page: "Page", dropdown: str, option: str) -> None:
    page.locator(f"#{dropdown} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def fewer_steps(page: "Page", tab: str = "generate") -> None:
    page.locator(f"#{tab}-more button").first.click()
    type_number(page.locator(f"#{tab}-steps input[type=number]"), 2)


def wait_for_images(page: "Page", number: int, tab: str = "generate") -> None:
    """Wait for the note: Gradio's own text for screen readers is "In queue: 1 of 1"."""
    page.wait_for_function(f"document.querySelector('#{tab}-note').innerText.startsWith('{number} of {number}')")


def wait_for_value(page: "Page", name: str, value: str) -> None:
    """Wait until a field, which may not exist yet, has this value."""
    page.wait_for_function(f"document.querySelector('#{name} textarea, #{name} input')?.value === '{value}'")


def generate(page: "Page", number: int) -> None:
    page.locator("#generate-count").get_by_label(str(number), exact=True).check()
    page.locator("#generate-button").click()
    wait_for_images(page, number)
