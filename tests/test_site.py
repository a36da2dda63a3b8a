"""The site: the whole book built once, every link followed, and read in real Chromium from a folder and from a server."""
import ast
import functools
import html.parser
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest

from melee_wm.core import UserError
from melee_wm.pages import definitions, formula
from melee_wm.site import build_site, check_links, contents, open_book

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(300)

CARD = """---
id: night-run
kind: run
status: blocked
config_hash: 0011aabbccdd
estimate: {hours: 9.06, cost: 25.2, timeout_seconds: 86400}
targets:
- {metric: action_change_acc, baseline: 0.684, target: 0.75, kill: null}
reviewers:
- {name: mattie, decision: approved, date: 2026-11-21}
---
# Night run

Does it pay? The config is read by `load_config`; see the [appendix](night-run.ipynb) the [index](README.md), and [the run](night-run.run.html).
"""


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    shutil.copy(ROOT / "cards" / "README.md", folder)
    (folder / "night-run.md").write_text(CARD)
    (folder / "night-run.html").write_text("<html><body><h1>executed</h1></body></html>")
    (folder / "night-run.run.html").write_text("<html><body class='jp-Notebook'><h1>the run</h1></body></html>")
    return folder


@pytest.fixture(scope="module")
def site(cards, tmp_path_factory):
    "The whole site, with a card of ours."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MELEE_WM_CARDS", str(cards))
        patch.chdir(ROOT)
        start = time.process_time()
        built = build_site(tmp_path_factory.mktemp("site") / "_site")
        assert time.process_time() - start < 40
        return built


