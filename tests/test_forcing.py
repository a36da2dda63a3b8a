"""Noise and own predictions in the context: what may change and what never does, against rollouts, in every encoding and on real matches."""
import pytest
import torch

from melee_wm.batches import from_games, gather, window_starts
from melee_wm.config import ScheduledSampling, load_config
from melee_wm.core import quick_replays
from melee_wm.encoding import controls_of, decode, encode, layout_of
from melee_wm.evaluate import teacher_forced
from melee_wm.fields import BUTTONS, CONTROLS
from melee_wm.forcing import _play_on, _read, add_context_noise, corrupt, own_context, self_forced_loss
from melee_wm.losses import loss
from melee_wm.mamba2 import build_model
from melee_wm.metrics import batch_metrics, summarise
from melee_wm.rules import start_clock
from melee_wm.practice import practice_match
from melee_wm.slp import read_slp
from melee_wm.world import World

SMALL_MAMBA = ["model.d_model=32", "model.headdim=16", "model.d_state=8", "model.context_len=8", "model.dropout=0.2"]
SMALL_MLP = ["model.hidden=[24, 16]", "model.context_len=8", "model.dropout=0.2"]
ENCODINGS = ["v1", "v2", "baseline-v22", "exp-1a2a-combined", "exp-3a-1a2a-lookahead", "projectiles", "mamba2-1a"]


@pytest.fixture(autouse=True)
def own_randomness():
    "Seeds and thread counts of one test are its own."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def matches():
    return [practice_match(seed, frames=900) for seed in range(2)]


def small(name, *more):
    config = load_config(name)
    return load_config(name, [*(SMALL_MAMBA if config.model.arch == "mamba2" else SMALL_MLP), *more])


def games_for(config, matches):
    return from_games([(str(i), match) for i, match in enumerate(matches)], layout_of(config.encoding))


def stirred(model):
    "The model with all heads moved from zero, so that it predicts something."
    with torch.no_grad():
        for p in model.heads.parameters():
            p.add_(.01*torch.randn_like(p))
    return model


@pytest.mark.parametrize("positions", [1, 64])
@pytest.mark.parametrize("name", ENCODINGS)
def test_noise_touches_only_what_it_may(name, positions, matches):
    config = small(name)
    layout, games = layout_of(config.encoding), games_for(config, matches)
    T = 8 if positions == 1 else 64
    batch = gather(games, window_starts(games, T)[::9], T, positions)
    given = [t.clone() for t in (*batch.frames, batch.controls, *batch.target)]
    places = {"x", "y"}
    speeds = {"speed_air_x", "speed_y", "speed_ground_x", "knockback_x", "knockback_y"} & set(layout.float_fields)
    sampling = ScheduledSampling(rate=.9, anneal_epochs=0)
    for may, noisy in ((places | speeds | {"shield"}, corrupt(batch, layout, sampling, 0)), (places | speeds, add_context_noise(batch, layout, .1))):
        changed = {f for f, different in zip(layout.float_fields, (noisy.frames.floats != batch.frames.floats).flatten(0, 2).any(0).tolist()) if different}
        assert changed == may
        assert not changed & {"percent", "stocks", "hitlag", "combo_count", "state_age", *CONTROLS, *BUTTONS}
        assert torch.equal(noisy.frames.ints, batch.frames.ints) and torch.equal(noisy.frames.stage, batch.frames.stage)
        assert torch.equal(noisy.controls, batch.controls) and torch.equal(noisy.target.ints, batch.target.ints)
        moved = {f for f, different in zip(layout.float_fields, (noisy.target.floats != batch.target.floats).flatten(0, 2).any(0).tolist()) if different}
        assert moved == (set() if "shield" in may else places)
    assert all(torch.equal(a, b) for a, b in zip(given, (*batch.frames, batch.controls, *batch.target))), "the batch itself was written to"


