"""The world interface on every encoding and architecture: nothing freezes, streams do not mix, the past can be returned to."""
import numpy as np
import pytest
import torch
from torch import nn
from melee_wm.config import experiment_names, load_config
from melee_wm.core import UserError
from melee_wm.encoding import columns_of, encode
from melee_wm.fields import HEADS
from melee_wm.mamba2 import build_model
from melee_wm.melee import STAGES
from melee_wm.practice import practice_match
from melee_wm.world import World, replayed_controls, seed_windows

NAMES = [n for n in experiment_names() if n not in ("mamba2-large", "mamba2-medium-gpu", "mamba2-22k-ss", "mamba2-22k-noss")]   # the same code, only wider


@pytest.fixture(scope="module")
def game():
    return practice_match(3, frames=700)


class Restless(nn.Module):
    "A model whose every output is noise, so that whatever does not move in a rollout is frozen."

    def __init__(self, model):
        super().__init__()
        self.model, self.layout, self.context_len, self.config = model, model.layout, model.context_len, model.config

    def forward(self, frames, controls):
        generator = torch.Generator().manual_seed(int(frames.floats.double().abs().sum() * 1e4) % 2**31)
        noise = {n: torch.randn(v.shape, generator=generator) for n, v in self.model(frames, controls).items()}
        size = dict(continuous=1., velocity=.05, dynamics=.06)   # encoded units: far enough to cross a blast zone in half a second
        return {n: (v.abs() if n == "dynamics" else v) * size.get(n, 5) for n, v in noise.items()}


def small(name):
    torch.manual_seed(0)
    return build_model(load_config(name))


def seeded(world, game, starts):
    world.reset(seed_windows(columns_of(game, world.layout), starts, world.context_len), torch.tensor([game.stage]))
    return world


def pads(world, game, starts, frames):
    return replayed_controls(columns_of(game, world.layout), starts, frames + world.layout.encoding.lookahead)


@pytest.mark.parametrize("name", NAMES)
def test_no_predicted_field_is_frozen(name, game):
    world, starts = World(Restless(small(name)), memory="window"), np.arange(100, 600, 20)
    dream = seeded(world, game, starts).run(pads(world, game, starts, 30))
    assert set(dream) == {f.name for f in world.layout.fields}
    assert all(v.isfinite().all() for v in dream.values())
    moving = {n for n, v in dream.items() if (v[:, 1:] != v[:, :-1]).any()}
    frozen = set(world.roles["predicted"] + world.roles["ruled"]) - moving
    assert not frozen, f"{name}: {sorted(frozen)} never change in a rollout"
    carried = [n for n in world.roles["carried"] if n in dream]
    alive = (dream["action_state"] > 12).all(1)   # the rules reset even carried fields when a fighter dies
    assert alive.any()
    for n in carried:
        assert ((dream[n] == dream[n][:, :1]).all(1) | ~alive).all(), f"{n} is said to be carried"
    if "stocks" in dream:
        assert 0 <= dream["stocks"].min() and dream["stocks"].max() <= 4
    assert 0 <= dream["percent"].min() and dream["percent"].max() <= 999
    assert 0 <= dream["shield"].min() and dream["shield"].max() <= 60


@pytest.mark.parametrize("name", NAMES)
def test_streams_do_not_mix(name, game):
    world, starts = World(small(name)), np.array([100, 250, 431, 580])
    together = seeded(world, game, starts).run(pads(world, game, starts, 6))
    for i, start in enumerate(starts):
        alone = seeded(world, game, [start]).run(pads(world, game, [start], 6))
        for field in together:
            torch.testing.assert_close(together[field][i], alone[field][0], atol=1e-3, rtol=1e-4, msg=f"{name}: {field}")


