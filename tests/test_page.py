"""The page in a real browser: keys and pads move fighters, time can be stopped and branched, replays dropped on it play beside the model."""
import base64
import json
import time
from pathlib import Path

import numpy as np
import pytest

from melee_wm.core import quick_replays
from melee_wm.export import rollout, write_rollout
from melee_wm.fields import CONTROLS
from melee_wm.slp import read_slp

playwright = pytest.importorskip("playwright.sync_api")
WEB = Path(__file__).resolve().parent.parent / "melee_wm" / "web"
PAD = """
window.pad = {index: 0, id: "A pad of the standard layout", mapping: "standard", connected: true, timestamp: 0, axes: [0, 0, 0, 0],
              buttons: Array.from({length: 17}, () => ({pressed: false, touched: false, value: 0}))};
navigator.getGamepads = () => [window.pad, null, null, null];
"""
DROP = """([name, data, zone]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), files = new DataTransfer();
  files.items.add(new File([bytes], name));
  document.body.dispatchEvent(new DragEvent("dragenter", {dataTransfer: files, bubbles: true}));
  document.querySelector(zone).dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
}"""
INK = """canvas => { const {width, height} = canvas, colors = new Set(canvas.getContext("2d").getImageData(0, 0, width, height).data.reduce((found, value, i) => {
  if (i % 4 === 0) found.push(value << 8); else if (i % 4 === 1) found[found.length - 1] += value; return found; }, [])); return colors.size; }"""


@pytest.fixture(scope="module")
def server():
    from melee_wm.play import running_server
    with running_server() as running:
        yield running


@pytest.fixture
def opened(browser, server):
    "Opens the page in windows of any kind; afterwards nothing may have been complained about, or fetched from elsewhere."
    contexts, problems = [], []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)       # the machine may be busy
        page.add_init_script(PAD)
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("request", lambda r: None if r.url.startswith((server.url, "blob:", "data:")) else problems.append(f"fetches {r.url}"))
        page.goto(server.url)
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def until(page, condition: str, seconds: float = 60):
    "Wait for a condition; asked from outside, because the page's security policy lets nobody evaluate text inside."
    end = time.monotonic() + seconds
    while not page.evaluate(f"Boolean({condition})"):
        assert time.monotonic() < end, f"not within {seconds:g} s: {condition}; {page.evaluate('JSON.stringify({...melee.info(), match: null})')[:400]}"
        page.wait_for_timeout(30)


def begin(page, *controllers):
    for player, controller in enumerate(controllers):
        page.select_option(f"#controller-{player}", controller)
    page.click("#begin")
    until(page, "melee.view")


def x_of(page, player):
    return page.evaluate(f"melee.view.players[{player}].x")


def frame_of(page):
    return page.evaluate("melee.info().frame")


def replay_file(practice_slp):
    return (quick_replays() or [practice_slp])[0]


def drop(page, path, tab):
    page.evaluate(DROP, [path.name, base64.b64encode(path.read_bytes()).decode(), f".zone[data-to={tab}]"])


def test_keys_move_one_fighter_and_a_pad_the_other(opened):
    page = opened()
    page.select_option("#stage", label="Final Destination")
    begin(page, "person", "person")
    page.select_option("#device-0", "keyboard")
    page.select_option("#device-1", "0")
    page.focus("#picture")
    before = x_of(page, 0), x_of(page, 1)
    page.keyboard.down("KeyD")
    until(page, f"melee.view.players[0].x > {before[0]} + 10")
    assert abs(x_of(page, 1) - before[1]) < 1, "the keys of one player move only that one"
    page.keyboard.up("KeyD")
    page.evaluate("pad.axes[0] = -1")
    until(page, f"melee.view.players[1].x < {before[1]} - 10")
    page.evaluate("pad.axes[0] = 0; pad.buttons[1].pressed = true")
    until(page, "melee.view.players[1].controls.button_x === 1")
    assert "ms" in page.inner_text("#readout") and page.inner_text("#clock").startswith("7:5")


def test_time_stops_steps_goes_back_and_branches(opened, tmp_path):
    page = opened()
    page.focus("#picture")
    page.keyboard.down("KeyD")               # held before it begins: it counts
    begin(page, "person", "random")
    until(page, "melee.info().frame > 60")
    assert page.evaluate("melee.view.players[0].controls.main_x") == 1
    page.keyboard.press("KeyP")
    until(page, "melee.info().state.paused")
    page.wait_for_timeout(100)
    stopped = frame_of(page)
    page.click("#step")
    until(page, f"melee.info().frame === {stopped + 1}")
    page.click("#ghosts")
    page.click("#back")
    until(page, f"melee.info().frame <= {max(0, stopped - 100)}")
    assert "new branch" in page.inner_text("#banner")
    page.focus("#timeline input")
    until(page, "Number(document.querySelector('#timeline input').value) === melee.info().frame")
    place = frame_of(page)
    page.keyboard.press("ArrowRight")
    until(page, f"melee.info().frame === {place + 1}")
    page.keyboard.up("KeyD")
    page.keyboard.press("KeyP")
    until(page, "melee.info().dropped > 10")
    page.click("#swap")
    until(page, f"melee.info().state.last === {stopped + 1}")
    for kind in ("slp", "json"):
        with page.expect_download() as download:
            page.click(f"#download-{kind}")
        download.value.save_as(tmp_path / f"match.{kind}")
    assert json.loads((tmp_path / "match.json").read_text())["schema"] == "melee-wm-rollout/1"
    game = read_slp(tmp_path / "match.slp")
    assert len(game) > stopped and (game["x"][-1] != game["x"][0]).any()