def test_noise_is_drawn_from_the_generator_that_is_given(matches):
    config = small("mamba2-1a")
    layout, games = layout_of(config.encoding), games_for(config, matches)
    batch = gather(games, window_starts(games, 8)[::9], 8)

    def noisy(seed):
        generator = torch.Generator().manual_seed(seed)
        return add_context_noise(corrupt(batch, layout, ScheduledSampling(), 9, generator), layout, .05, generator).frames.floats
    before = torch.get_rng_state()
    assert torch.equal(noisy(1), noisy(1)) and not torch.equal(noisy(1), noisy(2))
    assert torch.equal(torch.get_rng_state(), before)
    first = corrupt(batch, layout, ScheduledSampling(), 9).frames.floats
    torch.set_rng_state(before)
    assert torch.equal(first, corrupt(batch, layout, ScheduledSampling(), 9).frames.floats)


@pytest.mark.parametrize("name", ENCODINGS)
def test_own_frames_are_those_of_a_rollout(name, matches):
    config = small(name)
    layout, games, K, ahead = layout_of(config.encoding), games_for(config, matches), 8, layout_of(config.encoding).encoding.lookahead
    model = stirred(build_model(config)).train()
    batch = gather(games, window_starts(games, K + 3)[::37], K + 3)
    own = own_context(model, batch, 3)
    assert model.training and not own.frames.floats.requires_grad
    assert torch.equal(own_context(model, batch, 3).frames.floats, own.frames.floats), "dropout was on"
    world = World(model)
    world.reset({n: v[:, :K] for n, v in decode(batch.frames, layout).items()}, batch.frames.stage[:, 0])
    controls = torch.cat([controls_of(batch.frames, layout)[:, K:], controls_of(batch.target, layout)], 1)[:, :3 + ahead]
    dream = encode(world.run(controls), batch.frames.stage[:, K:], layout)
    same = torch.isclose(dream.floats, own.frames.floats[:, -3:], atol=1e-5).flatten(1).all(1) & (dream.ints == own.frames.ints[:, -3:]).flatten(1).all(1)
    assert same.float().mean() > .9       # the others hold a frame that was given up
    fewer = own_context(model, batch, 2)  # the window ends before the same target
    assert torch.equal(fewer.target.floats, batch.target.floats) and torch.equal(fewer.frames.floats[:, 0], batch.frames.floats[:, 3])
    assert torch.equal(fewer.frames.floats[:, :-2], batch.frames.floats[:, 3:-2])


@pytest.mark.parametrize("name", ["mamba2-1a", "projectiles"])
def test_played_frames_are_those_of_a_rollout_by_memory(name, matches):
    config = load_config("mamba2-1a", SMALL_MAMBA) if name == "mamba2-1a" else load_config("mamba2-1a", [*SMALL_MAMBA, "encoding.projectiles=2", "encoding.lookahead=1", "encoding.press_events=true", "model.heads=[core, kinematics, combat, projectiles]"])
    layout, games, spacing, steps = layout_of(config.encoding), games_for(config, matches), 16, 3
    model = stirred(build_model(config)).eval()
    batch = gather(games, window_starts(games, 64)[::211], 64, 64)
    B = len(batch.controls)
    with torch.no_grad():
        hidden, after = _read(model, batch, model.init_state(B), spacing)
        _, played = _play_on(model, batch, model.predict(hidden, batch.controls), after[:3], steps, spacing)
        known, agree = decode(batch.frames, layout), []
        for place in range(3):
            end = (place + 1)*spacing
            world = World(model, memory="state")
            world.reset({n: v[:, :end] for n, v in known.items()}, batch.frames.stage[:, 0], start_clock({n: v[:, end - spacing:end] for n, v in known.items()}))
            dream = encode(world.run(controls_of(batch.target, layout)[:, end - 1:end - 1 + steps + layout.encoding.lookahead]), batch.frames.stage[:, :steps], layout)
            ours = played.frames.map(lambda t: t[place::3])
            agree.append(torch.isclose(dream.floats, ours.floats, atol=1e-4).flatten(1).all(1) & (dream.ints == ours.ints).flatten(1).all(1))
            assert torch.equal(played.target.floats[place::3], batch.target.floats[:, end:end + steps])
            assert torch.equal(played.controls[place::3], batch.controls[:, end:end + steps])
    assert torch.cat(agree).float().mean() > .9