@pytest.mark.parametrize("name", ["v1", "exp-1a2a-combined", "mamba2-1a"])
def test_the_window_equals_re_encoding(name, game):
    world, starts = World(Restless(small(name)), memory="window"), np.array([200, 300])
    K = world.context_len
    seed = seed_windows(columns_of(game, world.layout), starts, K)
    world.reset(seed, torch.tensor([game.stage]))
    dream = world.run(pads(world, game, starts, 7))
    history = {n: torch.cat([seed[n], dream[n].to(seed[n].dtype)], 1)[:, -K:] for n in dream}
    again = encode(history, torch.full((2, K), game.stage), world.layout)
    for kept, made in zip(world.state.window, again):
        torch.testing.assert_close(kept, made)


@pytest.mark.parametrize("memory", ["window", "state"])
def test_rewind_is_exact_and_leaves_the_saved_state_alone(memory, game):
    world, starts = World(small("mamba2-1a"), sample=1., generator=torch.Generator().manual_seed(5), memory=memory), np.array([200, 300])
    given = pads(world, game, starts, 12)
    saved = seeded(world, game, starts).state
    def tensors(state): return [*state.window, *state.frame.values(), *state.clock, state.random, *(t for layer in state.memory or () for t in layer)]
    before = [t.clone() for t in tensors(saved)]
    first = world.run(given)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(saved), strict=True) if not a.isnan().any())
    world.state = saved
    middle = [world.step(given[:, i]) for i in range(5)]
    branch = world.state
    rest = world.run(given[:, 5:])
    world.state = branch
    again = world.run(given[:, 5:])
    for n in first:
        assert torch.equal(first[n][:, 5:], rest[n]) and torch.equal(rest[n], again[n])
        assert torch.equal(first[n][:, 4], middle[4][n])


def test_carried_memory_is_the_whole_history(game):
    "memory='state' predicts what one forward pass over all frames since the seed predicts."
    model = small("mamba2-1a").eval()
    world, starts = World(model, memory="state"), np.array([150, 350])
    seed = seed_windows(columns_of(game, world.layout), starts, world.context_len)
    given = pads(world, game, starts, 15)
    world.reset(seed, torch.tensor([game.stage]))
    said, step = [], model.step
    model.step = lambda *inputs, **how: said.append(step(*inputs, **how)) or said[-1]
    dream = world.run(given)
    history = {n: torch.cat([seed[n], dream[n].to(seed[n].dtype)], 1) for n in dream}
    frames = encode(history, torch.full((2, world.context_len + 15), game.stage), world.layout)
    with torch.inference_mode():
        for i in (0, 7, 14):
            whole = model(frames.map(lambda t: t[:, :world.context_len + i]), given[:, i].flatten(1)[:, None])
            for name in whole:
                torch.testing.assert_close(said[i][0][name], whole[name], atol=1e-4, rtol=1e-4)


def test_a_ready_made_memory(game):
    "What `prefill` gives is what `reset` would have read: the same dream to the bit, from all the seed or from its last frame."
    model, starts = small("mamba2-1a").eval(), np.array([150, 350])
    with torch.no_grad():
        model.heads["continuous"].weight.normal_(0, .1)
    world, stage = World(model, memory="state"), torch.tensor([game.stage])
    seed, given = seed_windows(columns_of(game, world.layout), starts, 40), pads(world, game, starts, 15)
    world.reset(seed, stage)
    expected = world.run(given)
    with torch.inference_mode():
        memory = model.prefill(encode({n: v[:, :-1] for n, v in seed.items()}, torch.full((2, 39), game.stage), world.layout))
    for part in (seed, {n: v[:, -1:] for n, v in seed.items()}):
        world.reset(part, stage, memory=memory)
        dream = world.run(given)
        assert all(torch.equal(dream[n], expected[n]) for n in expected)
    world.reset({n: v[:, -1:] for n, v in seed.items()}, stage, memory=model.init_state(2))
    assert not torch.equal(world.run(given)["x"], expected["x"])                     # who remembers nothing dreams something else
    with pytest.raises(UserError, match="a memory that nobody reads"):
        World(model).reset(seed, stage, memory=memory)
    with pytest.raises(UserError, match="too few seed frames"):
        world.reset({n: v[:, -1:] for n, v in seed.items()}, stage)


