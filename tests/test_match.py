"""Matches between controllers: the rules that end them, batches that do not mix, files that others read, figures that slippi-js agrees with."""
import json
import shutil
import subprocess
from pathlib import Path
import numpy as np
import pytest
import torch
from melee_wm.checkpoint import load_model
from melee_wm.config import load_config
from melee_wm.core import UserError, quick_replays
from melee_wm.encoding import columns_of
from melee_wm.export import made_rollout, read_rollout, rollout, to_game, write_rollout
from melee_wm.fields import CONTROLS
from melee_wm.mamba2 import build_model
from melee_wm.match import EIGHT_MINUTES, Random, controller_of, fixtures, from_replay, from_spawn, habits, match_rollout, openings, play, round_robin, score, standings, standings_text
from melee_wm.melee import CATEGORIES
from melee_wm.pictures import render, scene_of
from melee_wm.practice import practice_match
from melee_wm.slp import read_slp
from melee_wm.world import World, replayed_controls

JS = Path(__file__).parent / "slippi_js"
STATS = """const { SlippiGame } = require("@slippi/slippi-js/node"); const game = new SlippiGame(process.argv[1]);
const stats = game.getStats(), frames = game.getFrames();
console.log(JSON.stringify({ end: game.getGameEnd(), winners: game.getWinners().map(w => w.playerIndex), last: stats.lastFrame, frames: Object.keys(frames).length,
  conversions: stats.conversions.map(c => [c.lastHitBy, c.startFrame]), stocks: stats.stocks.map(s => [s.playerIndex, s.endFrame ?? null]), inputs: stats.overall.map(o => o.inputCounts.total) }));"""


@pytest.fixture(scope="module")
def world():
    return World(load_model("default"))


@pytest.fixture(scope="module")
def game():
    return practice_match(3, frames=700)


class Runner:
    "Holds the stick to one side for ever: who does so leaves the stage."
    frames = 1

    def __init__(self, way):
        self.way = way

    def act(self, columns, stage, me):
        pads = torch.zeros(len(me), len(CONTROLS))
        pads[:, 0] = self.way
        return pads


class Interrupted(Runner):
    "Somebody presses Ctrl-C while this one thinks for the tenth time."
    asked = 0

    def act(self, columns, stage, me):
        self.asked += 1
        if self.asked == 10:
            raise KeyboardInterrupt
        return super().act(columns, stage, me)


def slippi_js(path: Path) -> dict:
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    if not (JS / "node_modules").is_dir():
        pytest.skip("slippi-js is not installed: npm install --prefix tests/slippi_js")
    return json.loads(subprocess.run(["node", "-e", STATS, str(path)], cwd=JS, check=True, capture_output=True, timeout=120).stdout)


def agree(columns, path: Path) -> dict:
    "The openings that we find are the conversions that slippi-js finds."
    theirs = slippi_js(path)
    for player, port in enumerate(read_slp(path).ports):
        assert [first - 123 for first, _ in openings(columns)[player]] == [start for who, start in theirs["conversions"] if who == port]
    return theirs


@pytest.fixture(scope="module")
def lost(world):
    "One who runs off the stage for ever against one who stands: over after four stocks; and the other way round."
    starts = [from_spawn(world, 32, (2, 20)), from_spawn(world, 31, (9, 2))]
    return play(world, starts, [("runner", "neutral"), ("neutral", "runner")], {"runner": Runner(-1.)}, max_frames=3000, progress=False)


