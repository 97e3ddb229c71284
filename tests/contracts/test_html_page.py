"""Opens the HTML page in a real browser: what it shows, what a click does, what it never does."""

import itertools
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from scaling.report.html.page import MOST_POINTS, render_html
from scaling.report.store_analysis import StoreAnalysis
from scaling.store.outcome import CellOutcome
from scaling.store.reader import Cell, Store, UnusedFile
from scaling.store.run import Run
from tests.builders.records import make_config, make_record, make_run
from tests.processes import PATIENCE_S
from unitransformer.config import DataConfig, ParallelConfig, RunConfig, Strategy, to_dict

EVIL = "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"


def make_cell(number: int, strategy: Strategy, devices: int, batch_size: int) -> Cell:
    """Cell n of a sweep: more devices are faster, a batch of 100 is out of memory."""
    parallel = ParallelConfig(strategy=strategy, devices=devices)
    config = replace(make_config(), parallel=parallel, batch_size=batch_size)
    outcome = CellOutcome(
        cell=f"{number:012x}",
        repeat=1,
        recipe="gpt",
        options={"strategy": strategy},
        command=f"python -m recipes.gpt --strategy {strategy} --devices {devices} # {EVIL}",
        status="oom" if batch_size == 100 else "ok",
        reason=f"out of memory {EVIL}" if batch_size == 100 else None,
        last_lines=(f"OutOfMemoryError {EVIL}",) if batch_size == 100 else (),
        config=config,
    )
    folder = f"sweep/cells/{outcome.name}"
    run = None if batch_size == 100 else of_config(config, f"{folder}/record.json")
    return Cell(name=f"{folder}/outcome.json", outcome=outcome, run=run)


def of_config(config: RunConfig, name: str) -> Run:
    num_devices = config.parallel.world_size
    record = make_record(
        step_s=[0.1 / num_devices] * 12,
        config=to_dict(config),
        world_size=num_devices,
        global_batch_size=config.global_batch_size,
        log=[f"a line of {name} {EVIL}"],
        peak_bytes=[2**30 * (rank + 1) for rank in range(num_devices)],
    )
    return make_run(record, name)


def make_store() -> Store:
    grid = itertools.product(("fsdp", "ddp"), (1, 2, 4), (2, 8, 100))
    cells = tuple(make_cell(number, *place) for number, place in enumerate(grid))
    single = make_run(make_record("vit", step_s=[0.1] * 500, loss=[2.0] * 500), "runs/vit-3.json")
    return Store(
        runs=(single, *(cell.run for cell in cells if cell.run is not None)),
        cells=cells,
        left_out=(UnusedFile(name="runs/cut.json", kind="damaged", reason=f"not JSON {EVIL}"),),
    )


# ---------------------------------------------------------------------------------- the file


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_equal_stores_give_equal_bytes_and_every_text_is_escaped() -> None:
    page = render_html(StoreAnalysis(make_store()), title=f"Runs {EVIL}")
    assert page == render_html(StoreAnalysis(make_store()), title=f"Runs {EVIL}")
    tags = Tags(page).found
    assert [tag for tag, _ in tags].count("script") == 4, "two of JSON, plotly, the page's own"
    assert not any({"src", "href"} & attributes.keys() for _, attributes in tags)
    (policy,) = [str(own["content"]) for _, own in tags if "http-equiv" in own]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.split("; ")[1]


def test_the_first_screen_names_the_machine_and_the_fastest_configurations() -> None:
    cells = [make_cell(number, "single", 1, batch_size) for number, batch_size in enumerate((2, 8))]
    page = render_html(StoreAnalysis(store_of(cells)), title="Runs")
    head = page[page.index("<header>") : page.index("</header>")]
    assert re.search(r"Measured on .+; torch .+; commit .+; ", head)
    (line,) = re.findall("<li>(.*?)</li>", head)
    assert re.fullmatch(
        r"GPT, .+ parameters \(.+\), 1 device: single, .+ per device, .+ tokens/s.*", line
    )


