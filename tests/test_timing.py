"""Estimates: the team's example from its inputs, facts against what the trainer really does, probes that are measured once, prices and limits."""
import json

import pytest
import torch

from melee_wm import timing
from melee_wm.batches import batch_count, window_count
from melee_wm.build import build
from melee_wm.config import load_config
from melee_wm.core import UserError
from melee_wm.experiment import choose_games
from melee_wm.mamba2 import parameter_count
from melee_wm.practice import write_practice
from melee_wm.shards import encode_dataset, shards_info
from melee_wm.step import step_count
from melee_wm.timing import (Calibration, StepTime, data_facts, dollars, estimate, fit_calibration, hardware, pessimistic_text, policy_estimate, probe, recommended_epochs,
                             reference_time, step_time, team_table)

SMALL = ["model.hidden=[32, 32]", "training.batch_size=256"]
TEAM_RUN = ["training.epochs=3", "training.log_interval=1000", "training.scheduled_sampling={}"]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timing-dataset")
    write_practice(folder / "slp", games=4, seed=0)
    build([folder / "slp"], folder / "data", progress=False)
    return folder / "data"


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MELEE_WM_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_the_teams_example_from_its_inputs():
    config, hw = load_config("mamba2-medium-gpu", TEAM_RUN), hardware("A100-40GB")
    assert parameter_count(config) == 4_282_386 == team_table()["reference"]["parameters"]
    facts = data_facts("22k", config)
    assert facts[:6] == ("22k", 22_000, 206_754_081, 74_400_000_000, 185_648_963, 20_885_118) and not facts.measured and facts.fingerprint is None
    e = estimate(config, facts, hw, step_time(config, hw), fit_calibration())
    assert e.batches == 181_297 and e.batch_seconds == .06 and e.how == "reference: A100-40GB, 4.3M parameters, K=10, batch 1,024"
    assert (round(e.epoch_hours, 1), round(e.hours, 1), dollars(e.cost)) == (3.0, 9.1, "$25")
    assert e.timeout_seconds == 86_400 and e.timeout_capped and round(e.timeout_margin, 1) == 2.6 and round(e.uncapped_timeout_hours, 1) == 27.3
    assert round(e.log_seconds) == 60 and e.logs_per_epoch == 181 and round(e.load_seconds) == 164
    assert tuple(map(round, e.pessimistic_hours)) == (27, 45) and pessimistic_text(e) == "27–45 h, $75–125"
    assert e.timeout_seconds < 3600 * e.pessimistic_hours[0]      # what the card must flag


def test_stand_ins():
    config = load_config("mamba2-medium-gpu")
    assert data_facts("2K", config)[:4] == ("2k", 2_000, 18_000_000, 6_600_000_000)
    facts = data_facts("5000", config)
    assert facts.name == "5000 games" and facts.frames == 5_000 * 9_400 and facts.train_examples == round(.9 * (facts.frames - 50_000))
    limited = data_facts("22k", load_config("mamba2-1a"))                       # the experiment takes 2,000 games
    assert limited.games == 2_000 and 18_000_000 < limited.frames < 19_000_000
    sequences = load_config("mamba2-sequences", ["data.max_games=null"])
    assert data_facts("5000", sequences).train_examples == round(.9 * 5_000 * 9_400)     # every frame
    for wrong in ("0", "22kk", "nowhere/at/all", "-3"):
        with pytest.raises(UserError, match="number of games"): data_facts(wrong, config)


@pytest.mark.parametrize("name, overrides", [("toy", SMALL), ("exp-3a-1a-lookahead", SMALL), ("toy", [*SMALL, "training.self_forcing={}"]), ("toy", [*SMALL, "data.max_games=2"])])
def test_facts_are_what_the_trainer_finds(dataset, tmp_path, name, overrides):
    config = load_config(name, overrides)
    facts, chosen = data_facts(dataset, config), choose_games(config, dataset, progress=False)
    assert facts.measured and facts.synthetic and facts.games == len(chosen.train) + len(chosen.val) and facts.frames == chosen.train.frames + chosen.val.frames
    batches = estimate(config, facts, hardware("CPU"), StepTime(1., "")).batches
    assert batches in (step_count(chosen.train, config), step_count(chosen.train, config) - 1)     # the trainer's last batch may be a smaller one
    assert facts.bytes == sum((dataset / "games" / m).stat().st_size for m in (*chosen.train.md5s, *chosen.val.md5s))


