"""Benchmarks: every figure beside its reference, from the command's JSON to the picture; on synthetic matches where there are no replays."""
import json, math
import numpy as np
import pytest
from melee_wm import bench
from melee_wm.bench import Result, Setup, bench_table, beside, draw_bench, loose_games, run_bench, take_turns
from melee_wm.core import UserError, replays_dir
from melee_wm.practice import write_practice

KEYS = {"name", "value", "unit", "reference", "ratio", "against", "limit", "spread", "note", "holds"}


@pytest.fixture(scope="module")
def report() -> dict:
    return run_bench(["parse"], games=10, repeats=1)


def test_the_report_of_parse(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report) == {"machine", "load", "torch", "threads", "data", "results"}
    assert report["data"] == ("real games" if replays_dir() else "synthetic practice matches")
    by_name = {r["name"]: r for r in report["results"]}
    assert list(by_name) == ["parse: one game", "parse: one worker", "parse: two workers", "parse: .zip, two workers", "parse: .7z, two workers"]
    for r in report["results"]:
        assert set(r) == KEYS and r["value"] > 0 and r["reference"] > 0 and r["against"]
        assert math.isclose(r["ratio"], r["value"]/r["reference"])
    assert by_name["parse: one game"]["limit"] == "≤ 5" and by_name["parse: two workers"]["limit"] == "≥ 1.7"
    assert 1 < by_name["parse: one game"]["ratio"] < 8, "the promise is 5; what a busy machine may add is generous here"
    assert by_name["parse: one worker"]["ratio"] < 1
    for r in report["results"]: assert r["name"] in bench_table(report) and r["against"] in bench_table(report)
    assert len([axis for axis in draw_bench(report).axes if axis.axison]) == 5


def test_without_real_replays_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MELEE_WM_REPLAYS", str(tmp_path/"nowhere"))
    monkeypatch.setitem(bench.BENCHES, "count", lambda setup: [Result("count", len(loose_games(setup)), "games", note=setup.kind)])
    report = run_bench(["count"], games=3)
    [result] = report["results"]
    assert (result["value"], result["note"], report["data"]) == (3, "synthetic practice matches", "synthetic practice matches")
    assert "synthetic practice matches" in bench_table(report) and result["holds"] is None


def test_a_benchmark_is_a_line_in_a_table(tmp_path, monkeypatch):
    folders = []
    def mine(setup: Setup):
        folders.append(setup.folder); (setup.folder/"file").touch()
        return [beside("mine", "s", np.array([2.0, 2.0]), np.array([1.0, 1.0]), "nothing", "≤ 1.5")]
    monkeypatch.setattr(bench, "BENCHES", {"mine": mine, "again": mine})
    report = run_bench(["all"], replays=tmp_path)
    assert [r["ratio"] for r in report["results"]] == [2, 2] and not report["results"][0]["holds"] and "NOT KEPT" in bench_table(report)
    assert len(set(folders)) == 2 and not any(folder.exists() for folder in folders)
    with pytest.raises(UserError, match="unknown benchmark"): run_bench(["mime"])


def test_only_sound_and_different_games_are_measured(tmp_path, replays):
    (tmp_path/"work").mkdir()
    paths = loose_games(Setup(tmp_path/"work", replays, games=30))
    assert len(paths) == 30 == len({p.read_bytes() for p in paths})
    (tmp_path/"bad").mkdir()
    with pytest.raises(UserError, match="no games to measure on"): loose_games(Setup(tmp_path/"bad", replays/"bad"))


def test_too_few_games_are_a_mistake_of_one_line(tmp_path):
    write_practice(tmp_path/"few", games=2)
    with pytest.raises(UserError, match="too few games"): run_bench(["parse"], replays=tmp_path/"few", games=2, repeats=1)


def test_turns_and_limits():
    called = []
    seconds = take_turns({"a": lambda item: called.append(("a", item)), "b": lambda item: called.append(("b", item))}, [1, 2], repeats=3)
    assert seconds["a"].shape == (3, 2) and len(called) == 4*(1 + 3) and {c for c in called} == {(n, i) for n in "ab" for i in (1, 2)}
    assert len({tuple(called[i:i + 2]) for i in range(0, 16, 2)}) > 2, "the order changes"
    for ratio, limit, holds in ((5, "≤ 5", True), (5.1, "≤ 5", False), (1.7, "≥ 1.7", True), (1.6, "≥ 1.7", False)):
        assert Result("x", ratio, "s", 1, ratio, limit=limit).holds is holds