def test_a_page_without_rows_is_valid() -> None:
    assert "No runs." in render_html(StoreAnalysis(Store(runs=(), left_out=())), title="Nothing")


# ---------------------------------------------------------------------------------- the browser


class Browser:
    """A headless Chromium, driven over a pipe by the DevTools protocol."""

    def __init__(self, program: str, profile: Path) -> None:
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
        away = "--host-resolver-rules=MAP * ~NOTFOUND"
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'  # the two files it looks at
        words = (program, *options, away, "--remote-debugging-pipe", f"--user-data-dir={profile}")
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *words],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._numbers = itertools.count(1)
        self._left = b""
        self._target: str | None = None
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        said = {"id": number, "method": method, "params": parameters, **self._session}
        os.write(self._out, json.dumps(said).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> Any:
        while b"\0" not in self._left:
            assert select.select([self._in], [], [], PATIENCE_S)[0], "the browser is silent"
            read = os.read(self._in, 2**20)
            assert read, "the browser ended"
            self._left += read
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, state: str = "", *, width: int = 1200) -> None:
        """Opens a new tab, so that no state remains."""
        self._session, self.events = {}, []
        if self._target is not None:
            self.call("Target.closeTarget", targetId=self._target)
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=f"{page.as_uri()}#{state}")
        self.until("document.readyState === 'complete' && !!document.querySelector('#shown')")
        self.until("document.querySelector('#shown').textContent !== ''")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        actual = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in actual, actual
        return actual["result"].get("value")

    def until(self, expression: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not self.ask(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        code = {"Enter": 13, "Escape": 27}[key]
        actual = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **actual, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **actual)

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.ask(
            f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.textContent)"
        )
        return found

    def column(self, title: str) -> list[str]:
        """The cells below a heading."""
        heads = [text.rstrip(" ▲▼") for text in self.texts("#runs th")]
        return self.texts(f"#runs td:nth-child({heads.index(title) + 1})")

    def click(self, selector: str) -> None:
        self.ask(f"document.querySelector({json.dumps(selector)}).click()")

    def end(self) -> None:
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        self._process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium: apt-get install -y chromium")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.end()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render_html(StoreAnalysis(make_store()), title="Runs"), encoding="utf-8")
    return path


