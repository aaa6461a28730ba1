"""Opens a page in headless Chromium, without a network, and asks it questions in JavaScript."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--dump-dom"),
    "--virtual-time-budget=10000",
)


def ask(page: Path, width: int, question: str, directory: Path) -> tuple[object, list[str]]:
    """The value of a JavaScript function body that runs in the page, and what the page complained.

    Skips the test where there is no Chromium.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip("there is no Chromium")
    probe = f"""<script>
    window.addEventListener("load", () => {{
      let found;
      try {{ found = (() => {{ {question} }})(); }} catch (error) {{ console.error(error.stack); }}
      parent.postMessage(encodeURIComponent(JSON.stringify(found)), "*");
    }});
    </script>"""
    copy = page.with_name(f"asked_{page.name}")  # beside it, for relative addresses
    copy.write_text(page.read_text(encoding="utf-8") + probe, encoding="utf-8")
    frame = page.with_name(
        f"frame_{page.name}"
    )  # a window is at least 500 pixels wide, not a frame
    frame.write_text(
        f"""<!DOCTYPE html><pre id="answer"></pre><script>
        addEventListener("message", (event) => {{ answer.textContent = event.data; }});
        </script><iframe src="{copy.name}" width="{width}" height="900"></iframe>"""
    )
    command = [browser, *FLAGS, f"--user-data-dir={directory}", f"--window-size={width + 100},1000"]
    done = subprocess.run(
        [*command, frame.resolve().as_uri()], capture_output=True, text=True, timeout=120
    )
    copy.unlink()
    frame.unlink()
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    answer = re.search(r'<pre id="answer">([^<]+)</pre>', done.stdout)
    assert answer, f"no answer, status {done.returncode}: {done.stderr[-2000:]} {complaints}"
    text = unquote(answer[1])
    return (json.loads(text) if text != "undefined" else None), complaints
