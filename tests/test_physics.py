"""The physics linter on real matches, on nonsense, on rollouts, and from the terminal."""
import csv
import hashlib
import json
import time
from dataclasses import replace

import numpy as np
import pytest

from melee_wm.archives import replays_in
from melee_wm.constants import NUMBERS, load_tables
from melee_wm.export import Rollout, write_rollout
from melee_wm.frame import FIRST_FRAME
from melee_wm.melee import ACTION_OF
from melee_wm.laws import HARD, RULES
from melee_wm.motion import load_motion
from melee_wm.physics import first_hard_break, lint, relearn, total
from melee_wm.practice import practice_match, write_practice
from melee_wm.slp import read_slp, write_slp
from terminal import melee_wm


@pytest.fixture(scope="module")
def match():
    return practice_match(0)


@pytest.fixture(scope="module")
def bracket(replays, tmp_path_factory):
    "The first 20 games of bracket.7z by MD5."
    rows = csv.DictReader(open(replays / "inventory.csv"))
    wanted = set(sorted(r["md5"] for r in rows if r["archive"] == "bracket.7z")[:20])
    file, games = tmp_path_factory.mktemp("bracket") / "game.slp", []
    for found in replays_in(replays / "bracket.7z"):
        if hashlib.md5(found.data).hexdigest() in wanted:
            file.write_bytes(found.data)
            games.append(read_slp(file))
    assert len(games) == 20
    return games


def test_real_matches_reproduce_the_floors(bracket):
    report, floors = total(lint(game) for game in bracket), load_tables().floors
    assert not report.skipped and report.frames == 170_972
    assert set(floors) == set(RULES)
    assert all(report.checked[name] >= 100 for name in RULES), "every rule must have applied"
    assert {n: k for n, k in report.broken.items() if k and n in HARD} == {}
    for name in ("knockback_decay", "free_fall", "hitlag_counts_down", "shield_regrows", "shield_drains", "hangs_at_the_ledge", "stands_on_something"):
        assert report.rates[name] == 0, name
    for name, rate in report.rates.items():
        assert rate <= 2*floors[name] + .02, f"{name}: {rate:.3f} against a floor of {floors[name]:.3f}"


def test_no_hard_break_in_real_streams(bracket):
    pieces = [{n: v[:3600] for n, v in g.columns.items()} for g in bracket if len(g) >= 3600]
    streams = {n: np.stack([p[n] for p in pieces]) for n in pieces[0]}
    stages = np.array([g.stage for g in bracket if len(g) >= 3600])
    assert (first_hard_break(streams, stages) == 3600).all()


def test_fast_enough(bracket):
    "At least 200,000 frames per second on one core, over whole matches in memory."
    best = np.inf
    for _ in range(5):
        began = time.process_time()
        for game in bracket:
            lint(game)
        best = min(best, time.process_time() - began)
    assert sum(map(len, bracket))/best >= 200_000


def test_nonsense_breaks_every_rule(bracket):
    "Each column shuffled on its own, over all 20 matches: no rule may stay silent."
    rng, reports = np.random.default_rng(0), []
    for game in bracket:
        columns = {n: rng.permutation(v) for n, v in game.columns.items()}
        columns["percent"] = columns["percent"] - 1
        columns["shield"] = columns["shield"] + 1
        columns["x"][10] = np.nan
        columns["action_state"][100:200], columns["hitlag"][100:200] = ACTION_OF["Escape"], 0   # a dodge without end
        columns["state_age"][100:200] = np.arange(100)[:, None]
        reports.append(lint(columns, game.stage))
    report = total(reports)
    assert {n for n in RULES if not report.broken[n]} == set()


@pytest.mark.parametrize("column, value, rule", [("percent", -1, "percent_range"), ("shield", 90, "shield_range"), ("y", np.inf, "all_finite"), ("stocks", 9, "stocks_fall_by_death"), ("x", 1e4, "no_teleport")])
def test_streams_and_matches_agree(match, column, value, rule):
    "The first hard break of many streams is what `lint` says of each."
    rows = [100, 700, 1100]
    streams = {n: np.stack([v[:1200].astype(np.float64)]*(len(rows) + 1)) for n, v in match.columns.items()}
    for i, row in enumerate(rows):
        streams[column][i, row, i % 2] = value
    assert first_hard_break(streams, match.stage).tolist() == [*rows, 1200]
    for i, row in enumerate(rows):
        report = lint({n: v[i] for n, v in streams.items()}, match.stage)
        assert {"rule": rule, "frame": row + FIRST_FRAME, "player": i % 2} in [{k: f[k] for k in ("rule", "frame", "player")} for f in report.first]


def test_float_columns_of_a_rollout_count_alike(match):
    "The same frames as a model's float32 fields, without what no layout has: same verdicts."
    names = (*NUMBERS, "action_state", "character", "stocks", "jumps_left", "on_ground", "hurtbox_state")
    as_floats = lint({n: match.columns[n].astype(np.float32) for n in names}, match.stage)
    assert as_floats == lint(match)