def test_every_row_is_shown_and_every_plot_drawn(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.texts("#shown") == ["19 of 19 rows"]
    assert len(browser.texts("#runs tbody tr")) == 19
    assert browser.column("status").count("oom") == 6
    # Two strategies of two batch sizes over three device counts, in one curve each.
    browser.until("document.querySelectorAll('#rate-by-devices svg .point').length === 12")
    for plot, curves in (
        ("rate-by-batch", 6),
        ("rate-by-devices", 4),
        ("peak-by-batch", 6),
        ("peak-by-devices", 4),
    ):
        assert len(curves_of(browser, plot)) == curves
        assert not browser.texts(f"#{plot} svg .errorbar"), plot
        assert len(labels_of(browser, plot)) == curves
    assert set(labels_of(browser, "rate-by-devices")) == {
        *("  ddp, 2", "  ddp, 8", "  fsdp, 2", "  fsdp, 8"),
    }
    assert browser.texts("#legend li") == ["ddp", "fsdp"]


def curves_of(browser: Browser, plot: str) -> list[dict[str, Any]]:
    """Traces of launches that a line joins; traces of lines and labels hold no rows."""
    data: list[dict[str, Any]] = browser.ask(
        f"document.querySelector('#{plot}').data.map(({{mode, x, y, text, customdata, xaxis}}) => "
        "({mode, x, y, text, customdata, xaxis}))"
    )
    return [trace for trace in data if trace["mode"] == "markers"]


def labels_of(browser: Browser, plot: str) -> list[str]:
    texts: list[str] = browser.ask(
        f"document.querySelector('#{plot}').data.flatMap(({{mode, text}}) => "
        "mode === 'text' ? text : [])"
    )
    return texts


def store_of(cells: Sequence[Cell]) -> Store:
    """A store of these cells and their runs."""
    runs = tuple(cell.run for cell in cells if cell.run is not None)
    return Store(runs=runs, cells=tuple(cells), left_out=())


def test_each_precision_has_a_panel_and_launches_share_a_line(
    browser: Browser, tmp_path: Path
) -> None:
    store = make_store()
    halves = [with_precision(cell) for cell in store.cells]
    again = [with_repeat(cell) for cell in (*store.cells, *halves)]
    path = tmp_path / "page.html"
    cells = (*store.cells, *halves, *again)
    path.write_text(render_html(StoreAnalysis(store_of(cells)), title="Runs"), "utf-8")
    browser.open(path)
    browser.until("document.querySelectorAll('#rate-by-devices svg .point').length === 48")
    assert browser.texts("#rate-by-devices .annotation-text") == ["32-true", "bf16-mixed"]
    curves = curves_of(browser, "rate-by-devices")
    assert sorted(trace["xaxis"] for trace in curves) == ["x"] * 4 + ["x2"] * 4
    assert {len(trace["x"]) for trace in curves} == {6}, "two launches at each of three counts"
    assert sorted(browser.texts("#efficiency-by-devices .annotation-text")) == [
        *("strong scaling, 32-true", "strong scaling, bf16-mixed"),
        *("weak scaling, 32-true", "weak scaling, bf16-mixed"),
    ]


def test_single_runs_of_other_batch_sizes_have_other_symbols(
    browser: Browser, tmp_path: Path
) -> None:
    configs = [replace(make_config(), batch_size=size) for size in (2, 4, 4)]
    runs = [of_config(config, f"runs/{number}.json") for number, config in enumerate(configs)]
    path = tmp_path / "page.html"
    store = Store(runs=tuple(runs), left_out=())
    path.write_text(render_html(StoreAnalysis(store), title="Runs"), "utf-8")
    browser.open(path)
    browser.until("document.querySelectorAll('#rate-by-devices svg .point').length === 3")
    symbols = browser.ask(
        "document.querySelector('#rate-by-devices').data"
        ".filter(({mode}) => mode === 'markers').map(({marker, x}) => [marker.symbol, x.length])"
    )
    assert sorted(symbols) == [["circle", 1], ["triangle-up", 2]]
    assert labels_of(browser, "rate-by-devices") == []


def with_precision(cell: Cell) -> Cell:
    parallel = replace(cell.outcome.config.parallel, precision="bf16-mixed")
    return changed(cell, replace(cell.outcome.config, parallel=parallel), cell.name[:-14] + "b")


def with_repeat(cell: Cell) -> Cell:
    again = changed(cell, cell.outcome.config, cell.name[:-14] + "r")
    return replace(again, outcome=replace(again.outcome, repeat=2))


def changed(cell: Cell, config: RunConfig, folder: str) -> Cell:
    """The same cell with another config, in another folder."""
    run = None if cell.run is None else of_config(config, f"{folder}/record.json")
    outcome = replace(cell.outcome, config=config)
    return replace(cell, name=f"{folder}/outcome.json", outcome=outcome, run=run)


def test_a_panel_has_the_six_best_of_its_lines(browser: Browser, tmp_path: Path) -> None:
    sizes = (1, 2, 3, 4, 5, 6, 7)
    grid = itertools.product((1, 2), sizes)
    cells = tuple(make_cell(n, "ddp", devices, size) for n, (devices, size) in enumerate(grid))
    path = tmp_path / "page.html"
    path.write_text(render_html(StoreAnalysis(store_of(cells)), title="Runs"), "utf-8")
    browser.open(path)
    browser.until("document.querySelectorAll('#rate-by-devices svg .point').length === 12")
    # From the slowest to the fastest.
    assert labels_of(browser, "rate-by-devices") == [f"  ddp, {size}" for size in sizes[1:]]


def test_lines_join_runs_that_differ_only_in_the_axis_and_efficiency_has_its_own_plot(
    browser: Browser, tmp_path: Path
) -> None:
    store = make_store()
    other = [with_length(cell) for cell in store.cells]
    both = store_of((*store.cells, *other))
    path = tmp_path / "page.html"
    path.write_text(render_html(StoreAnalysis(both), title="Runs"), encoding="utf-8")
    browser.open(path, "model=GPT+tiny+%286.1+K%29")
    browser.until("document.querySelectorAll('#rate-by-devices svg .point').length === 18")
    assert len(curves_of(browser, "rate-by-devices")) == 8 - 2, "the six fastest"
    ends = set(labels_of(browser, "rate-by-devices"))
    assert {"  ddp, 8, sequence length 4", "  ddp, 8, sequence length none"} <= ends
    # Two strategies and lengths: 8 in total on 1 and 4 devices, and six of batches of 2 and 8 per
    # device; each panel has its ideal.
    assert len(curves_of(browser, "efficiency-by-devices")) == 4 + 6
    assert labels_of(browser, "efficiency-by-devices").count("  ideal") == 2


def with_length(cell: Cell) -> Cell:
    """The same cell in a sweep over shorter samples."""
    config = replace(cell.outcome.config, data=DataConfig(sequence_length=4))
    name = cell.name.replace("-1/", "-2/")
    run = None if cell.run is None else of_config(config, cell.run.name.replace("-1/", "-2/"))
    return replace(cell, name=name, outcome=replace(cell.outcome, config=config), run=run)


def test_a_speed_without_proof_is_struck_out(browser: Browser, page: Path) -> None:
    browser.open(page, "text=strategy:ddp+devices:4&status=ok")
    assert browser.texts("#runs tbody s").count("10,240 tokens/s") == 1
    assert browser.column("loss parity") == ["none", "none"]


def test_the_address_keeps_order_filter_and_row(browser: Browser, page: Path) -> None:
    browser.open(page, "sort=units_per_s&down=1&text=strategy:ddp+devices:4&status=ok&row=7")
    assert browser.texts("#shown") == ["2 of 19 rows"]
    # 8 samples of 8 tokens on 4 devices in 25 ms; 2 samples.
    assert browser.column("speed") == ["10,240 tokens/s", "2,560 tokens/s"]
    assert browser.ask("document.querySelector('#detail').open")
    assert browser.ask("document.querySelector('[aria-sort]').textContent") == "speed ▼"


def test_clicking_a_heading_sorts_and_clicking_again_reverses_with_blanks_last(
    browser: Browser, page: Path
) -> None:
    browser.open(page)
    browser.click("[data-sort=units_per_s]")
    falling = browser.ask("document.querySelector('#runs tbody tr').textContent")
    assert "10,240 tokens/s" in falling
    assert browser.column("speed")[-6:] == [""] * 6
    browser.click("[data-sort=units_per_s]")
    assert browser.column("speed")[0] == "20.00 images/s"
    assert browser.column("speed")[-6:] == [""] * 6
    assert browser.ask("location.hash") == "#sort=units_per_s"


def test_typed_and_selected_filters_apply_to_rows_and_plots(browser: Browser, page: Path) -> None:
    browser.open(page)
    typed = "const box = document.querySelector('#text'); box.value = 'FSDP batch_size:8';"
    browser.ask(f"{typed} box.dispatchEvent(new Event('input'))")
    browser.until("document.querySelector('#shown').textContent === '3 of 19 rows'")
    assert browser.texts("#legend li") == ["fsdp"]
    chosen = "const list = document.querySelector('#status'); list.value = 'oom';"
    browser.ask(f"{chosen} list.dispatchEvent(new Event('change'))")
    assert browser.texts("#shown") == ["0 of 19 rows"]
    browser.click("#clear")
    assert browser.texts("#shown") == ["19 of 19 rows"]


def test_clicking_a_row_opens_it(browser: Browser, page: Path) -> None:
    browser.open(page, "model=ViT+tiny+%285.3+K%29")
    browser.click("#runs tbody tr button")
    assert browser.ask("document.querySelector('#detail').open")
    assert browser.texts("#command") == ["python -m recipes.vit --max-steps 500"]


def test_a_row_opens_by_key_and_shows_its_record_and_closes(browser: Browser, page: Path) -> None:
    browser.open(page, "model=ViT+tiny+%285.3+K%29")
    browser.ask("document.querySelector('#runs tbody button').focus()")
    browser.press("Enter")
    assert browser.ask("document.querySelector('#detail').open")
    assert browser.texts("#command") == ["python -m recipes.vit --max-steps 500"]
    assert browser.texts("#log")[0].endswith("step 500/500 | validation loss 2.0000 | top-1 50.00%")
    figures = dict(zip(browser.texts("#figures dt"), browser.texts("#figures dd"), strict=True))
    assert (figures["record"], figures["repeat"]) == ("runs/vit-3.json", "3")
    assert float(figures["median_step_s"]) == 0.1
    config = dict(zip(browser.texts("#config dt"), browser.texts("#config dd"), strict=True))
    assert config["model.image_size"] == "8"
    assert "one step in 3 is drawn" in browser.texts("#loss-says")[0]
    browser.until("document.querySelectorAll('#loss svg .trace').length === 3")
    drawn = browser.ask("document.querySelector('#loss').data[0].x")
    assert len(drawn) <= MOST_POINTS
    assert drawn[-1] == 500
    browser.press("Escape")
    browser.until("!document.querySelector('#detail').open")
    browser.until("location.hash === '#model=ViT+tiny+%285.3+K%29'")


def test_record_contents_are_shown_as_text_and_nothing_is_loaded(
    browser: Browser, page: Path
) -> None:
    # The reason, log and command of its outcome contain tags.
    browser.open(page, "status=oom&row=2")
    assert EVIL in browser.texts("#command")[0]
    assert browser.texts("#log") == [f"OutOfMemoryError {EVIL}"]
    assert browser.column("reason")[0] == f"out of memory {EVIL}"
    browser.open(page, "row=1")
    browser.until("document.querySelectorAll('#loss svg .trace').length === 3")
    assert browser.ask("typeof window.evil") == "undefined"
    assert browser.ask("document.querySelectorAll('img').length") == 0
    found = {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}
    assert [event for event in browser.events if event["method"] in found] == []
    asked = [e["params"]["request"] for e in browser.events if e["method"].endswith("WillBeSent")]
    assert [request["url"].partition("#")[0] for request in asked] == [page.as_uri()]


def test_a_phone_scrolls_the_table_and_not_the_page(browser: Browser, page: Path) -> None:
    browser.open(page, width=390)
    browser.until("document.querySelectorAll('#rate-by-batch svg .point').length === 12")
    assert browser.ask("document.documentElement.scrollWidth") == 390
    assert browser.ask("document.querySelector('.wide').scrollWidth") > 390


def test_thousands_of_rows_open(browser: Browser, is_whole_proof: bool, tmp_path: Path) -> None:
    number = 10_000 if is_whole_proof else 2_500
    record = make_record(step_s=[0.1] * 1000, loss=[2.3456789] * 1000, log=["a line " * 12] * 30)
    first = make_run(record)
    runs = tuple(replace(first, name=f"runs/{each}.json") for each in range(number))
    for run in runs:  # computed once: the samples are equal
        vars(run).update(metrics=first.metrics, mfu=first.mfu)
    path = tmp_path / "page.html"
    path.write_text(
        render_html(StoreAnalysis(Store(runs=runs, left_out=())), title="Many"), encoding="utf-8"
    )
    browser.open(path, f"row={number - 1}")
    (shown,) = browser.texts("#shown")
    assert shown == f"{number:,} of {number:,} rows; the first 500 of them are in the table"
    assert "too many to draw" in browser.texts("#plots-say")[0]
    assert browser.texts("#detail-title")[0].startswith(f"Row {number}")
    browser.click("#more")
    assert len(browser.texts("#runs tbody tr")) == 1000