@pytest.fixture(scope="module")
def server(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/"
    running.shutdown()


class Tags(html.parser.HTMLParser):
    "Every address and id of a page, by the standard library's parser rather than ours."
    def __init__(self):
        super().__init__()
        self.ids, self.addresses = [], []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id": self.ids.append(value)
            if name in ("href", "src", "srcset", "poster", "action", "data"): self.addresses.append((tag, name, value))


# --- the whole book -------------------------------------------------------------------------

def test_every_link_leads_somewhere(site):
    "The program follows all of them; every fourth page is followed here too, in another way."
    assert check_links(site) == []
    texts = {p: p.read_text() for p in sorted(site.rglob("*.html"))}
    assert len(texts) > 90
    outside = set()
    for page in [site / "index.html", site / "nbs/03_slp.html", *list(texts)[::4]]:
        found = Tags()
        found.feed(texts[page])
        assert len(found.ids) == len(set(found.ids)), f"{page.name} has an id twice"
        for tag, name, value in set(found.addresses):
            there = urlsplit(urljoin(page.as_uri(), value))
            if there.scheme != "file":
                assert (tag, name) == ("a", "href"), f"{page.name} loads {value}"
                outside.add(value)
                continue
            target = Path(unquote(there.path))
            assert target.is_file() and site in target.parents, f"{page.name}: {value}"
            assert not there.fragment or f'id="{unquote(there.fragment)}"' in texts[target], f"{page.name}: {value}"
    sources = "\n".join(p.read_text() for p in [*ROOT.glob("*.md"), *(ROOT / "nbs").rglob("*.ipynb")])
    assert outside and not [url for url in outside if url not in sources]
    loads = "".join((site / name).read_text() for name in ("style.css", "site.js"))
    assert not re.search(r"https?://|@import|url\(", loads)


def test_the_parts_hold_every_notebook_once():
    "Chapters are found by the patterns in _quarto.yml: none may be forgotten, none stand twice."
    listed = [p.source for part in contents(ROOT) for p in part.pages if p.source.endswith(".ipynb")]
    expected = [p.relative_to(ROOT).as_posix() for p in (*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs" / "explore").glob("*.ipynb"))]
    assert sorted(listed) == sorted(expected)
    chapters = [s for s in listed if "explore" not in s]
    assert chapters == sorted(chapters)


def test_every_exported_name_is_found(site):
    "The index of names holds what nbdev exports, and each name's address is its definition."
    index = json.loads((site / "search.js").read_text().removeprefix("melee_wm_index(").removesuffix(")\n"))
    pages, signatures = index["pages"], {}
    for name, signature, _, page, anchor in index["names"]:
        signatures.setdefault(pages[page][1], {})[name] = (signature, anchor)
    for module in signatures:
        tree = ast.parse((ROOT / "melee_wm" / f"{module}.py").read_text())
        exported = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])
        assert not set(exported) - set(signatures[module]), f"{module}: not in the index"
    signature, anchor = signatures["core"]["UserError"]
    assert signature == "class UserError(ValueError)" and anchor == "core.UserError"
    assert signatures["world"]["World.step"][0].startswith("World.step(controls: Tensor")
    line = re.search(r'<span class="line" id="core.atomic_write".*', (site / "nbs/00_core.html").read_text())[0]
    assert "atomic_write" in re.sub("<[^>]+>", "", line)
    assert "atomic_write" in (site / "names.html").read_text()


def test_no_clutter(site):
    for page in (site / "nbs").rglob("*.html"):
        text = re.sub(r"<[^>]+>", "", page.read_text())
        assert not re.search(r"^#\| ?(export|hide|notest|default_exp)", text, re.M), page.name
        assert "MathJax" not in page.read_text() or page.stem[:2].isdigit(), page.name
    ssd = (site / "nbs/33_ssd.html").read_text()
    assert "$$" not in re.sub("<pre>.*?</pre>", "", ssd, flags=re.S) and ssd.count('class="formula"') > 30 and 'class="tex"' not in ssd


def test_names_in_prose_lead_to_their_definition(site):
    assert 'href="00_core.html#core.UserError"' in (site / "nbs/58_execute.html").read_text()
    start = (site / "index.html").read_text()
    assert 'href="nbs/explore/campaign.html"' in start and 'href="CONTRIBUTING.html"' in start and 'src="nbs/images/match.gif"' in start


def test_a_card(site, cards):
    page = (site / "cards/night-run.html").read_text()
    assert '<i class="status blocked">blocked</i>' in page and "86,400" in page and "0011aabbccdd" in page
    assert page.count('href="night-run.appendix.html"') == 2 and 'href="index.html"' in page and "config.load_config" in page
    assert page.count('href="night-run.run.html"') == 2
    for name, title in (("appendix", "executed"), ("run", "the run")):
        beside = (site / f"cards/night-run.{name}.html").read_text()
        assert 'href="night-run.html"' in beside and f"<h1>{title}</h1>" in beside
    assert "night-run" in (site / "nbs/00_core.html").read_text()            # in the contents of every page


# --- in Chromium ----------------------------------------------------------------------------

@pytest.fixture
def reader(browser, site, server):
    "Opens pages and notes every request, error and failed load."
    contexts, notes = [], {"requests": [], "errors": []}
    def open_page(path, origin="file", width=1440, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda r: notes["requests"].append(r.url))
        page.on("requestfailed", lambda r: notes["errors"].append(r.url) if r.failure != "net::ERR_ABORTED" else None)   # left before a picture had come
        page.on("pageerror", lambda e: notes["errors"].append(str(e)))
        page.on("console", lambda m: notes["errors"].append(m.text) if m.type == "error" else None)
        page.goto((site.as_uri() + "/" if origin == "file" else server) + path)
        return page
    yield open_page
    for context in contexts: context.close()
    allowed = (site.as_uri(), server, "data:")
    assert not [url for url in notes["requests"] if not url.startswith(allowed)], "a page asked somebody else"
    assert not notes["errors"]


def search(page, words: str):
    page.keyboard.press("/")
    page.wait_for_function("document.querySelector('.told').textContent")
    page.keyboard.type(words)
    page.wait_for_selector(".search li")
    return page.locator(".search li")


@pytest.mark.parametrize("origin", ["file", "server"])
def test_search(reader, origin):
    page = reader("nbs/33_ssd.html", origin)
    found = search(page, "atomic_write")
    assert found.first.inner_text().startswith("atomic_write(path)") and "core" in found.first.inner_text()
    assert any("its code uses atomic_write" in text for text in found.all_inner_texts())
    page.keyboard.press("Enter")
    page.wait_for_url("**/nbs/00_core.html#core.atomic_write")
    top = page.evaluate("document.querySelector(':target').getBoundingClientRect().top")
    assert 0 < top < 900 and "def atomic_write" in page.locator(":target").inner_text()
    found = search(page, "wavedash")
    assert "wavedash" in found.first.locator("mark").first.inner_text().lower()
    found.first.locator("a").click()
    page.wait_for_url("**/nbs/*.html#*")
    assert "wavedash" in page.locator("main").inner_text().lower()
    page.keyboard.press("/")
    page.wait_for_function("document.querySelector('.told').textContent")
    page.locator(".search input").fill("zzz <img src=x>")
    assert page.locator(".told").inner_text().startswith("Nothing found") and page.locator(".search li").count() == 0


PAGES = ("index.html", "names.html", "nbs/33_ssd.html", "nbs/60_report.html", "nbs/explore/campaign.html", "cards/night-run.html", "cards/index.html")


@pytest.mark.parametrize("path", PAGES)
def test_readable(reader, path):
    "On a telephone and a desk, light and dark: nothing sticks out sideways, pictures are there, text stands out from its ground."
    page = reader(path)
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    page.wait_for_function("[...document.images].every(i => i.complete)")
    assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
    for width, scheme in ((390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert page.evaluate("[...document.querySelectorAll('article p, article li, article pre')].map(e => parseFloat(getComputedStyle(e).fontSize)).reduce((a, b) => Math.min(a, b), 99)") >= 12
        ink, paper = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.documentElement).backgroundColor].map(c => c.match(/[\\d.]+/g).slice(0, 3).map(Number))")
        assert abs(sum(ink) - sum(paper)) > 400 and (sum(paper) < 200) == (scheme == "dark")
        assert page.locator(".contents").is_visible() == (width > 860)


def test_reading_on(reader):
    "The links at the end, the contents on a telephone, and the button for light and dark."
    page = reader("nbs/33_ssd.html", width=390)
    page.click("[rel=next]")
    page.wait_for_url("**/34_mamba2.html")
    page.click(".menu")
    page.locator(".contents a", has_text="33").first.click()
    page.wait_for_url("**/33_ssd.html")
    before = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.click(".theme")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != before
    page.click("[rel=next]")
    page.wait_for_url("**/34_mamba2.html")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != before     # remembered


# --- when something is wrong ----------------------------------------------------------------

@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project of one notebook."
    root = tmp_path / "project"
    (root / "nbs").mkdir(parents=True), (root / "melee_wm").mkdir(), (root / "cards").mkdir()
    (root / "settings.ini").write_text("[DEFAULT]\ncards = cards\n")
    (root / "README.md").write_text("# tiny\n\nA tiny project.\n")
    (root / "cards" / "README.md").write_text("# Cards\n")
    (root / "_quarto.yml").write_text("website: {sidebar: {contents: [{section: All, contents: '*.ipynb'}]}}\n")
    monkeypatch.chdir(root)
    monkeypatch.delenv("MELEE_WM_CARDS", raising=False)
    write(root, "# tiny\n> One chapter.")
    return root


def write(root, *words):
    hidden = nbformat.v4.new_code_cell("#| hide\nsecret = 1", outputs=[nbformat.v4.new_output("stream", text="plumbing")])
    warned = nbformat.v4.new_code_cell("#| export\ndef shown(a: int = 1) -> int: return a", outputs=[nbformat.v4.new_output("stream", name="stderr", text="a warning"), nbformat.v4.new_output("stream", text="<b>told</b>")])
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(w) for w in words] + [hidden, warned]), root / "nbs" / "00_tiny.ipynb")


