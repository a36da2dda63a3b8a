"Reading and writing replays: real files, random games, refusals by class, and the same numbers in slippi-js."
import json
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from melee_wm.core import UserError
from melee_wm.frame import COLUMNS, Game
from melee_wm.slp import ITEM, POST_FRAME, PRE_FRAME, ReplayError, read_slp, write_slp

JS = Path(__file__).parent / "slippi_js"
WRITTEN = [n for n in COLUMNS if n in (*POST_FRAME.names, *PRE_FRAME.names, "on_ground")]   # what version 3.13 has
ODD = {"four-players-3.12": "not_two_players", "three-player-teams-3.13": "not_two_players", "human-vs-cpu-1.7": "cpu_player", "ice-climbers-1.0": "cpu_player",
       "no-game-end-cpu-3.13": "cpu_player", "v3.18-short": "cpu_player", "transform-sheik-zelda": 3534, "v3.16-short": 308, "very-short-3.9": 132}
BAD = {"bad-payload-size": "payload size", "endless-mode-panics": "the reader failed", "home-run-contest-end-method-9": "end method", "not-slp-html": "does not begin",
       "not-slp-png": "does not begin", "not-slp-text": "does not begin", "severed-metadata": "ends in the middle", "truncated-small": "ends in the middle",
       "unknown-event": "unknown event", "v0.1-panics": "the reader failed", "v3.6.1-reader-panics": "Slippi 3.0 to 3.6"}


def same(got: np.ndarray, want: np.ndarray, name: str):
    np.testing.assert_array_equal(got, want, err_msg=name)   # NaN equals NaN


def random_game(seed: int, frames: int, names: list[str], items: int, ports: tuple[int, int]) -> Game:
    "A game of random values in the ranges of the column table."
    rng, columns = np.random.default_rng(seed), {}
    for name in {"x", "y", *names}:
        c, dtype = COLUMNS[name], np.dtype(COLUMNS[name].dtype)
        if dtype.kind == "b":
            columns[name] = rng.random((frames, 2)) < .5
        elif dtype.kind in "iu":
            columns[name] = rng.integers(int(c.low), int(c.high), (frames, 2), endpoint=True).astype(dtype)
        else:
            low, high = (c.low, c.high) if np.isfinite(c.low) else (-1e30, 1e30)
            columns[name] = np.clip(rng.uniform(low, high, (frames, 2)), low, high).astype(dtype)
    table = {"frame": np.sort(rng.integers(0, frames, items)).astype(np.int32), "type": rng.integers(0, 240, items).astype(np.uint16), "owner": rng.integers(-1, 4, items).astype(np.int8),
             "x": rng.normal(size=items).astype(np.float32), "id": rng.integers(0, 2**32, items, dtype=np.uint32)}
    return Game(stage=int(rng.choice([2, 3, 8, 28, 31, 32])), columns=columns, ports=ports, characters=(int(rng.integers(0, 26)), int(rng.integers(0, 26))), items=table)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), frames=st.integers(1, 40), names=st.lists(st.sampled_from(WRITTEN), unique=True), items=st.integers(0, 30),
       ports=st.sampled_from([(0, 1), (0, 3), (1, 2), (2, 3)]), label=st.one_of(st.none(), st.text(min_size=1, max_size=300).filter(lambda s: s.isprintable())))
def test_random_games_come_back(tmp_path_factory, seed, frames, names, items, ports, label):
    game = random_game(seed, frames, names, items, ports)
    back = read_slp(write_slp(game, tmp_path_factory.getbasetemp() / "random.slp", provenance=label))
    assert set(back.columns) == set(game.columns), "what was made up must not come back"
    for name, values in game.columns.items():
        same(back[name], values, name)
        assert back[name].dtype == np.dtype(COLUMNS[name].dtype)
    for name, values in game.items.items():
        same(back.items[name], values, name)
    assert (back.stage, back.ports, back.characters, back.info["synthetic"], back.version) == (game.stage, ports, game.characters, label, (3, 13, 0))
    assert back.info["stocks_start"] == (4, 4) and back.info["types"] == ("Human", "Human")


