"""The page about a run, in a real browser: what it draws, in both themes, and for runs that are odd or damaged."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from processes import Launcher, quick_folder, wait_for
from scipy.stats import chi2

import distot
from distot.report import charts
from distot.report import detail as details
from distot.report.story import read
from distot.store import Run, copy_latents

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
N = 120
browser_is_there = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as found:
        yield found


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with Launcher(tmp_path_factory.mktemp("processes")) as started:
        yield started


@pytest.fixture(scope="module")
def plane(folder: Path) -> Path:
    """A finished run in the plane; its folder has a name that HTML must not take for its own."""
    latents = np.random.default_rng(1).standard_normal((N, 2)) * (1.5, 0.5) + 1
    run = folder / "<b>plane & run.zarr"
    distot.solve(latents, until_chi2=0.05, run=run, progress=False)
    return run


@pytest.fixture(scope="module")
def deep(folder: Path) -> Path:
    """A finished run in eight dimensions, with masses."""
    rng = np.random.default_rng(2)
    latents, mass = rng.standard_normal((200, 8)), rng.uniform(1, 3, 200)
    run = folder / "deep.zarr"
    with warnings.catch_warnings(action="ignore"):
        distot.solve(latents, mass=mass, until_chi2=0.05, run=run, progress=False)
    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as found:
        yield found.chromium.launch(executable_path=CHROMIUM, args=QUIET)


class Shown:
    """A page as a person has it; whatever it asks for or complains of is noted."""

    def __init__(
        self, browser: Browser, file: Path, width: int = 1280, scheme: Any = "light", motion: Any = None
    ) -> None:
        self.complaints: list[str] = []
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion=motion, offline=True
        )
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._asked)
        self.page.goto(file.absolute().as_uri())

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.complaints.append(f"asked for {request.url}")

    def __enter__(self) -> Page:
        return self.page

    def __exit__(self, *error: object) -> None:
        self.context.close()
        assert self.complaints == []


def text_of(file: Path) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", file.read_text()))


def at(page: Page, selector: str) -> list[dict[str, float]]:
    """Attributes that are numbers, of all elements that are found."""
    found: list[dict[str, float]] = page.eval_on_selector_all(
        selector,
        "all => all.map(e => Object.fromEntries([...e.attributes].map(a => [a.name, +a.value])))",
    )
    return found


def axis(page: Page, figure: str, vertical: bool) -> Any:
    """The scale of a chart as its labels give it: from a value to a position, by the logarithms of two ticks."""
    units = {"k": 1e3, "M": 1e6}
    ticks = page.eval_on_selector_all(
        f"#{figure} .tick",
        "all => all.map(e => [e.textContent, ...['x', 'y', 'text-anchor'].map(name => e.getAttribute(name))])",
    )
    own = [
        (text, float(y) - 4 if vertical else float(x)) for text, x, y, anchor in ticks if (anchor == "end") == vertical
    ]
    values = [float(text.rstrip("kM")) * units.get(text[-1], 1.0) for text, _ in own]
    places = [place for _, place in own]
    slope = (places[-1] - places[0]) / np.log(values[-1] / values[0])
    return lambda value: places[0] + slope * np.log(np.asarray(value) / values[0])


# ------------------------------------------------------------------------------------------------ in a browser


@browser_is_there
def test_marks_are_where_the_data_are(browser: Browser, plane: Path, folder: Path) -> None:
    out = folder / "plane.html"
    assert distot.report(plane, out) == out
    assert out.stat().st_size < 1.5e6
    story, solution = read(plane), distot.load(plane)
    looks, n = story.history, N
    assert looks == solution.history
    with Shown(browser, out) as page:
        assert page.inner_text("h1") == "Gaussian noise to 120 latents in 2 dimensions"
        assert page.inner_text(".badge") == "goal reached"
        assert page.inner_text(".path") == str(plane)
        dots = at(page, "#progress circle.one")
        assert len(dots) == len(looks)
        x, y = axis(page, "progress", vertical=False), axis(page, "progress", vertical=True)
        above = [(dot, look) for dot, look in zip(dots, looks, strict=True) if look.chi2 > 0.05]
        assert above
        for dot, look in above:
            assert dot["cx"] == pytest.approx(x(look.samples), abs=0.5)
            assert dot["cy"] == pytest.approx(y(look.chi2), abs=0.5)
        (goal,) = at(page, "#progress line.goal")
        assert goal["y1"] == goal["y2"] == pytest.approx(y(0.05), abs=0.5)
        limit = page.get_attribute("#progress path.limit", "d")
        assert limit is not None
        first = [float(part) for part in limit[1:].split("L")[0].split(",")]
        work = np.geomspace(10, 1e6, 4001)
        nearest = work[np.argmin(np.abs(x(work) - first[0]))]
        assert first[1] == pytest.approx(y((n - 1) / nearest), abs=1.0)
        assert page.text_content("#progress .label >> nth=0") == "samples searched"
        assert page.text_content("#progress .label >> nth=1") == "chi2, error of the cell masses"
        assert page.locator("#progress tbody tr").count() == len(looks)
        cells = solution.cells()
        counts = [
            int(re.sub(r".*: ([\d,]+) latents.*", r"\1", tip).replace(",", ""))
            for tip in tips(page, "#masses svg .bar")
        ]
        assert sum(counts) == N
        heights = [bar["height"] for bar in at(page, "#masses svg .bar")]
        assert np.corrcoef(heights, counts)[0, 1] > 0.9999
        assert page.locator("#margins svg .bar").count() > 10
        assert page.locator("#worst tbody tr").count() == 12
        furthest = int(page.inner_text("#worst tbody tr >> nth=0 >> td >> nth=0"))
        sigma = np.abs(cells.mass - 1 / N)
        assert sigma[furthest] > np.quantile(sigma, 0.9)
        assert page.locator("#transport .latents circle").count() == N
        assert page.locator("#transport .noise circle").count() == page.inner_html("#transport").count("--dx")


def tips(page: Page, selector: str) -> list[str]:
    found: list[str] = page.eval_on_selector_all(selector, "all => all.map(e => e.dataset.tip)")
    return found


@browser_is_there
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read_on_any_screen(
    browser: Browser, plane: Path, deep: Path, folder: Path, scheme: str
) -> None:
    """Contrast of texts as WCAG asks for it (4.5 to 1), nothing wider than the screen, every drawing has a name."""
    for name, run in (("plane", plane), ("deep", deep)):
        out = folder / f"{name}-{scheme}.html"
        distot.report(run, out)
        for width in (1280, 340):
            with Shown(browser, out, width, scheme) as page:
                assert page.evaluate("document.documentElement.scrollWidth") == width
                assert page.evaluate(UNNAMED) == []
                assert page.evaluate(PALE) == []


WORDS_OF_BUTTON = """() => {
  const button = document.querySelector("#next button");
  window.words = [];
  new MutationObserver(() => window.words.push(button.textContent)).observe(button, {childList: true});
}"""


@browser_is_there
def test_noise_moves_by_keyboard_and_commands_are_copied(browser: Browser, plane: Path, folder: Path) -> None:
    out = folder / "moves.html"
    distot.report(plane, out)
    with Shown(browser, out, motion="reduce") as page:
        before = page.eval_on_selector("#transport .noise circle", WHERE)
        page.focus(".mover input")
        page.keyboard.press("End")
        after = page.eval_on_selector("#transport .noise circle", WHERE)
        ends = page.eval_on_selector_all("#transport .latents circle", f"all => all.map({WHERE})")
        assert np.linalg.norm(np.subtract(before, after)) > 1
        assert np.linalg.norm(np.subtract(ends, after), axis=1).min() < 1.5  # it has come to a latent
        page.click(".mover button")  # at the end, so back to the beginning, at once where motion is not liked
        assert page.eval_on_selector("#transport .noise circle", WHERE) == pytest.approx(before, abs=0.1)
        page.evaluate(WORDS_OF_BUTTON)
        page.click("#next button >> nth=0")
        wait_for("an answer of the button", lambda: page.evaluate("window.words"))
        assert page.evaluate("window.words[0]") in ("Copied", "Selected")  # and soon Copy again
        assert page.evaluate("getSelection().toString()").startswith("distot certify '")
        page.hover("#progress circle.one >> nth=0")
        expect(page.locator("#tip")).to_contain_text("samples: chi2")


@browser_is_there
def test_images_of_a_decoder(browser: Browser, deep: Path, folder: Path) -> None:
    """The first latent is the first image of the sheet, pixel by pixel."""
    (folder / "decode.py").write_text("def images(z):\n    return z[:, :6].reshape(-1, 2, 3)\n")
    out = folder / "images.html"
    distot.report(deep, out, decoder=f"{folder}/decode.py:images")
    with Shown(browser, out) as page:
        assert page.locator("img.gallery").count() == 2
        assert page.eval_on_selector_all("img.gallery", "all => all.every(e => e.complete && e.naturalWidth > 0)")
        seen = page.evaluate(PIXELS, {"zoom": 32, "w": 3, "h": 2})
    rows = distot.load(deep).held.latents
    index = np.unique(np.linspace(0, 199, 24).round().astype(int))
    decoded = np.asarray(rows[0:200], dtype=np.float64)[index, :6]
    wanted = (decoded[0] - decoded.min()) / (decoded.max() - decoded.min()) * 255
    assert np.abs(np.array(seen) - wanted).max() <= 1


UNNAMED = """() => [...document.querySelectorAll("svg, img, input, button, [role=img], [role=region]")].filter(e => {
  const ids = (e.getAttribute("aria-labelledby") || "").split(" ").filter(Boolean);
  const named = ids.length && ids.every(id => document.getElementById(id)?.textContent);
  return !(e.getAttribute("aria-label") || e.alt || named || e.tagName == "BUTTON" && e.textContent);
}).map(e => e.outerHTML.slice(0, 80))"""

PALE = """() => {
  const linear = x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const said = e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
  const skipped = "script, title, desc, #tip";
  const shown = [...document.querySelectorAll("body *")].filter(e => said(e) && !e.closest(skipped));
  return shown.map(e => {
    const style = getComputedStyle(e);
    const own = light(numbers(e instanceof SVGElement ? style.fill : style.color));
    const [dark, bright] = [own, light(behind(e))].sort((a, b) => a - b);
    return [(bright + 0.05) / (dark + 0.05), e.tagName, e.textContent.slice(0, 30)];
  }).filter(([contrast]) => contrast < 4.5);
}"""

PIXELS = """({zoom, w, h}) => {
  const image = document.querySelector("img.gallery"), sheet = document.createElement("canvas");
  sheet.width = image.naturalWidth;
  sheet.height = image.naturalHeight;
  const pen = sheet.getContext("2d", {willReadFrequently: true});
  pen.drawImage(image, 0, 0);
  const at = k => [(k % w + 0.5) * zoom, (Math.floor(k / w) + 0.5) * zoom];
  return Array.from({length: w * h}, (_, k) => pen.getImageData(...at(k), 1, 1).data[0]);
}"""

WHERE = """e => {
  const own = e.getBoundingClientRect(), of = e.ownerSVGElement.getBoundingClientRect();
  return [own.x - of.x + own.width / 2, own.y - of.y + own.height / 2];
}"""


# ------------------------------------------------------------------------------------------------ odd runs


def page_of(run: Path, folder: Path, **options: Any) -> str:
    out = folder / "odd.html"
    distot.report(run, out, **options)
    return text_of(out)


@pytest.fixture
def copied(plane: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plane, tmp_path / "run.zarr"))


def test_run_without_certificate(copied: Path, tmp_path: Path) -> None:
    (copied / "certificate.json").unlink()
    text = page_of(copied, tmp_path)
    assert "There is no certificate yet; at the last look chi2 was" in text
    assert f"distot certify {copied} Copy" in text


def test_certificate_of_earlier_heights_is_not_the_result(copied: Path, tmp_path: Path) -> None:
    stored = json.loads((copied / "certificate.json").read_text())
    (copied / "certificate.json").write_text(json.dumps(stored | {"step": stored["step"] - 1}))
    assert "of earlier heights" in page_of(copied, tmp_path)


def test_run_without_checkpoint_or_log(copied: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied / "checkpoints")
    for name in ("LATEST", "log.jsonl", "certificate.json"):
        (copied / name).unlink()
    text = page_of(copied, tmp_path)
    assert "no checkpoint yet" in text
    assert "chi2 has not been looked at" in text
    assert f"distot resume {copied} Copy" in text
    assert "distot assign" not in text


def test_damage_is_told(copied: Path, tmp_path: Path) -> None:
    log = (copied / "log.jsonl").read_bytes().split(b"\n")
    log[2] = b"\xff\x00 not a line"
    (copied / "log.jsonl").write_bytes(b"\n".join(log))
    (copied / "certificate.json").write_text("{")
    for file in copied.glob("checkpoints/*/part-*/average/c/*"):
        file.write_bytes(b"damaged")
    text = page_of(copied, tmp_path)
    assert "1 lines of log.jsonl are damaged and left out, the first is line 3" in text
    assert "distot certify makes it anew" in text
    assert "fails its checksum" in text
    assert len(Run(copied).records()) == len(log) - 1


def test_latents_that_are_gone(plane: Path, tmp_path: Path) -> None:
    latents = tmp_path / "z.zarr"
    copy_latents(np.random.default_rng(3).standard_normal((50, 3)), None, latents, "a test")
    run = tmp_path / "run.zarr"
    distot.solve(latents, until_chi2=0.2, run=run, progress=False)
    moved = latents.rename(tmp_path / "moved.zarr")
    text = page_of(run, tmp_path)
    assert "Latents could not be read" in text
    assert "How the masses became right" in text
    assert "How much each cell got" not in text
    assert "How much each cell got" in page_of(run, tmp_path, latents=moved)
    assert "Latents were not read, as it was asked for" in page_of(run, tmp_path, latents=moved, detail=False)


def test_large_runs_are_not_read_unasked(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(details, "MOST_NUMBERS", 200 * 8 - 1)
    assert "200 x 8 latents are not read without being asked for" in page_of(deep, tmp_path)
    monkeypatch.setattr(details, "MOST_NUMBERS", 200 * 8)
    monkeypatch.setattr(details, "MOST_FLOPS", 2 * 200 * 8 * 10_000 - 1)
    text = page_of(deep, tmp_path)
    assert "Cells are not measured without being asked for" in text
    assert "The transport, seen along" in text
    assert "How much each cell got" in page_of(deep, tmp_path, samples=1000)


def test_picture_has_so_many_latents_at_most(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(details, "SHOWN", 70)
    out = tmp_path / "some.html"
    distot.report(deep, out)
    assert len(re.findall(r'data-tip="latent ', out.read_text())) == 70
    assert "70 of 200 latents are shown" in out.read_text()


def test_noise_is_drawn_in_the_cell_of_its_latent(plane: Path, tmp_path: Path) -> None:
    """Polygons are convex and counter-clockwise, so what is inside is on the left of every edge."""
    pytest.importorskip("distot.exact", reason="this distot computes no exact cells")
    flow = details.flow(distot.load(plane))
    assert flow.polygons is not None
    assert flow.ratio is not None
    assert (flow.ratio * 1 / N).sum() == pytest.approx(1)
    cell = dict(zip(flow.index.tolist(), flow.polygons, strict=True))
    for x, latent in zip(flow.noise, flow.to_index.tolist(), strict=True):
        corners = cell[latent]
        edge, to = np.roll(corners, -1, axis=0) - corners, x - corners
        assert (edge[:, 0] * to[:, 1] - edge[:, 1] * to[:, 0] > -1e-6).all()
    out = tmp_path / "diagram.html"
    distot.report(plane, out)
    assert out.read_text().count('class="cell ') == sum(len(polygon) > 0 for polygon in flow.polygons)
    assert "Cells and their masses are exact." in text_of(out)


def test_entropic_run_one_dimension_and_a_budget(tmp_path: Path) -> None:
    latents = np.random.default_rng(4).standard_normal((30, 1))
    distot.solve(latents, epsilon=0.5, until_chi2=None, max_samples=3000, run=tmp_path / "run.zarr", progress=False)
    text = page_of(tmp_path / "run.zarr", tmp_path)
    assert "entropic plan at temperature 0.5" in text
    assert "Gaussian noise to 30 latents in 1 dimension " in text
    assert "samples spent" in text
    assert "no goal was set" in text
    assert re.search(r"distot resume \S+ --max-samples \d+ Copy", text)


def test_run_that_was_killed_and_one_at_work(launcher: Launcher, folder: Path, tmp_path: Path) -> None:
    latents, run = folder / "killed-z.zarr", folder / "killed.zarr"
    copy_latents(np.random.default_rng(5).standard_normal((60, 3)), None, latents, "a test")
    forever = ("--until-chi2", "none", "--max-samples", "1e12", "--checkpoint-seconds", "0.05")
    child = launcher.command("solve", latents, run, *forever)
    wait_for(
        "a checkpoint", lambda: run.exists() and any(e["event"] == "checkpoint" for e in Run(run).records()), child
    )
    text = page_of(run, tmp_path)
    assert "It is at work; its last sign of life was" in text
    child.kill(signal.SIGKILL)
    child.wait()
    old = "".join(json.dumps(e | {"time": e["time"] - 1000}) + "\n" for e in Run(run).records())
    (run / "log.jsonl").write_text(old)
    text = page_of(run, tmp_path)
    assert "not finished: it was killed, or its machine went away; its last sign of life was 16 min" in text
    done = launcher.run("resume", run, "--max-samples", int(1.5 * read(run).samples) + 1000)
    assert done.returncode == 0, done.stderr()
    text = page_of(run, tmp_path)
    assert "at work in 2 sessions" in text
    assert "no word of its end" in text


def test_workers_each_have_a_line(copied: Path, tmp_path: Path) -> None:
    """The event "grid" as four workers tell it, in the log of a real run."""
    records = Run(copied).records()
    grid = {
        "slowest": 2,
        "search": [4.0, 4.0, 8.0, 4.0],
        "update": [1.0] * 4,
        "waited": [4.0, 4.0, 0.0, 4.0],
        "sent": [1500] * 4,
    }
    records[-1:-1] = [{"event": "grid", "time": records[-1]["time"], "seconds": records[-1]["seconds"]} | grid]
    records[0]["grid"] = [2, 2]
    (copied / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = charts.processes(read(copied).sessions[-1])
    assert [line["slowest"] for line in lines] == [False, False, True, False]
    assert lines[0]["bars"][0] == ("search", "one", 4.0, 100 * 4 / 9)  # type: ignore[index]
    text = page_of(copied, tmp_path)
    assert "2 (slowest)" in text
    assert "4 processes, 2 × 2" in text
    assert "1.5 kB" in text


# ------------------------------------------------------------------------------------------------ the numbers


def test_noise_alone_is_what_exact_masses_give() -> None:
    """Counts of independent samples at exact masses, and their curve: a chi2 test of the histogram."""
    rng, m, n = np.random.default_rng(6), 40_000, 3000
    variance = np.full(n, n / m)
    edges = (np.arange(2, 32) - 0.5) * n / m
    ratio = rng.poisson(m / n, n) * n / m
    seen, _ = np.histogram(np.clip(ratio, edges[0], edges[-1]), edges)
    expected = charts._by_chance(edges, variance)
    assert expected.sum() == pytest.approx(n)
    kept = expected > 8
    statistic = float(((seen - expected)[kept] ** 2 / expected[kept]).sum())
    assert statistic < chi2.ppf(1 - 1e-4, kept.sum())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out": "page.txt"}, "ends in .html"),
        ({"out": "nowhere/page.html"}, "there is no folder nowhere"),
        ({"samples": 1}, "at least 2"),
        ({"decoder": "decode"}, "name a function in a file"),
        ({"decoder": "none.py:images"}, "there is no file none.py"),
        ({"decoder": lambda z: z}, r"must turn \(24, 2\) latents into images"),
        ({"decoder": lambda z: z[:, :, None] * np.nan}, "finite"),
        ({"decoder": lambda z: 1 / 0}, "ZeroDivisionError"),
        ({"decoder": lambda z: z, "detail": False}, "need the latents"),
    ],
)
def test_bad_input(
    plane: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(distot.InputError, match=words):
        distot.report(plane, **options)
    assert list(tmp_path.iterdir()) == []


def test_command(launcher: Launcher, plane: Path, tmp_path: Path) -> None:
    done = launcher.run("report", plane, "-o", tmp_path / "page.html", "--samples", "2000")
    assert done.returncode == 0, done.stderr()
    assert done.stdout().startswith(f"{tmp_path}/page.html: open it in a browser")
    assert "From 2,000 fresh samples" in text_of(tmp_path / "page.html")
    missing = launcher.run("report", tmp_path / "none.zarr")
    assert missing.returncode == 1
    assert "does not exist; start one with" in missing.stderr()
    shown = launcher.run("inspect", plane).stdout()
    assert re.search(r"time spent +\d+ s in 1 session\n", shown)
    assert re.search(r"cells +not measured\n", shown)
    assert f"distot report {shlex.quote(str(plane))} -o report.html\n" in shown
