"""report.html holds all that REPORT.md does, in one file, and a real browser shows it on a narrow and a wide screen."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from drs.config import PROJECT_ROOT
from drs.errors import UserError
from drs.html_report import html_page, write_html

REFERENCE = PROJECT_ROOT / "results" / "reference" / "laptop"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CLAIMS = pd.DataFrame(
    [
        ["C1", "They correlate.", "not supported", 0.1, -0.2, 0.4, 9, "Over <all> & each.", "all", "all"],
        ["C1", "They correlate.", "supported", 0.5, 0.2, 0.8, 9, "Here it does.", "mnist", "lenet"],
    ],
    columns=["claim", "statement", "verdict", "effect", "ci_low", "ci_high", "n", "evidence", "data", "model"],
)
REPORT = """# A study

## Numbers

| name | value |
| --- | ---: |
| b | −2.5 |
| a | 10.0 % |
| c | – |
| d | 9 |

## More & more

Text with <script>alert(1)</script> in it.
"""


class Links(HTMLParser):
    """Collects what a page refers to, and the names of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href") and value:
                self.targets.append(value)
            if name == "id" and value:
                self.names.add(value)


def test_page_holds_the_whole_report_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    shutil.copytree(REFERENCE, tmp_path / "laptop")
    page = write_html(tmp_path / "laptop").read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert links.targets
    for target in links.targets:
        assert target.startswith("data:image/png;base64,") or target.removeprefix("#") in links.names
    text = (REFERENCE / "REPORT.md").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == text.count("](figures/")
    assert page.count("<tr>") == len([line for line in text.splitlines() if re.match(r"\|(?! ?-)", line)])
    assert page.count('<h2 id="section-') == text.count("\n## ")
    assert page.count('<details class="claim') == 5


def test_claims_come_first_and_text_stays_text() -> None:
    page = html_page(REPORT, CLAIMS, Path())
    assert page.index('<details class="claim no">') < page.index("Contents") < page.index("<table>")
    assert "Over &lt;all&gt; &amp; each." in page and "mnist/lenet: supported" in page
    assert "<script>alert" not in page
    assert "<title>A study</title>" in page


def test_missing_report_and_missing_figure_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"REPORT\.md is missing; evaluate the study first"):
        write_html(tmp_path)
    with pytest.raises(UserError, match=r"figures/gone\.png: No such file.*make figures"):
        html_page("# A\n\n![gone](figures/gone.png)\n", CLAIMS, tmp_path)


def browse(page: Path, folder: Path, width: int, *options: str) -> str:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=3000", *options,
        page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_browser_sorts_tables(tmp_path: Path) -> None:
    click = "document.querySelectorAll('th button')[1].click();"
    for name, clicks, order in (("rising", 1, "bdac"), ("falling", 2, "adbc")):
        page = tmp_path / f"{name}.html"
        script = f"<script>{click * clicks}</script></body>"
        page.write_text(html_page(REPORT, CLAIMS, tmp_path).replace("</body>", script), encoding="utf-8")
        found = browse(page, tmp_path, 1000, "--dump-dom")
        assert "".join(re.findall(r"<td>([abcd])</td>", found)) == order


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [500, 1280])
def test_reference_fits_the_screen_sideways(tmp_path: Path, width: int) -> None:
    shutil.copytree(REFERENCE, tmp_path / "laptop")
    page = write_html(tmp_path / "laptop")
    measure = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth;</script></body>"
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", measure), encoding="utf-8")
    found = re.search(r"<title>(\d+) of (\d+)</title>", browse(page, tmp_path, width, "--dump-dom"))
    assert found and int(found[1]) <= int(found[2]) == width