def test_real_games_come_back(replays, tmp_path):
    for path in sorted((replays / "quick").glob("*.slp")) + sorted((replays / "odd").glob("v*.slp")) + [replays / "odd" / "transform-sheik-zelda.slp"]:
        game = read_slp(path)
        back = read_slp(write_slp(game, tmp_path / "again.slp"))
        assert set(back.columns) == set(game.columns) & set(WRITTEN)
        for name in back.columns:
            same(back[name], game[name], f"{path.name}: {name}")
        for name in set(ITEM.names) & set(game.items or {}):
            same(back.items[name], game.items[name], f"{path.name}: item {name}")
        for key in ("types", "costumes", "stocks_start", "end_method", "random_seed", "timer", "placements"):
            assert key == "placements" and game.info[key] is None or back.info[key] == game.info[key], (path.name, key)
        assert (back.stage, back.ports, back.characters, len(back)) == (game.stage, game.ports, game.characters, len(game))


def test_writing_is_deterministic_and_keeps_the_label(tmp_path):
    game = random_game(0, 30, WRITTEN, 5, (0, 1))
    first, second = (write_slp(game, tmp_path / f"{i}.slp", provenance="synthetic test match") for i in (1, 2))
    assert first.read_bytes() == second.read_bytes()
    resaved = read_slp(write_slp(read_slp(first), tmp_path / "3.slp"))
    assert resaved.info["synthetic"] == "synthetic test match"


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_reason(replays, name, capfd):
    with pytest.raises(ReplayError, match=BAD[name]) as caught:
        read_slp(replays / "bad" / f"{name}.slp")
    assert caught.value.reason == "unreadable" and "\n" not in str(caught.value) and name in str(caught.value)
    assert capfd.readouterr().err == "", "a panic must not print its stack"


def test_every_bad_and_odd_file_is_expected(replays):
    assert {p.stem for p in (replays / "bad").iterdir()} == set(BAD)
    assert {p.stem for p in (replays / "odd").iterdir()} == set(ODD)


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_classified(replays, name):
    path = replays / "odd" / f"{name}.slp"
    if isinstance(ODD[name], str):
        with pytest.raises(ReplayError) as caught:
            read_slp(path, humans_only=True)
        assert caught.value.reason == ODD[name]
    else:
        assert len(read_slp(path, humans_only=True)) == ODD[name]


def test_a_match_against_the_computer_is_read_unless_refused(replays):
    game = read_slp(replays / "odd" / "ice-climbers-1.0.slp")
    assert game.info["types"] == ("Human", "Cpu") and game.info["followers"] == (0,)
    assert "trigger_right" not in game and "shoulder" in game, "garbage of an early recorder is a missing column"


def test_a_fighter_may_change(replays):
    character = read_slp(replays / "odd" / "transform-sheik-zelda.slp")["character"]
    assert {7, 19} in [set(np.unique(character[:, player])) for player in (0, 1)]


def test_stage_events_and_missing_tables(replays):
    modern, old = read_slp(replays / "odd" / "v3.18-short.slp"), read_slp(replays / "odd" / "transform-sheik-zelda.slp")
    assert len(modern.stage_events["fod_platform"]["height"]) and old.stage_events is None and old.items is None
    with pytest.raises(UserError, match="missing column"):
        old["hitlag"]


def test_no_names_unless_asked(replays):
    path = sorted((replays / "quick").glob("*.slp"))[0]
    assert "names" not in read_slp(path).info and "names" in read_slp(path, keep_names=True).info