def test_facts_of_shards_held_out_games_and_policies(dataset, tmp_path):
    config = load_config("toy", SMALL)
    encode_dataset(dataset, config, tmp_path / "shards", progress=False)
    parsed, shards = data_facts(dataset, config), data_facts(tmp_path / "shards", config)
    assert shards.name == "shards" and shards.bytes == shards_info(tmp_path / "shards")["bytes"]
    assert parsed._replace(name="", bytes=0) == shards._replace(name="", bytes=0)
    md5 = sorted(p.name for p in (dataset / "games").iterdir())[0]
    (tmp_path / "never.txt").write_text(md5)
    held = data_facts(dataset, load_config("toy", [*SMALL, f"data.holdout={tmp_path/'never.txt'}"]))
    assert held.games == parsed.games - 1 and held.fingerprint != parsed.fingerprint
    fighter = load_config("fighter", ["training.batch_size=64"])
    facts, games = data_facts(dataset, fighter), choose_games(fighter, dataset, progress=False).train
    assert facts.train_examples == window_count(games, 16) and abs(estimate(fighter, facts, hardware("CPU"), StepTime(1., "")).batches - batch_count(games, 16, 64)) <= 1
    (tmp_path / "never.txt").write_text("\n".join(p.name for p in (dataset / "games").iterdir()))
    with pytest.raises(UserError, match="no game is left"): data_facts(dataset, load_config("toy", [f"data.holdout={tmp_path/'never.txt'}"]))


def test_hardware_has_prices_limits_and_a_name():
    a100 = hardware("A100-40GB")
    assert (a100.price, a100.paid, a100.limit_hours, a100.reference, a100.device) == (2.78, True, 24, .06, "cuda")
    assert hardware("T4").reference > a100.reference > hardware("H100").reference and "bandwidth" in hardware("H100").source
    assert (hardware("M3 Max").reference, hardware("CPU").reference, hardware("M3 Max").paid) == (.4, 7, False)
    local = hardware()
    assert local.name == "local" and local.price == 0 and not local.paid and local.limit_hours is None and local.reference
    with pytest.raises(UserError, match="local, T4, L4, A10G, L40S, A100-40GB, A100-80GB, H100, M3 Max, CPU"): hardware("A100")


