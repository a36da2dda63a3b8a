"""The environments: the libraries' own checks, the vectorised one against single ones, seeds, and the line one reads without the libraries."""
import subprocess
import sys
import warnings
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from pettingzoo.test import parallel_api_test, parallel_seed_test
from melee_wm.checkpoint import load_model
from melee_wm.config import load_config
from melee_wm.core import UserError
from melee_wm.environment import Hall, MeleeEnv, MeleeParallel, MeleeVector, Reward, environment_rate
from melee_wm.fields import CONTROLS
from melee_wm.mamba2 import build_model
from melee_wm.match import Random, controller_of
from melee_wm.world import World


@pytest.fixture(scope="module")
def model():
    return load_model("default")


def random():
    return Random(torch.Generator().manual_seed(0))


def test_pettingzoo(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallel_api_test(MeleeParallel(model, max_frames=40), num_cycles=60)
    parallel_seed_test(lambda: MeleeParallel(model, max_frames=40), num_cycles=30)


def test_gymnasium(model):
    check_env(MeleeEnv(model, opponent=random()), skip_render_check=True)
    check_env(MeleeEnv(model, opponent=controller_of("policy", seed=0), side=1), skip_render_check=True)
    check_env(MeleeEnv(World(model, sample=1., generator=torch.Generator())), skip_render_check=True)      # a seed also fixes a world that samples


def test_a_vector_is_many_environments(model):
    "Beside Gymnasium's own vector of single environments: the same spaces, frames, rewards and autoreset, step for step."
    how = dict(stages=(31,), characters=((2, 20),), max_frames=15)
    ours, theirs = MeleeVector(3, model, **how), SyncVectorEnv([lambda: MeleeEnv(model, **how)] * 3)
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert ours.single_observation_space == theirs.single_observation_space and ours.observation_space == theirs.observation_space
    assert ours.single_action_space == theirs.single_action_space and ours.action_space == theirs.action_space
    ours.action_space.seed(0)
    hands = ours.action_space.sample()
    for step, (mine, other) in enumerate([(ours.reset(seed=0), theirs.reset(seed=0))] + [(None, None)] * 36):
        if mine is None:
            hands = ours.action_space.sample() if step % 5 == 0 else hands
            mine, other = ours.step(hands), theirs.step(hands)
            for a, b in zip(mine[1:4], other[1:4]):
                np.testing.assert_allclose(a, b, atol=1e-4)
                assert a.dtype == b.dtype and a.shape == b.shape
        for name in ("numbers", "ids"):
            np.testing.assert_allclose(mine[0][name], other[0][name], atol=1e-3)
            assert mine[0][name].dtype == other[0][name].dtype
        assert ours.observation_space.contains(mine[0])
        assert set(mine[-1]) == set(other[-1])
        np.testing.assert_allclose(mine[-1]["percent"], other[-1]["percent"], atol=1e-3)


def test_rows_end_one_by_one(model):
    "Matches that are over at different times begin anew alone, and their neighbours do not notice."
    env = RecordEpisodeStatistics(MeleeVector(4, model, opponent=random(), stages=(32,), max_frames=30))
    env.reset(seed=1)
    hall = env.unwrapped.hall
    hall.played += torch.tensor([0, 5, 10, 15])
    ends = []
    for step in range(40):
        before = hall.played.clone()
        seen, reward, over, late, info = env.step(np.zeros((4, len(CONTROLS)), np.float32))
        anew = torch.tensor(ends[-1]) if ends else torch.zeros(4, dtype=torch.bool)
        assert torch.equal(hall.played, torch.where(anew, 0, before + 1)) and (reward[anew.numpy()] == 0).all()
        assert env.observation_space.contains(seen) and hall.tape.length <= len(hall.tape.values)
        ends.append(late.tolist())
    assert [[t for t, row in enumerate(ends) if row[i]] for i in range(4)] == [[29], [24], [19], [14]]


def test_seeds(model):
    def run(seed):
        env = MeleeVector(3, World(model, sample=1., generator=torch.Generator()), opponent=random())
        env.reset(seed=seed)
        env.action_space.seed(0)
        return [env.step(env.action_space.sample())[0]["numbers"] for _ in range(12)]
    first, again, other = run(7), run(7), run(8)
    assert all(np.array_equal(a, b) for a, b in zip(first, again)) and not np.array_equal(first[-1], other[-1])


def test_the_sides_mirror_each_other(model):
    env = MeleeParallel(model, stages=(31,))
    seen, _ = env.reset(seed=0)
    half = env.hall.world.layout.floats_per_player
    for _ in range(5):
        seen, rewards, *_ = env.step({a: env.action_space(a).sample() for a in env.agents})
    a, b = seen["player_0"]["numbers"], seen["player_1"]["numbers"]
    assert np.array_equal(a[:half], b[half:]) and np.array_equal(a[half:], b[:half]) and sum(rewards.values()) == pytest.approx(0)
    with pytest.raises(UserError, match="reset"):
        MeleeParallel(model).step({})


def test_rewards():
    before, after = {"percent": torch.tensor([[10., 90.]]), "stocks": torch.tensor([[4., 2.]])}, {"percent": torch.tensor([[15., 0.]]), "stocks": torch.tensor([[4., 1.]])}
    assert Reward().of(before, after)[0].tolist() == pytest.approx([1 - .05, .05 - 1])
    assert Reward(dealt=1, taken=0, stock=0).of(before, after)[0].tolist() == pytest.approx([0, 5])


def test_other_worlds():
    "A world that carries its memory works too; one that looks ahead is refused."
    torch.manual_seed(0)
    env = MeleeVector(2, World(build_model(load_config("mamba2-1a")), memory="state"), stages=(31,), max_frames=3)
    env.reset(seed=0)
    env.hall.played[1] += 1                      # so that one row begins anew while the other goes on
    ends = [env.step(env.action_space.sample())[3].tolist() for _ in range(6)]
    assert ends == [[False, False], [False, True], [True, False], [False, False], [False, False], [False, True]]
    assert env.observation_space.contains(env.hall.see(0))
    with pytest.raises(UserError, match="lookahead"):
        Hall(build_model(load_config("exp-3a-lookahead")), 1)


def test_without_the_libraries():
    code = "import sys; sys.modules['pettingzoo'] = None\nfrom melee_wm.core import UserError\ntry: import melee_wm.environment\nexcept UserError as error: print(error)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "melee_wm[environment]" in said and said.count("\n") == 1


def test_rate(model):
    assert environment_rate(64, 8, model) > 200      # what it is, the bench says
    assert gymnasium.spaces.flatdim(MeleeEnv(model).observation_space) > 1000