def test_four_stocks_end_a_match(lost, tmp_path):
    for match, winner in zip(lost, (1, 0)):
        assert match.ended == "four stocks" and score(match).winner == score(match).leader == winner
        assert match.fields["stocks"][-1].tolist() == ([0, 4] if winner else [4, 0]) and (match.fields["stocks"][-2] > 0).all()
        assert match.frames == len(match.fields["x"]) - 1 < 3000
    path = write_rollout(match_rollout(lost[0]), tmp_path / "lost.slp")
    again, told = read_slp(path), to_game(match_rollout(lost[0]))
    for name in ("x", "y", "action_state", "stocks", "percent", "main_x", "buttons", "ground", "hitlag"):
        assert np.array_equal(again[name], told[name]), name
    assert again.info["end_method"] == "Game" and "starting places" in again.info["synthetic"]
    theirs = agree(lost[0].fields, path)
    assert theirs["winners"] == [1] and theirs["end"]["gameEndMethod"] == 2 and theirs["frames"] == len(again)
    assert [who for who, end in theirs["stocks"] if end is not None].count(0) == 4
    saved = read_rollout(write_rollout(match_rollout(lost[0]), tmp_path / "lost.json"))
    assert saved.source["score"]["winner"] == 1 and saved.source["controls"] == ["runner", "neutral"] and saved.source["ended"] == "four stocks"


def test_eight_minutes_end_a_match_and_the_others_go_on(world, tmp_path):
    late = from_spawn(world, 31, (2, 20))._replace(elapsed=EIGHT_MINUTES - 5)
    early = from_spawn(world, 8, (2, 2))
    both = play(world, [late, early, late], [("runner", "neutral")] * 3, {"runner": Runner(1.)}, max_frames=40, progress=False)
    assert [(m.ended, m.frames) for m in both] == [("eight minutes", 5), ("stopped", 40), ("eight minutes", 5)]
    alone = play(world, [early], [("runner", "neutral")], {"runner": Runner(1.)}, max_frames=40, progress=False)[0]
    for name, values in alone.fields.items():
        np.testing.assert_allclose(both[1].fields[name], values, atol=1e-3, err_msg=name)
    path = write_rollout(match_rollout(both[0]), tmp_path / "late.slp")
    assert read_slp(path).info["end_method"] == "Time" and slippi_js(path)["end"]["gameEndMethod"] == 1
    assert score(both[0]).winner is None and score(both[1]).winner is None      # a draw, and a match cut short


def test_a_replayed_match_is_a_rollout(world, game):
    dream = rollout(world, game, 100, 60)
    start = from_replay(world, game, 100, "practice")
    match = play(world, [start], [("replay", "replay")], max_frames=60, progress=False)[0]
    made = match_rollout(match)
    assert made.frame.tolist() == list(range(100, 161)) and made.source["seed_frame"] == 100
    for name in ("x", "y", "action_state", "percent", "main_x", "buttons_physical"):
        np.testing.assert_allclose(made.columns[name][1:], dream.columns[name], atol=1e-3, err_msg=name)
    beyond = play(world, [from_replay(world, game, len(game) - 1 - 123 - 3)], [("replay", "neutral")], max_frames=8, progress=False)[0]
    assert beyond.frames == 8 and not beyond.fields["main_x"][4:].any()           # the replay has let go


def test_a_world_that_looks_ahead(game):
    torch.manual_seed(0)
    world = World(build_model(load_config("exp-3a-lookahead")))
    start = from_replay(world, game, 100)
    match = play(world, [start], [("replay", "replay")], max_frames=20, progress=False)[0]
    columns = columns_of(game, world.layout)
    world.reset(start.seed, torch.tensor([game.stage]), start.clock)
    told = world.run(replayed_controls(columns, np.array([223]), 21))
    for name in ("x", "y", "action_state", "main_x"):
        np.testing.assert_allclose(match.fields[name][1:], told[name][0].numpy(), atol=1e-4, err_msg=name)


def test_ctrl_c_keeps_what_was_played(world):
    match = play(world, [from_spawn(world, 31, (2, 20))], [("someone", "neutral")], {"someone": Interrupted(1.)}, max_frames=100, progress=False)[0]
    assert match.ended == "interrupted" and match.frames == 9 and score(match).winner is None
    assert len(to_game(match_rollout(match))) == 10


