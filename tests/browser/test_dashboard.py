"""The page at /dashboard in headless Chromium against a real server: what a visitor sees and does.

Needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver). Without them these
tests fail; they are chosen with `-m browser`.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import migration_load
import pytest
from fakes.front import serve_front
from fakes.metadata import FakeStore
from harness import MakeServer, Server
from migration_load import Http, Migrate, TwoModels, create
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from shoal.encoder_api import DEFAULT_MODEL

pytestmark = pytest.mark.browser

WAIT_S = 60  # the first question loads the model
WIDE, NARROW = (1280, 900), (390, 844)

DOCS = [
    ("os.path.split", "os", "Split a pathname into directory and file name."),
    ("zlib.compress", "zlib", "Compress bytes."),
    ("bz2.compress", "bz2", "Compress a block of data with bzip2."),
    ("tempfile.TemporaryDirectory", "tempfile", "A temporary directory, removed afterwards."),
    ("subprocess.run", "subprocess", "Run a command and capture its output."),
    ("os.getcwd", "os", "The current working directory."),
]
EVIL = '<img src=x onerror="window.hacked = true"><script>window.hacked = true</script>'


class Page:
    """A window on the dashboard of one server."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, query: str = "", size: tuple[int, int] = WIDE) -> Page:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(f"{self.url}/dashboard{query}")
        return self

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def texts(self, css: str) -> list[str]:
        """Of all that match, in one step: the page may be drawing anew meanwhile."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText.trim())"
        )
        found: list[str] = self.driver.execute_script(script, css)
        return found

    def until(self, what: str, condition: Callable[[], object]) -> None:
        try:
            WebDriverWait(self.driver, WAIT_S, 0.05).until(lambda _: condition())
        except TimeoutException:
            pytest.fail(f"still waiting for {what}; the page says: {self.texts('body')[0]}")

    def ask(self, question: str) -> None:
        self.until("the question field", lambda: self.find("#question").is_enabled())
        self.find("#question").clear()
        self.find("#question").send_keys(question)

    def titles(self) -> list[str]:
        return [text.split("\n")[0] for text in self.texts(".hit h3")]

    def wait_for_first(self, title: str) -> None:
        self.until(f"{title} first", lambda: (self.titles() or [""])[0].startswith(title))

    def outcome(self) -> str:
        return self.texts("#outcome")[0]

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.fail("chromium or chromedriver is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new",
        "--no-sandbox",  # containers give no user namespaces
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(chromedriver)
    with webdriver.Chrome(options=options, service=service) as chrome:
        yield chrome


@pytest.fixture
def page(driver: webdriver.Chrome, server: Server) -> Page:
    driver.get_log("browser")  # of earlier tests
    return Page(driver, server.url)


def fill(http: httpx.Client, name: str, body: dict[str, Any], points: list[dict[str, Any]]) -> None:
    path = f"/collections/{name}"
    http.put(path, json=body).raise_for_status()
    http.put(f"{path}/points", params={"wait": "true"}, json={"points": points}).raise_for_status()


@pytest.fixture
def docs(server: Server, collection: str) -> str:
    """A collection that can be asked in words."""
    points = [
        {
            "id": number,
            "vector": {"text": f"{name}: {summary}", "model": DEFAULT_MODEL},
            "payload": {
                "name": name,
                "package": package,
                "kind": "function",
                "summary": summary,
                "signature": f"{name.split('.')[-1]}(…)",
                "doc": f"{summary}\n\nMore of {name}.",
            },
        }
        for number, (name, package, summary) in enumerate(DOCS)
    ]
    body = {
        "vectors": {"size": 384, "distance": "Cosine"},
        "metadata": {
            "title": "the manual",
            "filter_key": "package",
            "examples": ["compress bytes"],
        },
    }
    with server.http() as http:
        fill(http, collection, body, points)
    return collection


def test_a_question_in_words_is_answered_best_first(page: Page, docs: str) -> None:
    page.open(f"?collection={docs}").ask("which function takes a path apart?")
    page.wait_for_first("os.path.split")
    assert len(page.titles()) == len(DOCS)
    assert "6 answers, best first, in" in page.outcome()
    assert "ms in the server" in page.outcome()
    scores = [float(text) for text in page.texts(".score span")]
    assert scores == sorted(scores, reverse=True)
    assert page.texts(".signature")[0] == "split(…)"
    assert page.texts(".summary")[0] == DOCS[0][2]
    assert page.console() == []


def test_the_documentation_opens(page: Page, docs: str) -> None:
    page.open(f"?collection={docs}&q=compress+bytes")
    page.wait_for_first("zlib.compress")
    page.find(".hit summary").click()
    page.until(
        "the text", lambda: page.texts(".doc") == ["Compress bytes.\n\nMore of zlib.compress."]
    )
    assert "package" in page.texts(".fields dt")


def test_an_example_asks_itself(page: Page, docs: str) -> None:
    page.open(f"?collection={docs}")
    page.until("the example", lambda: page.texts(".examples button") == ["compress bytes"])
    assert page.titles() == []
    page.find(".examples button").click()
    page.wait_for_first("zlib.compress")


def test_a_filter_narrows_the_answers_and_is_kept_in_the_address(page: Page, docs: str) -> None:
    page.open(f"?collection={docs}&q=compress+bytes")
    page.wait_for_first("zlib.compress")
    page.until("the packages", lambda: "os\n2" in page.texts("#facet-list li"))
    only_os = ["os.getcwd function", "os.path.split function"]
    page.find("#facet-list input").click()  # the largest comes first: os
    page.until("only os", lambda: sorted(page.titles()) == only_os)
    assert "only=os" in page.driver.current_url
    page.driver.refresh()
    page.until("the same again", lambda: len(page.titles()) == 2)
    assert page.texts("#facets-chosen") == ["1 chosen"]
    page.find("#facet-clear").click()
    page.wait_for_first("zlib.compress")


def test_the_state_of_the_collection_is_shown(page: Page, docs: str) -> None:
    page.open(f"?collection={docs}")

    def shown() -> dict[str, str]:
        texts = page.texts("#state dt, #state dd")  # in one step: it may be drawn anew
        return dict(zip(texts[::2], texts[1::2], strict=True))

    page.until("six points", lambda: shown().get("Points") == "6")
    assert shown()["Vectors"] == "384 Cosine"
    assert shown()["Model"] == "all-minilm-l6-v2"
    assert page.texts("#health") != [""]


def test_what_is_stored_is_shown_as_text_and_never_run(
    page: Page, server: Server, collection: str
) -> None:
    payload = {"name": EVIL, "summary": EVIL, "doc": EVIL + "!", "kind": EVIL, EVIL: EVIL}
    payload |= {"signature": EVIL}
    with server.http() as http:
        metadata = {"title": EVIL, "examples": [EVIL]}
        body = {"vectors": {"size": 2, "distance": "Dot"}, "metadata": metadata}
        points = [{"id": n, "vector": [1, n], "payload": payload} for n in range(3)]
        fill(http, collection, body, points)
    page.open(f"?collection={collection}")
    page.until("three points", lambda: len(page.titles()) == 3)
    page.find(".hit summary").click()
    page.until("its text", lambda: page.texts(".doc") == [EVIL + "!"])
    assert page.texts(".signature") == [EVIL] * 3
    assert page.driver.execute_script("return window.hacked ?? null") is None
    assert page.driver.execute_script("return document.querySelectorAll('.hits img').length") == 0


def test_a_collection_without_text_is_listed_point_by_point(
    page: Page, server: Server, collection: str
) -> None:
    points = [
        {"id": 2**63 + n, "vector": {"a": [1.0, n]}, "payload": {"n": n, "big": 2**62 + 1}}
        for n in range(25)
    ]
    with server.http() as http:
        body = {"vectors": {"a": {"size": 2, "distance": "Euclid"}}}
        fill(http, collection, body, points)
    page.open(f"?collection={collection}")
    page.until("ten points", lambda: len(page.titles()) == 10)
    assert page.titles()[0] == f"Point {2**63}"  # to the last digit
    assert not page.find("#question").is_enabled()
    page.find(".hit summary").click()
    page.until("the fields", lambda: str(2**62 + 1) in page.texts(".fields dd"))
    page.find("#more").click()
    page.until("the rest", lambda: len(page.titles()) == 25)
    page.until("no more", lambda: not page.find("#more").is_displayed())


def test_choosing_another_collection(page: Page, server: Server, docs: str) -> None:
    other = f"{docs}-other"
    with server.http() as http:
        fill(
            http, other, {"vectors": {"size": 2, "distance": "Dot"}}, [{"id": 7, "vector": [1, 2]}]
        )
    page.open(f"?collection={docs}&q=compress+bytes")
    page.wait_for_first("zlib.compress")
    page.find(f"#collection option[value='{other}']").click()
    page.until("the other's point", lambda: page.titles() == ["Point 7"])


def test_slash_goes_to_the_question_and_every_control_has_a_name(page: Page, docs: str) -> None:
    page.open(f"?collection={docs}")
    page.until("the packages", lambda: page.texts("#facet-list li"))
    page.find("body").send_keys("/")
    assert page.driver.switch_to.active_element.get_attribute("id") == "question"
    for control in page.driver.find_elements(By.CSS_SELECTOR, "input, select, button, summary, a"):
        if control.is_displayed():
            assert control.accessible_name, control.get_attribute("outerHTML")
    page.find("#question").send_keys("compress bytes", Keys.ENTER)
    page.wait_for_first("zlib.compress")


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["1280", "390"])
def test_nothing_is_wider_than_the_window(page: Page, docs: str, size: tuple[int, int]) -> None:
    page.open(f"?collection={docs}&q=compress+bytes", size)
    page.wait_for_first("zlib.compress")
    for summary in page.driver.find_elements(By.CSS_SELECTOR, ".hit summary"):
        summary.click()
    width = page.driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= size[0]


def test_everything_comes_from_the_server_itself(page: Page, docs: str) -> None:
    page.open(f"?collection={docs}&q=compress+bytes")
    page.wait_for_first("zlib.compress")
    loaded = page.driver.execute_script("return performance.getEntries().map((e) => e.name)")
    outside = [name for name in loaded if name.startswith("http") and page.url not in name]
    assert outside == []
    policy = httpx.get(f"{page.url}/dashboard").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_only_the_files_of_the_page_are_served(server: Server) -> None:
    with server.http() as http:
        for file in ("dashboard.js", "dashboard.css"):
            assert http.get(f"/dashboard/{file}").status_code == 200
        for file in ("app.py", "..%2Fapp.py", "%2e%2e/app.py", ""):
            assert http.get(f"/dashboard/{file}").status_code == 404


def test_a_server_with_a_key_asks_for_it(driver: webdriver.Chrome, make_server: MakeServer) -> None:
    server = make_server(api_key="swordfish")
    page = Page(driver, server.url).open()
    page.until("the question for the key", lambda: page.find("#key").is_displayed())
    page.find("#key").send_keys("wrong", Keys.ENTER)
    page.until(
        "the refusal",
        lambda: page.find("#key").is_displayed() and "forgotten" not in page.texts("#key-why")[0],
    )
    page.find("#key").send_keys("swordfish", Keys.ENTER)
    page.until("an empty server", lambda: "There is no collection yet" in page.texts(".welcome h2"))
    stored = driver.execute_script("return JSON.stringify({...localStorage}) + document.cookie")
    assert "swordfish" not in stored
    assert json.loads(driver.execute_script("return JSON.stringify({...sessionStorage})"))


def test_a_server_that_goes_away_is_told_and_comes_back(
    driver: webdriver.Chrome, make_server: MakeServer, tmp_path: Path
) -> None:
    server = make_server(data_dir=tmp_path / "data")
    port = server.url.rpartition(":")[2]
    with server.http() as http:
        body = {"vectors": {"size": 2, "distance": "Dot"}}
        fill(http, "numbers", body, [{"id": 1, "vector": [1, 2]}])
    page = Page(driver, server.url).open()
    page.until("its point", lambda: page.titles() == ["Point 1"])
    server.stop()
    page.until("the sentence", lambda: "The server does not answer" in page.texts("#banner")[0])
    server.settings["http_port"] = int(port)
    server.start()
    page.until("the end of it", lambda: not page.find("#banner").is_displayed())
    assert page.titles() == ["Point 1"]


def test_one_machine_shows_no_cluster(page: Page, docs: str) -> None:
    page.open(f"?collection={docs}")
    page.until("the state", lambda: page.texts("#state dt"))
    assert not page.find("#cluster").is_displayed()


def test_a_cluster_is_shown_and_what_it_lacks(driver: webdriver.Chrome) -> None:
    async def lose_s2(store: FakeStore) -> None:
        await store.txn([], {}, ["nodes/s2"])

    with serve_front() as front:
        for size in (WIDE, NARROW):
            page = Page(driver, front.url).open(size=size)
            page.until("the nodes", lambda page=page: len(page.texts("#cluster-nodes li")) == 4)
            width = driver.execute_script("return document.documentElement.scrollWidth")
            assert width <= size[0]
        assert any("m1 · monitor" in text and "leads" in text for text in page.texts(".parts li"))
        shards = page.texts("#cluster-shards li")
        assert [text.split("\n")[0] for text in shards] == ["Shard 0 · term 1", "Shard 1 · term 1"]
        assert all("(primary)" in text for text in shards)
        front.do(lose_s2)
        page.open()
        page.until("the loss", lambda: any("s2" in t and "lost" in t for t in page.texts("li")))
        states = page.texts("#cluster-shards small")
        assert all("under-replicated" in text or "no primary" in text for text in states)
        front.nodes.by_id["s1"].plan("status", *[asyncio.Event() for _ in range(99)])
        front.store.down = True
        page.open()
        page.until("the sentence", lambda: "does not answer" in page.texts("#cluster-note")[0])
    assert not [line for line in page.console() if "SEVERE" in line and "503" not in line]


def test_how_far_a_change_of_model_is(driver, make_server: MakeServer, tmp_path: Path) -> None:
    meant = TwoModels(tmp_path)
    server = make_server(**meant.settings)
    with server.http() as plain:
        create(plain)
    with closing(Http(server.url)) as http, closing(Migrate(server.url)) as migrate:
        migration_load.fill(http, 20, 1)
        migrate.start(points_per_second=0)
        page = Page(driver, server.url).open()
        far = "old, being changed to new: 0 of 20 points"
        page.until("how far it is", lambda: far in page.texts("#state dd"))
        migrate.start(points_per_second=None)
        done = "old, being changed to new"
        page.until("the end of the copy", lambda: done in page.texts("#state dd"))