def test_rollbacks_keep_the_last_attempt(tmp_path):
    "A tape in which frames are played, taken back and played again gives what was played last."
    game = random_game(1, 20, WRITTEN, 0, (0, 1))
    straight = write_slp(game, tmp_path / "straight.slp").read_bytes()
    length = struct.unpack_from(">i", straight, 11)[0]
    start = 15 + 2 + 3 * 7 + 702   # payload sizes, then the game's header
    frame = lambda i: bytearray(straight[start + 312 * i:start + 312 * (i + 1)])
    wrong = [frame(i) for i in (5, 6, 7)]
    for f in wrong:
        f[13 + 128 + 8:13 + 128 + 10] = b"\x00\x11"   # another action state
    tape = straight[:11] + struct.pack(">i", length + 3 * 312) + straight[15:start + 312 * 5] + b"".join(wrong) + straight[start + 312 * 5:]
    (tmp_path / "rollback.slp").write_bytes(tape)
    back = read_slp(tmp_path / "rollback.slp")
    assert len(back) == 20
    for name in WRITTEN:
        same(back[name], game[name], name)
    without = straight[:11] + struct.pack(">i", length - 312) + straight[15:start + 312 * 5] + straight[start + 312 * 6:]
    (tmp_path / "hole.slp").write_bytes(without)
    with pytest.raises(ReplayError, match="holes") as caught:
        read_slp(tmp_path / "hole.slp")
    assert caught.value.reason == "frame_numbers"


def test_damaged_values_are_refused(tmp_path):
    game = random_game(2, 20, WRITTEN, 0, (0, 1))
    data = bytearray(write_slp(game, tmp_path / "whole.slp").read_bytes())
    at = 15 + 2 + 3 * 7 + 702 + 13 + PRE_FRAME.fields["shoulder"][1]
    struct.pack_into(">f", data, at, 3.8e22)
    (tmp_path / "damaged.slp").write_bytes(data)
    with pytest.raises(ReplayError, match="shoulder, frame -123, player 0") as caught:
        read_slp(tmp_path / "damaged.slp")
    assert caught.value.reason == "damaged"
    broken = replace(game, columns=game.columns | {"percent": np.full((20, 2), np.nan, np.float32)})
    with pytest.raises(UserError, match="percent"):
        write_slp(broken, tmp_path / "never.slp")
    assert not (tmp_path / "never.slp").exists()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**31), flips=st.sampled_from([1, 2, 5, 40]), where=st.sampled_from([(0, 60), (0, 900), (0, None), (-250, None)]), cut=st.booleans())
def test_mutated_replays_never_crash(tmp_path_factory, seed, flips, where, cut):
    path = tmp_path_factory.getbasetemp() / "mutated.slp"
    data = bytearray(write_slp(random_game(7, 40, WRITTEN, 20, (0, 1)), path, provenance="synthetic").read_bytes())
    rng = np.random.default_rng(seed)
    places = np.arange(len(data))[slice(*where)]
    for place, value in zip(rng.choice(places, flips), rng.integers(0, 256, flips)):
        data[place] = value
    path.write_bytes(data[:rng.integers(0, len(data))] if cut else data)
    try:
        read_slp(path)
    except ReplayError as error:
        assert error.reason and "\n" not in str(error)


# slippi-js: what the players' own programs read

PRE_JS = {"main_x": "joystickX", "main_y": "joystickY", "c_x": "cStickX", "c_y": "cStickY", "shoulder": "trigger", "buttons": "buttons", "buttons_physical": "physicalButtons",
          "trigger_left": "physicalLTrigger", "trigger_right": "physicalRTrigger", "raw_main_x": "rawJoystickX"}
POST_JS = {"character": "internalCharacterId", "action_state": "actionStateId", "x": "positionX", "y": "positionY", "percent": "percent", "shield": "shieldSize",
           "last_attack_landed": "lastAttackLanded", "combo_count": "currentComboCount", "last_hit_by": "lastHitBy", "stocks": "stocksRemaining", "state_age": "actionStateCounter",
           "ground": "lastGroundId", "jumps_left": "jumpsRemaining", "l_cancel": "lCancelStatus", "hurtbox_state": "hurtboxCollisionState", "hitlag": "hitlagRemaining",
           "speed_air_x": "selfInducedSpeeds.airX", "speed_y": "selfInducedSpeeds.y", "speed_ground_x": "selfInducedSpeeds.groundX", "knockback_x": "selfInducedSpeeds.attackX",
           "knockback_y": "selfInducedSpeeds.attackY", "animation_index": "animationIndex"}