def test_errors_are_one_line(world, game):
    spawn = from_spawn(world, 31, (2, 20))
    for call, words in ((lambda: play(world, [spawn], [("replay", "neutral")]), "nothing to replay"), (lambda: play(world, [], []), "no match to play"),
                        (lambda: play(world, [spawn], [("me", "neutral")]), "unknown controller"), (lambda: from_spawn(world, 31, (99, 2)), "unknown character"),
                        (lambda: from_replay(world, game, -123), "no such frame"), (lambda: controller_of("policy:no-such-run"), "no-such-run"),
                        (lambda: play(World(build_model(load_config("v1"))), [from_spawn(World(build_model(load_config("v1"))), 31, (2, 2))], [("neutral", "neutral")]), "knows stocks")):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_round_robin_exchanges_sides_and_stages(world):
    planned = fixtures(["a", "b", "c"], 4)
    assert len(planned) == 12 and len({(frozenset(p), stage, who) for p, stage, who in planned}) == 6
    for first, second in zip(planned[::2], planned[1::2]):
        assert first[0] == second[0][::-1] and first[1:] == second[1:]
    matches = round_robin(world, {"fighter": controller_of("policy", seed=0), "random": Random()}, 2, stages=(31,), max_frames=90, progress=False)
    table = standings(matches)
    assert {line["fighter"] for line in table["fighters"]} == {"fighter", "random"} and all(line["matches"] == 2 for line in table["fighters"])
    assert sum(line["damage_per_minute"] for line in table["fighters"]) == pytest.approx(sum(line["damage_taken_per_minute"] for line in table["fighters"]))
    assert json.loads(json.dumps(table)) == table and "Battlefield" in standings_text(table)
    shares = habits(matches[0].fields)
    assert sum(shares["action, share of frames"].values()) == pytest.approx(1) and set(shares["action, share of frames"]) == set(CATEGORIES)


def test_the_fighter_does_something(world):
    "Two seconds from the starting places: it moves, on the game's grids, and otherwise every time."
    starts = [from_spawn(world, 32, (2, 20))] * 3
    matches = play(world, starts, [("policy", "policy")] * 3, {"policy": controller_of("policy", seed=1)}, max_frames=120, progress=False)
    for match in matches:
        assert np.ptp(match.fields["x"], axis=0).min() > 1
        assert np.allclose(match.fields["main_x"] * 80, np.rint(match.fields["main_x"] * 80), atol=1e-4)
    assert not np.array_equal(matches[0].fields["main_x"], matches[1].fields["main_x"])


def test_openings_are_slippi_js_conversions(replays):
    for path in quick_replays()[:3]:
        game = read_slp(path)
        agree(game, path)


def test_a_made_rollout_says_what_it_does_not_know(world):
    fields = {n: v[0].numpy() for n, v in from_spawn(world, 31, (2, 14), (1, 3)).seed.items()}
    made = made_rollout(fields, 31, (2, 14), (1, 3), {"model": "m"})
    game = to_game(made)
    assert game.ports == (1, 3) and game["character"][0].tolist() == [1, 10] and (game["last_hit_by"] == 6).all()
    assert {"last_hit_by", "animation_index", "random_seed"} <= set(made.source["carried"]) and not {"x", "hitlag", "raw_main_x"} & set(made.source["carried"])
    assert made.frame[0] == -123 and made.source["seed_game"] is None and game.info["synthetic"].startswith("rollout of m from the starting places")


def test_pictures(lost, tmp_path):
    from PIL import Image
    path = render(lost[0], tmp_path / "lost.gif", 0, 120, width=320, progress=False)
    with Image.open(path) as shown:
        assert shown.size == (320, 200) and shown.n_frames == 50 and shown.info["duration"] == 40
        first, colours = np.array(shown.convert("RGB")), len(shown.convert("RGB").getcolors())
        shown.seek(40)
        assert (np.array(shown.convert("RGB")) != first).any() and colours > 5
    render(read_rollout(write_rollout(match_rollout(lost[0]), tmp_path / "a.json")), tmp_path / "a.png", 5, 6, progress=False)
    dead = scene_of(lost[0])
    assert not dead.alive[-1, 0] and dead.alive[-1, 1] and not list(tmp_path.glob("*.tmp"))
    if shutil.which("ffmpeg"):
        assert render(lost[0], tmp_path / "lost.mp4", 0, 30, progress=False).stat().st_size > 1000
    else:
        with pytest.raises(UserError, match="no ffmpeg"):
            render(lost[0], tmp_path / "lost.mp4", 0, 30, progress=False)