@pytest.mark.parametrize("said, known", [("NVIDIA A100-SXM4-40GB", "A100-40GB"), ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA L40S", "L40S"), ("Tesla T4", "T4"), ("NVIDIA GeForce RTX 4090", "M3 Max")])
def test_a_graphics_card_at_home_is_known_by_its_name(monkeypatch, said, known):
    monkeypatch.setattr(timing, "choose_device", lambda name: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: said)
    assert hardware("local").reference == hardware(known).reference


def test_a_probe_is_measured_once_and_kept(dataset, runs):
    config, hw = load_config("toy", SMALL), hardware("local")._replace(device="cpu")
    assert step_time(config, hw, dataset).how.startswith("reference") and not (runs / "timings.json").exists()     # measuring has to be asked for
    found = step_time(config, hw, dataset, measure=True)
    assert found.how.startswith("measured here") and 0 < found.seconds < 1
    assert step_time(config, hw) == found == step_time(config, hw, dataset, measure=True)                          # from the file, the second time
    other = load_config("toy", [*SMALL, "model.hidden=[64, 64]"])
    assert step_time(other, hw).how.startswith("reference") and step_time(config, hardware("A100-40GB")).how.startswith("reference")
    again = probe(other, dataset, "cpu", .2)
    kept = json.loads((runs / "timings.json").read_text())
    assert len(kept) == 1 and sorted(v["seconds"] for v in next(iter(kept.values())).values()) == sorted([found.seconds, again.seconds])
    assert step_time(config, hw, "22k", measure=True) == found
    with pytest.raises(UserError): probe(config, dataset / "nothing", "cpu", .1)


@pytest.mark.parametrize("name, overrides", [("mamba2-sequences", ["model.d_model=32", "model.headdim=32", "model.n_layers=1", "training.batch_size=4", "data.max_games=null"]),
                                             ("fighter-mamba2", ["model.d_model=32", "model.headdim=32", "model.n_layers=1", "training.batch_size=16"])])
def test_every_kind_of_training_can_be_probed(dataset, name, overrides):
    assert probe(load_config(name, overrides), dataset, "cpu", .1).seconds < 2


def test_the_reference_scales_with_the_work():
    def seconds(name="mamba2-medium-gpu", *overrides, hw="A100-40GB"): return reference_time(load_config(name, list(overrides)), hardware(hw)).seconds
    assert seconds("mamba2-medium-gpu", "model.context_len=60") == pytest.approx(.36) and seconds("mamba2-medium-gpu", "training.batch_size=2048") == pytest.approx(.12)
    assert seconds("mamba2-medium-gpu", "training.sequence_len=100", "training.batch_size=1024") == pytest.approx(.6)
    assert seconds("baseline-v22") == team_table()["least_seconds"] and "scaled by the work" in reference_time(load_config("baseline-v22"), hardware("CPU")).how
    assert seconds("fighter", "training.batch_size=512", hw="CPU") == pytest.approx(.15)     # both players: 1,024 examples
    with pytest.raises(UserError, match="no recorded speed"): reference_time(load_config("toy"), hardware("M3 Pro"))


def test_limits_and_budgets():
    config, a100 = load_config("mamba2-medium-gpu", ["training.epochs=1"]), hardware("A100-40GB")
    small = estimate(config, data_facts("100", config), a100, StepTime(.06, ""))
    assert small.timeout_seconds == 4 * 3600 and not small.timeout_capped and small.timeout_margin > 2          # at least four hours
    long = estimate(load_config("mamba2-medium-gpu"), data_facts("22k", config), hardware("local"), StepTime(.4, ""))
    assert long.timeout_seconds > 86_400 and not long.timeout_capped and long.cost == 0                          # nobody ends a run at home
    timed = load_config("mamba2-medium-gpu", ["training.minutes=30"])
    e = estimate(timed, data_facts("22k", timed), a100, StepTime(.06, ""))
    assert e.hours == .5 and e.pessimistic_hours == (.5, .5) and e.cost == pytest.approx(1.39)                   # it ends by the clock
    tiny = estimate(load_config("toy"), data_facts("1", load_config("toy", ["training.batch_size=100000"])), a100, StepTime(1., ""))
    assert tiny.batches >= 1


def test_policies():
    p = policy_estimate(22_000, "M3 Pro", 512, 8)
    assert f"{p.frames/1e6:.1f} {p.train_examples/1e6:.1f}" == "206.8 186.1" and p.recommended == (5, 8)
    assert round(p.estimate.load_seconds / 60) == 15 and p.estimate.batch_seconds == .02 and p.estimate.batches == 363_515
    assert round(policy_estimate(22_000, "CPU").estimate.load_seconds / 60) == 25 and policy_estimate(22_000, "CPU", 1024).estimate.batch_seconds == pytest.approx(.15)
    assert policy_estimate(22_000, "M3 Pro", step=StepTime(1., "measured")).estimate.how == "measured" and policy_estimate(300, "M3 Pro").estimate.epochs == 50
    assert [recommended_epochs(n) for n in (1, 999, 1_000, 4_999, 5_000, 100_000)] == [(25, 50)] * 2 + [(10, 15)] * 2 + [(5, 8)] * 2
    assert policy_estimate(22_000, "A100-40GB", 512, 8).estimate.cost > 0


def test_calibration_is_the_teams_until_runs_say_otherwise():
    def run(ratio, **more): return {"status": "finished", "estimate": {"hours": 2.}, "hours": 2 * ratio, "config": {"training": {"minutes": None}}} | more
    assert fit_calibration() == Calibration(3, 5, 0) == fit_calibration([run(9, status="killed"), run(9, estimate=None), run(9, hours=None), run(9, hours=.01), run(9, config={"training": {"minutes": 3.}})])
    exact = [fit_calibration([run(1.)] * n) for n in (1, 5, 100)]
    assert exact[0].high < 5 and exact[0].high > exact[1].high > exact[2].high > 1 and exact[2].low == 1 and exact[2].runs == 100
    worse = fit_calibration([run(8.)] * 20)
    assert 5 < worse.low < 8 < worse.high < 10