@pytest.mark.parametrize("memory", ["window", "state"])
def test_a_step_never_waits_for_a_device(memory, game):
    "On a device without values nothing can be looked at, so a step that works there can be queued or captured on a graphics card."
    world, starts = World(small("mamba2-1a"), memory=memory, device="meta"), np.array([150, 350])
    seeded(world, game, starts)
    frame = world.step(pads(world, game, starts, 1)[:, 0])
    assert all(v.is_meta and v.shape == (2, 2) for v in frame.values())


def test_untaught_heads_are_not_listened_to(game):
    model, starts = Restless(small("exp-1a-state-age-embed")), np.arange(100, 600, 20)
    model.missing_heads = ["l_cancel", "velocity", "dynamics"]
    world = World(model)
    dream = seeded(world, game, starts).run(pads(world, game, starts, 20))
    alive = (dream["action_state"] > 12).all(1)
    for head in model.missing_heads:
        for field in HEADS[head].fields:
            assert field in world.roles["carried"] + world.roles["ruled"] and field not in world.roles["predicted"]
            if field not in ("stocks", "hitlag"):   # rules take the one and count down the other
                assert (((dream[field] - dream[field][:, :1]).abs() < 1e-4).all(1) | ~alive).all(), field


def test_controls_matter_where_they_should(game):
    "A conditioned model reacts in the same frame; one without sees the controls in the frame after."
    starts = np.array([200])
    for name, same_frame in (("baseline-v22", True), ("v2.1", False)):
        model = small(name)
        with torch.no_grad():
            model.heads["continuous"].weight.normal_(0, .1)
        world = World(model)
        given = pads(world, game, starts, 2)
        other = given.clone()
        other[:, 0, 0, 0] += .7
        a, b = seeded(world, game, starts).run(given), seeded(world, game, starts).run(other)
        assert torch.equal(a["x"][:, 0], b["x"][:, 0]) != same_frame
        assert not torch.equal(a["x"][:, 1], b["x"][:, 1])


def test_dropout_is_off_and_the_device_is_the_models(game):
    model = small("baseline-v22").train()
    world = World(model, device="cpu")
    assert not model.training and world.device.type == "cpu"
    a, b = (seeded(world, game, [200]).run(pads(world, game, [200], 3)) for _ in range(2))
    assert all(torch.equal(a[n], b[n]) for n in a) and not any(v.requires_grad for v in a.values())


def test_mistakes_are_answered(game):
    model = small("exp-3a-lookahead")
    world = World(model)
    with pytest.raises(UserError, match="call reset"):
        world.step(torch.zeros(1, 2, 13))
    with pytest.raises(UserError, match="next_controls"):
        seeded(world, game, [200]).step(torch.zeros(1, 2, 13))
    with pytest.raises(UserError, match="generator"):
        World(model, sample=1.)
    with pytest.raises(UserError, match="no memory to carry"):
        World(model, memory="state")
    with pytest.raises(UserError, match="too early"):
        seed_windows(columns_of(game, world.layout), [3], 10)
    with pytest.raises(UserError, match="too few seed frames"):
        world.reset(seed_windows(columns_of(game, world.layout), [30], 4), torch.tensor([31]))


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_match_starts_from_nothing(stage):
    "Constructed starting frames are a seed for every encoding, on the ground where the stage is."
    from melee_wm.physics import lint
    from melee_wm.world import spawn_frames
    frames = spawn_frames(stage, (2, 20), 30)
    report = lint({n: v for n, v in frames.items() if not n.startswith("item")}, stage)
    assert not any(report.broken.values()) and (report.checked["stands_on_something"] or stage in (2, 3)), report   # 2 and 3: what moves may be anywhere
    for name in ("v1", "baseline-v22", "ego", "projectiles"):
        world = World(build_model(load_config(name)))
        layout, K = world.layout, world.context_len
        world.reset({n: torch.from_numpy(v)[None] for n, v in frames.items()}, torch.tensor([stage]))
        assert all(v.isfinite().all() for v in world.step(torch.zeros(1, 2, 13)).values())
