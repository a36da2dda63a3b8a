"""Several processes train one model: real ranks under torchrun give what one process gives; too little memory is one line."""
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from terminal import torchrun

from melee_wm.batches import from_games, gather, window_starts
from melee_wm.checkpoint import content_hash
from melee_wm.config import load_config
from melee_wm.devices import Team, add_up_over, agree, average_gradients, broadcast_weights, everyone, join_rows, join_team, leave, memory_advice, of_main, out_of_memory, share_of
from melee_wm.encoding import layout_of
from melee_wm.losses import loss
from melee_wm.mamba2 import build_model

SIZES = (16, 16, 7, 1)   # of the batches, over and over: the second rank of two gets 3 of 7 and 0 of 1


def learn(team: Team, steps: int = 12) -> dict:
    "Train a small network on random games with the functions of the chapter; what every rank knows at the end."
    from made_up import made_up_game
    config = load_config("toy", ["model.hidden=[16, 16]", "model.dropout=0", "model.context_len=4"])
    layout = layout_of(config.encoding)
    games = from_games([(str(seed), made_up_game(seed)) for seed in range(2)], layout)
    torch.manual_seed(7 + team.rank)   # ranks begin differently, and are made equal
    model = build_model(config)
    broadcast_weights(model, team)
    optimizer = torch.optim.AdamW(model.parameters(), lr=.02)
    order = window_starts(games, 4)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    curve = []
    for step in range(steps):
        rows = order[:sum(SIZES)].split(SIZES)[step % len(SIZES)]
        mine, sums = share_of(rows, team), {}
        optimizer.zero_grad()
        if len(mine):
            batch = gather(games, mine, 4)
            total, _ = loss(model(batch.frames, batch.controls), batch, config, layout)
            total.backward()
            sums["loss"] = (total.item() * len(mine), len(mine))
        average_gradients(model, team, len(mine) / len(rows))
        optimizer.step()
        whole = add_up_over(team, sums)["loss"]
        assert whole[1] == len(rows)
        curve.append(whole[0] / whole[1])
        if agree(team, team.rank == team.size - 1 and step == steps - 3): break   # only the last rank wants to
    return {"curve": curve, "weights": everyone(team, content_hash(model.state_dict())), "told": of_main(team, {"rank": team.rank, "third": 1 / 3}), "none": [n for n, p in model.named_parameters() if p.grad is None]}


def odd_rows(team: Team) -> list:
    "Five rows with a negative zero, a NaN and an infinity, joined from the shares of all."
    rows = torch.tensor([[-0., 1.], [math.nan, 2.], [math.inf, -1e-42], [3., 4.], [5., 6.]])
    return join_rows(team, share_of(rows, team).clone(), 5).view(torch.int32).tolist()


def partly_used(team: Team) -> list:
    "Gradients where only one rank used a layer, and nobody another."
    net = torch.nn.ModuleList([torch.nn.Linear(2, 1, bias=False) for _ in range(3)])
    broadcast_weights(net, team)
    (net[0].weight.sum() + (0 if team.rank else 2 * net[1].weight.sum())).backward()
    average_gradients(net, team, 1 / team.size)
    return [None if layer.weight.grad is None else layer.weight.grad.tolist() for layer in net]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("ranks") / "out.json"
    done = torchrun(2, __file__, out)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_two_ranks_learn_what_one_does(two_ranks):
    alone = learn(Team())
    assert len(two_ranks["curve"]) == len(alone["curve"]) == 10
    assert two_ranks["curve"] == pytest.approx(alone["curve"], rel=1e-5)
    assert alone["curve"][8] < .9 * alone["curve"][0]   # it did learn
    assert two_ranks["none"] == alone["none"]


def test_ranks_stay_equal_and_agree(two_ranks):
    assert len(two_ranks["weights"]) == 2 and len(set(two_ranks["weights"])) == 1
    assert two_ranks["told"] == {"rank": 0, "third": 1 / 3}


def test_rows_are_joined_to_the_bit(two_ranks):
    assert two_ranks["rows"] == odd_rows(Team())


def test_gradients_of_layers_that_not_everybody_used(two_ranks):
    assert two_ranks["partly"] == [[[1., 1.]], [[1., 1.]], None]   # half of one rank's 2


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_everything_once(size):
    for count in (0, 1, 5, 64):
        rows = torch.arange(count)
        parts = [share_of(rows, Team(rank, size)) for rank in range(size)]
        assert torch.equal(torch.cat(parts).sort()[0], rows) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_without_torchrun_nothing_is_set_up(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"): monkeypatch.delenv(name, raising=False)
    with join_team("cpu") as team:
        assert team == Team() and team.is_main and not torch.distributed.is_initialized()
        assert everyone(team, {"a": 1}) == [{"a": 1}] and agree(team, False) is False


LITTLE_MEMORY = """
from melee_wm.devices import out_of_memory, memory_advice
from melee_wm.config import load_config
from melee_wm.mamba2 import build_model
from melee_wm.heads import random_frames
import resource, sys, torch
config = load_config("mamba2-1a", ["training.batch_size=4096", "model.context_len=60"])
model = build_model(config)
frames, controls = random_frames(model.layout, 4096, 60), torch.zeros(4096, 1, model.layout.control_dim)
used = int(open("/proc/self/statm").read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200*2**20,)*2)
try: model(frames, controls)
except Exception as error:
    assert out_of_memory(error), error
    print(type(error).__name__, memory_advice(error, config, (40, "runs/x")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on the address space")
def test_a_real_allocation_that_fails():
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(RuntimeError|MemoryError) out of memory \(mamba2-1a\): .*accumulate \(now 1.*recompute=true.*batch_size \(now 4096\).*context_len \(now 60\).*chunk_size \(now 10\); the checkpoint of step 40 is safe: runs/x\n", done.stdout)


def test_other_errors_are_not_taken_for_it():
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(28, "No space left on device"), ValueError("out of memory"), KeyError("memory")):
        assert not out_of_memory(error)
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory"), RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), OSError(12, "Cannot allocate memory")):
        assert out_of_memory(error)
    advice = str(memory_advice(MemoryError(), load_config("toy")))
    assert "recompute" not in advice and "chunk_size" not in advice and "no checkpoint was written yet" in advice


if __name__ == "__main__":
    with join_team("cpu") as team: result = learn(team)
    with join_team("cpu") as team:   # they meet again
        result |= {"rows": odd_rows(team), "partly": partly_used(team)}
        if team.is_main: Path(sys.argv[1]).write_text(json.dumps(result))
    leave(team)
