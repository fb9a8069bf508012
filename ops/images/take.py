"""Takes the README's picture of the page: the real server with its demo model, in the system's Chromium.

python -m ops.images.take
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from playwright.async_api import async_playwright

from tests.sluice_process import SluiceProcess

HERE = Path(__file__).parent


async def main() -> None:
    async with SluiceProcess({}) as server, async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        page = await browser.new_page(viewport={"width": 1100, "height": 720}, device_scale_factor=1.5)
        await page.goto(server.url)
        await page.fill("#question", "How do I connect a real model?")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("html[data-state=done]")
        await page.fill("#question", "What happens when SIGTERM comes?")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("html[data-state=generating]")
        await asyncio.sleep(2.2)
        await page.screenshot(path=HERE / "page.png")
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