def test_a_dropped_replay_plays_beside_the_model(opened, practice_slp):
    page = opened()
    drop(page, replay_file(practice_slp), "watch")
    page.wait_for_selector("#theatre", state="visible")
    until(page, "melee.info().row > 20")
    page.click("#watch-play")
    row = page.evaluate("melee.info().row")
    page.focus("#watch-timeline input")
    page.keyboard.press("ArrowRight")
    until(page, f"melee.info().row === {row + 1}")
    errors = np.array(page.evaluate("melee.watch.errors"))
    assert errors.shape == (2, page.evaluate("melee.watch.length")) and np.isfinite(errors).all() and errors[:, 0].max() < 5
    for canvas in ("#model-picture", "#truth-picture", "#watch-timeline canvas"):
        assert page.eval_on_selector(canvas, INK) > 5, f"{canvas} is empty"
    page.click("#take-over")
    until(page, "melee.view")
    assert page.evaluate("melee.info().state.controllers") == ["person", "replay"]
    assert page.is_visible("#play-panel") and frame_of(page) > 0


def test_a_dropped_replay_can_be_played_on_from(opened, practice_slp):
    page = opened()
    drop(page, replay_file(practice_slp), "play")
    page.wait_for_selector("#replay-frame", state="visible")
    page.fill("#frame", "200")
    begin(page, "replay", "neutral")
    until(page, "melee.info().frame > 210")


def test_a_rollout_file_opens_at_phone_width(opened, practice_slp, tmp_path):
    from melee_wm.checkpoint import load_model
    file = write_rollout(rollout(load_model("default"), read_slp(practice_slp), 300, 60), tmp_path / "dream.json")
    page = opened(viewport={"width": 390, "height": 844}, device_scale_factor=2, has_touch=True, reduced_motion="reduce")
    page.set_input_files("#watch-file", file)
    page.wait_for_selector("#theatre", state="visible")
    assert page.evaluate("melee.info().row") == 0, "nothing moves by itself where people asked for less motion"
    page.tap("#watch-play")
    until(page, "melee.info().row === 59")
    model, truth = (page.locator(name).bounding_box() for name in ("#model-picture", "#truth-picture"))
    assert truth["y"] > model["y"] + model["height"], "stacked on a phone"
    page.tap("#watch-timeline input")
    until(page, "melee.info().row > 20 && melee.info().row < 40")
    for tab in ("watch", "play"):
        page.tap(f"#{tab}-tab")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_keys_can_be_set_and_are_remembered(opened):
    page = opened()
    page.click("#keys-details summary")
    button = page.get_by_label("Player 1, A: attack")
    button.click()
    page.keyboard.press("KeyZ")
    assert button.inner_text() == "Z"
    page.reload()
    page.wait_for_selector("html[data-ready]")
    page.click("#keys-details summary")
    assert button.inner_text() == "Z" and page.inner_text("#hint").count("Z attack") == 1


def test_a_file_that_is_no_replay_gets_one_clear_line(browser, server, tmp_path):
    page = browser.new_page()
    page.goto(server.url)
    page.wait_for_selector("html[data-ready]")
    (tmp_path / "bad.slp").write_bytes(b"no replay at all")
    page.set_input_files("#file", tmp_path / "bad.slp")
    until(page, "document.getElementById('notice').textContent.includes('cannot be opened')")
    line = page.inner_text("#notice")
    page.close()
    assert line.startswith("bad.slp cannot be opened: ") and len(line) < 300 and "\n" not in line


def test_controls_lie_on_the_games_grids(opened):
    "What the page sends is what the server's own reading of it gives, and what a replay could hold."
    from melee_wm.stepper import pad_of
    page, dice = opened(), np.random.default_rng(0)
    raw = [dict(zip(CONTROLS, [*dice.uniform(-1.2, 1.2, 4), dice.uniform(0, 1), *(dice.random(8) < .3).astype(int).tolist()])) for _ in range(200)]
    read = page.evaluate("""async raw => { const {asTheGameReads, packed} = await import("./grid.js");
        return raw.map(one => { const controls = asTheGameReads(one); return [Object.values(controls), [...new Uint8Array(packed(1, controls))]]; }); }""", raw)
    for said, sent in read:
        player, held = pad_of(bytes(sent))
        assert player == 1 and np.allclose(held, said, atol=1e-6)
        for stick in (held[:2], held[2:4]):
            steps = np.abs(stick * 80)
            assert np.hypot(*stick) <= 1 + 1e-6 and np.allclose(steps, steps.round(), atol=1e-4) and (np.isclose(steps, 0) | (steps > 22.5)).all()
        assert held[4] == 1 if held[10] or held[11] else held[4] == 0 or held[4] * 140 >= 42.9


def test_the_pages_files_are_small_and_its_own():
    for path in (p for p in WEB.iterdir() if p.suffix in (".js", ".html", ".css") and not p.name.startswith("local")):
        text = path.read_text()
        assert text.count("\n") < 300, f"{path.name} is long"
        assert "https://" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", ""), f"{path.name} names an address"
        assert path.suffix != ".js" or text.startswith("/**"), f"{path.name} does not say what it is"