def snapshot(folder):
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_what_is_hidden_and_escaped(project):
    page = (build_site("out") / "nbs/00_tiny.html").read_text()
    assert "secret" not in page and "plumbing" not in page and "a warning" not in page
    assert "&lt;b&gt;told&lt;/b&gt;" in page and 'id="tiny.shown"' in page


def break_link(root): write(root, "# tiny\n> One chapter.", "To [nowhere](01_gone.ipynb).")
def break_anchor(root): write(root, "# tiny\n> One chapter.", "To [no place](#gone).")
def break_picture(root): write(root, "# tiny\n> One chapter.", '<img src="https://example.org/a.png">')
def break_notebook(root): (root / "nbs" / "00_tiny.ipynb").write_text("{")
def break_card(root): (root / "cards" / "a.md").write_text("---\nid: [a\n---\n# A\n")


@pytest.mark.parametrize("damage,told", [(break_link, "01_gone.ipynb leads to no file"), (break_anchor, "#gone leads to no such place"), (break_picture, "from elsewhere"), (break_notebook, "not a notebook"), (break_card, "front matter is not YAML")], ids=lambda v: getattr(v, "__name__", ""))
def test_a_failed_build_leaves_the_old_site(project, damage, told):
    site = build_site("out")
    before = snapshot(site)
    damage(project)
    with pytest.raises(UserError, match=re.escape(told)):
        build_site("out")
    assert snapshot(site) == before
    assert [p.name for p in project.iterdir() if p.name.startswith(".")] == []


