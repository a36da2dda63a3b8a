"""Benchmarks: every figure beside its reference, from the command's JSON to the picture; on synthetic matches where there are no replays."""
import json, math
import numpy as np
import pytest
import torch
from melee_wm.bench import Result, Setup, bench_table, beside, draw_bench, run_bench, take_turns
from melee_wm.bench_data import loose_games
from melee_wm.bench_model import BENCHES, Case, case_results, frame_times, matmul_flops, mixer_results, seeded_world, threads
from melee_wm.config import load_config
from melee_wm.core import UserError, replays_dir
from melee_wm.mamba2 import build_model
from melee_wm.practice import write_practice

KEYS = {"name", "value", "unit", "reference", "ratio", "against", "limit", "spread", "note", "holds"}


@pytest.fixture(scope="module")
def report() -> dict:
    return run_bench(BENCHES, ["parse"], games=10, repeats=1)


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
    report = run_bench({"count": lambda setup: [Result("count", len(loose_games(setup)), "games", note=setup.kind)]}, ["count"], games=3)
    [result] = report["results"]
    assert (result["value"], result["note"], report["data"]) == (3, "synthetic practice matches", "synthetic practice matches")
    assert "synthetic practice matches" in bench_table(report) and result["holds"] is None


def test_a_benchmark_is_a_line_in_a_table(tmp_path):
    folders = []
    def mine(setup: Setup):
        folders.append(setup.folder); (setup.folder/"file").touch()
        return [beside("mine", "s", np.array([2.0, 2.0]), np.array([1.0, 1.0]), "nothing", "≤ 1.5")]
    report = run_bench({"mine": mine, "again": mine}, ["all"], replays=tmp_path)
    assert [r["ratio"] for r in report["results"]] == [2, 2] and not report["results"][0]["holds"] and "NOT KEPT" in bench_table(report)
    assert len(set(folders)) == 2 and not any(folder.exists() for folder in folders)
    with pytest.raises(UserError, match="unknown benchmark"): run_bench({"mine": mine}, ["mime"])


def test_only_sound_and_different_games_are_measured(tmp_path, replays):
    (tmp_path/"work").mkdir()
    paths = loose_games(Setup(tmp_path/"work", replays, games=30))
    assert len(paths) == 30 == len({p.read_bytes() for p in paths})
    (tmp_path/"bad").mkdir()
    with pytest.raises(UserError, match="no games to measure on"): loose_games(Setup(tmp_path/"bad", replays/"bad"))


def test_too_few_games_are_a_mistake_of_one_line(tmp_path):
    write_practice(tmp_path/"few", games=2)
    with pytest.raises(UserError, match="too few games"): run_bench(BENCHES, ["parse"], replays=tmp_path/"few", games=2, repeats=1)


def test_turns_and_limits():
    called = []
    seconds = take_turns({"a": lambda item: called.append(("a", item)), "b": lambda item: called.append(("b", item))}, [1, 2], repeats=3)
    assert seconds["a"].shape == (3, 2) and len(called) == 4*(1 + 3) and {c for c in called} == {(n, i) for n in "ab" for i in (1, 2)}
    assert len({tuple(called[i:i + 2]) for i in range(0, 16, 2)}) > 2, "the order changes"
    for ratio, limit, holds in ((5, "≤ 5", True), (5.1, "≤ 5", False), (1.7, "≥ 1.7", True), (1.6, "≥ 1.7", False)):
        assert Result("x", ratio, "s", 1, ratio, limit=limit).holds is holds


# ---------------------------------------------------------------- models

def test_the_forms_of_the_memory_are_measured_and_agree():
    report = run_bench(BENCHES, ["ssd"], repeats=1)
    by_name = {r["name"]: r for r in report["results"]}
    assert list(by_name) == ["ssd: chunks, float64", "ssd: steps, float64", "ssd: chunks, float32", "ssd: steps, float32", "ssd: training, chunks", "ssd: playing, step"]
    assert all(r["holds"] for name, r in by_name.items() if "float" in name)
    assert by_name["ssd: training, chunks"]["ratio"] > 1.2, "the promise is 2; what a busy machine may add is generous here"


def test_work_is_counted_from_shapes():
    "Projections of a model without heads' and encoder's extras, by hand: 3 x 2 x weights a frame; the state-space model's own products on top."
    model = build_model(load_config("mamba2-1a", ["model.chunk_size=64"]))
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in n)
    N, inner, C = 64, 512, 64
    memory = 2*(2*C*N + 2*C*inner + 2*2*N*inner)   # layers x (scores, within chunks, into and out of the state), each 2 a product
    assert matmul_flops(model, 2, 128, 128) == 2*128*3*(2*weights + memory)
    assert matmul_flops(model, 4, 128, 128) == 2*matmul_flops(model, 2, 128, 128)


def test_a_step_taken_apart(tmp_path):
    from melee_wm.bench_data import encoded_games
    setup = Setup(tmp_path, games=2, repeats=2)
    games, _ = encoded_games(setup, "mamba2-1a")
    for case in (Case("mamba2-1a", 16, 10), Case("mamba2-1a", 2, 64, 64), Case("mamba2-1a", 2, 64, 64, torch.bfloat16)):
        speed, share = case_results(case, games, setup, "≥ 0.5")
        assert speed.value > 0 and speed.unit == "examples/s" and share.against == "the best fp32 product" and 0 < share.ratio and share.limit == "≥ 0.5"
        assert all(part in speed.note for part in ("data", "forward", "backward", "optimiser", "frames/s", "most time: "))
    block = mixer_results(Case("mamba2-1a", 4, 10), 1)
    pytest.importorskip("transformers", reason="transformers, of the test extras, is not installed")
    assert block[0].value > 0 and "Hugging Face" in block[0].against


def test_worlds_are_timed_from_real_frames(tmp_path):
    setup, before = Setup(tmp_path, games=1), torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
        for memory, streams in (("state", 1), ("window", 3)):
            world, controls = seeded_world(setup, "mamba2-1a", streams, memory)
            assert controls.shape == (streams, 2, 13) and frame_times(world, controls, 3).shape == (3,) and world.state.frame["x"].shape == (streams, 2)
    assert torch.get_num_threads() == before