def test_unknown_ids_are_no_crash(match):
    columns = {n: v[:300].copy() for n, v in match.columns.items()}
    columns["action_state"][50:60], columns["character"][70:80] = 555, 32
    assert lint(columns, match.stage).broken["known_transition"] > 0


def test_terminal_names_the_frame(tmp_path, match):
    columns = {n: v.copy() for n, v in match.columns.items()}
    columns["percent"][900:, 1] = 0   # player 1 is healed
    assert match["percent"][899, 1] > 0 and match["action_state"][900, 1] > 13
    path = write_slp(replace(match, columns=columns), tmp_path / "healed.slp", "a test") or tmp_path / "healed.slp"
    result = json.loads(melee_wm("lint", path, "--json").stdout)
    assert result["file"] == str(path) and result["frames"] == len(match)
    assert set(result["violations_per_1000"]) == set(RULES) == set(result["floor_per_1000"])
    first = next(f for f in result["first"] if f["rule"] == "percent_never_falls")
    assert (first["frame"], first["player"], first["got"]) == (900 + FIRST_FRAME, 1, 0)
    text = melee_wm("lint", path)
    assert text.returncode == 0 and f"frame {900 + FIRST_FRAME}, player 1: percent_never_falls" in text.stdout and "real floor" in text.stdout


def test_carried_columns_are_not_asked_about(tmp_path, match):
    "What a model does not predict stays as the seed had it in its file; the linter says that it skipped these rules."
    columns = {n: v[:200] for n, v in match.columns.items()}
    columns["knockback_x"] = np.ones_like(columns["knockback_x"])
    players = tuple(dict(character=c, port=p) for c, p in zip(match.characters, match.ports))
    dream = Rollout(dict(model="made up", seed_frame=0, seed_game=None, carried=["knockback_x"]), match.stage, players, match.frame_numbers[:200], columns)
    result = json.loads(melee_wm("lint", write_rollout(dream, tmp_path / "dream.json"), "--json").stdout)
    assert result["skipped"] == {n: "no column knockback_x" for n in ("knockback_decay", "x_follows_speed", "y_follows_speed")}
    assert not set(result["skipped"]) & set(result["violations_per_1000"])


def test_folders_archives_and_mistakes(tmp_path, match):
    write_practice(tmp_path / "slp", games=2, seed=0, frames=600)
    (tmp_path / "slp" / "broken.slp").write_bytes(b"not a replay")
    done = melee_wm("lint", tmp_path / "slp", "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 2
    assert done.stderr.count("\n") == 1 and "broken.slp" in done.stderr
    assert "2 files" in melee_wm("lint", tmp_path / "slp").stdout
    one = sorted((tmp_path / "slp").glob("[!b]*.slp"))[0]
    (tmp_path / "one.txt").write_text(hashlib.md5(one.read_bytes()).hexdigest())
    assert json.loads(melee_wm("lint", tmp_path / "slp", "--games", tmp_path / "one.txt", "--json").stdout)["file"] == str(one)
    (tmp_path / "none.txt").write_text("0"*32)
    for words, says in ((["lint", tmp_path / "slp" / "broken.slp"], "broken.slp"), (["lint", tmp_path / "no-such.slp"], "no-such.slp"),
                        (["lint", tmp_path / "slp", "--games", tmp_path / "none.txt"], "nothing to lint"), (["lint", tmp_path / "no.json"], "no.json")):
        done = melee_wm(*words)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_tables_are_learned_anew(tmp_path):
    "From a parsed dataset, without the games held out, into a file of its own; the package's own stays."
    from melee_wm.build import build
    from melee_wm.dataset import read_meta
    write_practice(tmp_path / "slp", games=6, seed=0, frames=1500)
    build([tmp_path / "slp"], tmp_path / "data", progress=False)
    (tmp_path / "held.txt").write_text(read_meta(tmp_path / "data")[0]["slp_md5"])
    before = load_tables().origin
    report = relearn(tmp_path / "data", tmp_path / "held.txt", tmp_path)
    learned, motion = load_tables(tmp_path / "physics.safetensors"), load_motion(path=tmp_path / "motion.safetensors")
    assert motion.origin["games"] == 5 and motion.origin["held_out"] == 1
    assert report.frames == 5*1500 and learned.origin["games"] == 5 and learned.origin["held_out"] == 1
    assert learned.floors == {n: round(r, 4) for n, r in report.rates.items()} and learned.floors["percent_never_falls"] == 0
    assert load_tables().origin == before


def test_the_shipped_tables_never_saw_the_held_out_games(replays):
    from melee_wm.parsed import fingerprint
    held = set((replays / "heldout.txt").read_text().split())
    training = {r["md5"] for r in csv.DictReader(open(replays / "inventory.csv"))} - held
    assert load_motion().origin["held_out"] == len(held) and load_motion().origin["games"] <= len(training)
    origin = load_tables().origin
    assert origin["held_out"] == len(held) and origin["games"] <= len(training)
    assert origin["games"] != len(training) or origin["fingerprint"] == fingerprint(training)