def test_killed_while_building(project):
    site = build_site("out")
    before = snapshot(site)
    program = "import os, signal, melee_wm.site as s\ns.check_links = lambda site: os.kill(os.getpid(), signal.SIGKILL)\ns.build_site('out')"
    assert subprocess.run([sys.executable, "-c", program], cwd=project).returncode == -9
    assert snapshot(site) == before
    assert check_links(build_site("out")) == []


def test_only_a_site_of_ours_is_replaced(project):
    (project / "thesis").mkdir()
    (project / "thesis" / "index.html").write_text("<h1>Years of work</h1>")
    (project / "file").write_text("x")
    for place in ("thesis", "file", "."):
        with pytest.raises(UserError, match="something else"):
            build_site(place)
    assert (project / "thesis" / "index.html").read_text() == "<h1>Years of work</h1>" and (project / "file").read_text() == "x"
    (project / "empty").mkdir()
    assert (build_site("empty") / "index.html").is_file()
    write(project, "# tiny\n> One chapter.", "Another sentence.")
    assert "Another sentence" in (build_site("empty") / "nbs/00_tiny.html").read_text()


def test_a_folder_without_a_book(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    (tmp_path / "melee_wm").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no book here.*clone"):
        build_site("out")
    assert not (tmp_path / "out").exists()


def test_part_of_the_book(project):
    (project / "nbs" / "01_more.ipynb").write_bytes((project / "nbs" / "00_tiny.ipynb").read_bytes())
    write(project, "# tiny\n> One chapter.", "More in [the next](01_more.ipynb).")
    site = build_site("out", only=["00_tiny"])
    assert "More in the next." in (site / "nbs/00_tiny.html").read_text() and not (site / "nbs/01_more.html").exists()
    with pytest.raises(UserError, match="no such notebook"):
        build_site("out", only=["02_none"])


def test_definitions_and_formulas():
    code = "class A:\n    def b(self): ...\n    def _c(self): ...\nX, Y = 1, 2\n@patch\ndef d(self: A, n: int = 1) -> str: ...\nasync def e(): ..."
    assert [(d.name, d.line) for d in definitions(code)] == [("A", 1), ("A.b", 2), ("X", 4), ("Y", 4), ("A.d", 6), ("e", 7)]
    assert definitions(code)[4].signature == "A.d(n: int=1) -> str"
    assert "<path" in formula(r"s\le t") and "&lt;" in formula(r"a<b")


def test_names_defined_twice_lead_nowhere(project):
    (project / "nbs" / "01_more.ipynb").write_bytes((project / "nbs" / "00_tiny.ipynb").read_bytes())
    write(project, "# other\n> One chapter.")
    book = open_book(project, contents(project))
    assert len(book.names["shown"]) == 2 and len(book.names["other.shown"]) == 1