ITEM_JS = {"type": "typeId", "state": "state", "facing": "facingDirection", "velocity_x": "velocityX", "velocity_y": "velocityY", "x": "positionX", "y": "positionY",
           "damage": "damageTaken", "timer": "expirationTimer", "id": "spawnId", "owner": "owner"}


def slippi_js(path: Path) -> dict:
    "What slippi-js reads from a replay."
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    if not (JS / "node_modules").is_dir():
        pytest.skip("slippi-js is not installed: npm install --prefix tests/slippi_js")
    return json.loads(subprocess.run(["node", "read.js", str(path)], cwd=JS, check=True, capture_output=True, timeout=120).stdout)


def equals_slippi_js(game: Game, path: Path):
    js = slippi_js(path)
    assert js["numbers"] == game.frame_numbers.tolist() and js["complete"]
    assert js["settings"]["slpVersion"] == "3.13.0" and js["settings"]["stageId"] == game.stage
    assert [p["playerIndex"] for p in js["settings"]["players"]] == list(game.ports)
    assert [p["characterId"] for p in js["settings"]["players"]] == list(game.characters)
    assert not any(p[key] for p in js["settings"]["players"] for key in ("nametag", "displayName", "connectCode", "userId"))
    for player, theirs in enumerate(js["players"]):
        for part, names in (("pre", PRE_JS), ("post", POST_JS)):
            for ours, name in names.items():
                if ours in game:
                    same(np.array(theirs[part][name], float), game[ours][:, player].astype(float), f"{ours} of player {player}")
        if "facing" in game:
            same(np.array(theirs["post"]["facingDirection"]) > 0, game["facing"][:, player], "facing")
        if "on_ground" in game:
            same(~np.array(theirs["post"]["isAirborne"], bool), game["on_ground"][:, player], "on_ground")
    for ours, name in ITEM_JS.items():
        if game.items and ours in game.items and len(game.items["frame"]):
            same(np.array(js["items"][name], float), game.items[ours].astype(float), f"item {ours}")
    return js


def test_slippi_js_reads_a_real_game_written_by_us(replays, tmp_path):
    game = read_slp(sorted((replays / "quick").glob("*.slp"))[0])
    js = equals_slippi_js(game, write_slp(game, tmp_path / "real.slp"))
    winner = game.ports[game.info["placements"].index(0)]
    assert js["end"]["gameEndMethod"] == 2 and js["winners"][0]["playerIndex"] == winner
    assert js["stats"]["stocks"] > 4 and min(js["stats"]["inputs"]) > 100


def test_slippi_js_reads_a_practice_match(practice_slp):
    game = read_slp(practice_slp)
    js = equals_slippi_js(game, practice_slp)
    assert "synthetic" in js["metadata"]["melee_wm"]


def test_slippi_js_reads_a_rollout(practice_slp, tmp_path):
    "A dreamt match is a replay like any other: peppi-py and slippi-js read the same frames, positions, actions, stocks and inputs."
    from melee_wm.config import load_config
    from melee_wm.export import rollout, to_game, write_rollout
    from melee_wm.mamba2 import build_model
    dream = rollout(build_model(load_config("toy")), read_slp(practice_slp), start=0, frames=120, seed_game="practice")
    path = write_rollout(dream, tmp_path / "dream.slp")
    again, dreamt = read_slp(path), to_game(dream)
    for name in ("x", "y", "action_state", "stocks", "percent", "main_x", "buttons"):
        assert np.array_equal(again[name], dreamt[name]), name
    js = equals_slippi_js(again, path)
    assert "synthetic" in js["metadata"]["melee_wm"].lower()


def test_slippi_js_reads_a_sparse_game(tmp_path):
    "Two positions and nothing else: the neutral values are a valid replay to others."
    game = random_game(3, 200, ["character", "percent"], 10, (1, 3))
    js = equals_slippi_js(game, write_slp(game, tmp_path / "sparse.slp", provenance="synthetic"))
    assert set(js["players"][0]["post"]["stocksRemaining"]) == {4} and js["end"]["gameEndMethod"] == 7
    assert js["metadata"]["melee_wm_neutral"]["stocks"] == 1 and js["stats"]["lastFrame"] == 76