def test_a_fault_of_its_own_is_pulled_back_in_sequences(matches):
    config = small("mamba2-1a", "model.integrate_positions=false", "model.dropout=0")
    games = games_for(config, matches)
    batch = gather(games, window_starts(games, 64)[::211], 64, 64)
    pulls = []
    for weight in (0, 1e6):   # without and with little else than played frames
        torch.manual_seed(0)
        model = build_model(config)
        bias = model.heads["continuous"].bias
        with torch.no_grad():
            bias[1] = .01     # whatever it says of x of player 0, 0.2 units more
        self_forced_loss(model, batch, model.init_state(len(batch.controls)), 2, 8, weight)[0].backward()
        pulls.append(bias.grad[1].item()/(2*.01/8))
    assert pulls[1] > pulls[0] + 1   # the played frames stand one and two faults off: 1.5 more on average


@pytest.mark.parametrize("sequences", [False, True])
def test_single_precision_weights_keep_their_gradients_under_autocast(sequences, matches):
    config = small("mamba2-1a", "model.dropout=0")
    games, model = games_for(config, matches), stirred(build_model(config))
    with torch.autocast("cpu", torch.bfloat16):
        if sequences:
            batch = gather(games, window_starts(games, 64)[::211], 64, 64)
            total = self_forced_loss(model, batch, model.init_state(len(batch.controls)), 3, 16)[0]
        else:
            batch = own_context(model, gather(games, window_starts(games, 11)[::37], 11), 3)
            total = loss(model(batch.frames, batch.controls), batch, config, model.layout)[0]
    total.backward()
    assert total.dtype == torch.float32
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("T", [2, 5, 33])
def test_stretches_of_any_length(T, matches):
    config = small("mamba2-1a", "model.dropout=0")
    games, model = games_for(config, matches), build_model(config)
    batch = gather(games, window_starts(games, T)[::211], T, T)
    state = model.init_state(len(batch.controls))
    total, heads, prediction, after = self_forced_loss(model, batch, state, 3)
    hidden, leaving = model.trunk(batch.frames, state, need_state=True)
    assert total.isfinite() and prediction["action"].shape[:2] == batch.target.stage.shape
    assert torch.allclose(after[-1].ssm, leaving[-1].ssm, atol=1e-5)
    weights = config.training.loss_weights
    assert torch.allclose(total, sum(getattr(weights, n)*v for n, v in heads.items()), atol=1e-4)


def test_two_hot_numbers_go_everywhere_numbers_go(matches):
    config = small("baseline-v22", "model.two_hot=[percent, x, speed_y, hitlag]", "training.unimix=0.01", "training.action_change_weight=5")
    games, model = games_for(config, matches), build_model(config)
    batch = own_context(model, gather(games, window_starts(games, 11)[::37], 11), 3)
    prediction = model(batch.frames, batch.controls)
    total, heads = loss(prediction, batch, config, model.layout)
    total.backward()
    assert all(p.grad.norm() > 0 for p in model.heads.parameters())
    with torch.no_grad():
        assert summarise(batch_metrics(prediction, batch, config, model.layout))["position_mae"] < 20
    assert teacher_forced(model, [("0", matches[0])], torch.device("cpu"), max_windows=50, progress=False)["loss"]["total"] > 0
    world = World(model)
    known = decode(batch.frames, model.layout)
    world.reset(known, batch.frames.stage[:, 0])
    assert all(v.isfinite().all() for v in world.run(controls_of(batch.target, model.layout)).values())


def test_on_real_matches(replays):
    config = small("baseline-v22", "model.dropout=0")
    games = games_for(config, [read_slp(p) for p in quick_replays()[:3]])
    layout, model, K = layout_of(config.encoding), build_model(config).eval(), 8
    batch = gather(games, window_starts(games, K + 3)[::5], K + 3)
    own = own_context(model, batch, 3)   # untrained: everybody flies on
    off = (decode(own.frames, layout)["x"] - decode(batch.frames, layout)["x"][:, 3:]).abs()
    assert not off[:, :-3].any() and off.max() <= 20.001
    assert 0 < off[:, -3].mean() < off[:, -2].mean() < off[:, -1].mean()
    alive = [decode(f, layout)["action_state"] > 10 for f in (own.frames, batch.frames.map(lambda t: t[:, 3:]))]
    assert torch.equal(*alive)
