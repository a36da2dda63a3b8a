"""What crosses the model chapters: the SSD's forms against each other and against another implementation, playing against reading,
the recorded parameter counts, and weights that do and do not fit."""
import subprocess, sys, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from melee_wm.config import Mamba2Config, experiment_names, load_config
from melee_wm.core import UserError
from melee_wm.fields import HEADS
from melee_wm.heads import random_frames
from melee_wm.mamba2 import Mamba2Block, build_model, load_weights, parameter_count
from melee_wm.ssd import ssd_chunked, ssd_sequential, ssd_step

SMALL = ["model.d_model=32", "model.headdim=16", "model.d_state=8"]


@pytest.fixture(autouse=True)
def own_randomness():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def ssd_inputs(batch, T, H, P, N, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    def normal(*shape): return torch.randn(*shape, generator=g, dtype=dtype)
    rate = -torch.empty(H, dtype=dtype).uniform_(1, 16, generator=g)
    return [normal(batch, T, H, P), torch.nn.functional.softplus(normal(batch, T, H) - 2), rate, normal(batch, T, N), normal(batch, T, N), normal(batch, H, P, N)]


def values_and_gradients(form, inputs, seed):
    leaves = [v.clone().requires_grad_() for v in inputs]
    y, state = form(*leaves)
    g = torch.Generator().manual_seed(seed)
    loss = sum((v*torch.randn(v.shape, generator=g, dtype=v.dtype)).sum() for v in (y, state))
    return [y, state, *torch.autograd.grad(loss, leaves)]


# ---------------------------------------------------------------- SSD

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 80), st.booleans(), st.integers(0, 10**6))
def test_chunked_equals_sequential(batch, T, H, P, N, chunk, with_state, seed):
    inputs = ssd_inputs(batch, T, H, P, N, seed)[:5 + with_state]
    want = values_and_gradients(ssd_sequential, inputs, seed)
    got = values_and_gradients(lambda *v: ssd_chunked(*v, chunk_size=chunk), inputs, seed)
    for a, b in zip(want, got): torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    # training on windows does not ask for the final state: the same outputs and gradients
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(want[0].shape, generator=g, dtype=torch.float64)
    grads = []
    for form in (ssd_sequential, lambda *v: ssd_chunked(*v, chunk_size=chunk, need_state=False)):
        leaves = [v.clone().requires_grad_() for v in inputs]
        grads.append(torch.autograd.grad((form(*leaves)[0]*weights).sum(), leaves))
    for a, b in zip(*grads): torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_step_equals_sequential_with_gradients():
    def stepped(x, dt, A, B, C, state):
        outputs = []
        for t in range(x.shape[1]):
            y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
            outputs.append(y)
        return torch.stack(outputs, 1), state
    inputs = ssd_inputs(2, 17, 3, 4, 5, 0)
    for chunk in (1, 5, 17, 99):
        for a, b in zip(values_and_gradients(stepped, inputs, 1), values_and_gradients(lambda *v: ssd_chunked(*v, chunk_size=chunk), inputs, 1)):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_against_the_formula():
    "The definition written out with sums, sharing no line with the library."
    x, dt, A, B, C, _ = ssd_inputs(1, 9, 2, 3, 4, 3)
    y = torch.zeros_like(x)
    for t in range(9):
        for s in range(t + 1):
            for h in range(2):
                fade = torch.exp(A[h]*dt[0, s + 1:t + 1, h].sum())
                y[0, t, h] += (C[0, t] @ B[0, s])*fade*dt[0, s, h]*x[0, s, h]
    for form in (ssd_sequential, lambda *v: ssd_chunked(*v, chunk_size=4)): torch.testing.assert_close(form(x, dt, A, B, C)[0], y)


@pytest.mark.parametrize("scale", [1e-3, 1., 30.])
def test_single_precision_stays_finite(scale):
    exact = ssd_inputs(2, 300, 3, 4, 5, 0)
    exact[1] = exact[1]*scale
    want = values_and_gradients(ssd_sequential, exact, 0)
    for chunk in (10, 64, 300):
        got = values_and_gradients(lambda *v: ssd_chunked(*v, chunk_size=chunk), [v.float() for v in exact], 0)
        for a, b in zip(want[:2], got[:2]): assert (b - a).abs().max() <= 1e-4*a.abs().max().clamp(min=1)
        assert all(v.isfinite().all() for v in got)


# ---------------------------------------------------------------- the block, against Hugging Face's

@pytest.fixture(scope="module")
def other_block():
    "Another implementation of the mixer (Hugging Face transformers, its plain torch path), width 256."
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason="transformers, of the test extras, is not installed")
    from transformers import Mamba2Config as OtherConfig
    config = OtherConfig(hidden_size=256, state_size=64, head_dim=64, num_heads=8, expand=2, conv_kernel=4, n_groups=1, chunk_size=32,
                         use_bias=False, use_conv_bias=True, layer_norm_epsilon=1e-5, num_hidden_layers=1)
    return modeling.Mamba2Mixer(config, layer_idx=0)


@pytest.mark.parametrize("T, chunk", [(10, 10), (32, 10), (50, 64), (75, 16)])
def test_block_equals_hugging_face(other_block, T, chunk):
    block = Mamba2Block(Mamba2Config(d_model=256, chunk_size=chunk))
    with torch.no_grad():
        for name in ("D", "norm.weight", "conv1d.bias"): block.get_parameter(name).normal_(1, .3)
        block.dt_bias.add_(3)   # time steps large enough for the memory to matter
    other_block.load_state_dict(block.state_dict())   # the same names and shapes
    u = torch.randn(3, T, 256, requires_grad=True)
    weights = torch.randn(3, T, 256)
    results = []
    for mixer in (lambda v: block(v)[0], other_block):
        out = mixer(u)
        results.append([out, *torch.autograd.grad((out*weights).sum(), u)])
    assert results[0][0].abs().max() > .1
    for ours, theirs in zip(*results): assert (ours - theirs).abs().max() <= 1e-4*theirs.abs().max().clamp(min=1)
    for name in ("dt_bias", "A_log", "in_proj.weight", "norm.weight", "D"):
        ours, = torch.autograd.grad((block(u)[0]*weights).sum(), block.get_parameter(name))
        theirs, = torch.autograd.grad((other_block(u)*weights).sum(), other_block.get_parameter(name))
        assert (ours - theirs).abs().max() <= 1e-4*theirs.abs().max().clamp(min=1), name


# ---------------------------------------------------------------- whole models

def batch_for(model, B=2, T=None, positions=1, seed=0):
    return random_frames(model.layout, B, T or model.context_len, seed=seed), torch.randn(B, positions, model.layout.control_dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("overrides", [[], ["encoding.press_events=true", "encoding.lookahead=1"], ["encoding.input_conditioned=false"],
                                       ["encoding.fields=v1", "encoding.state_age_as_embed=false", "model.heads=[core]"], ["model.n_layers=1", "model.d_conv=2"], ["model.chunk_size=7"]])
def test_prefill_then_step_equals_forward(overrides):
    model = build_model(load_config("mamba2-1a", SMALL + overrides)).eval()
    frames, controls = batch_for(model, 3, 29, 29)
    with torch.no_grad():
        for head in model.heads.values(): torch.nn.init.normal_(head.weight)   # heads of numbers start at zero and would agree too easily
        want = model(frames, controls)
        for prefilled in (0, 1, 2, 14, 28):
            state = model.prefill(frames.map(lambda t: t[:, :prefilled])) if prefilled else model.init_state(3)
            for t in range(prefilled, 29):
                got, state = model.step(frames.map(lambda f: f[:, t]), controls[:, t], state)
                for head in want: torch.testing.assert_close(got[head], want[head][:, t:t + 1], rtol=1e-4, atol=1e-4)


def test_only_the_last_positions_cost_nothing_in_truth():
    model = build_model(load_config("mamba2-1a", SMALL)).eval()
    frames, controls = batch_for(model, 2, 25, 25)
    everywhere = model(frames, controls)
    for positions in (1, 4, 25):
        some = model(frames, controls[:, -positions:])
        for head in some: torch.testing.assert_close(some[head], everywhere[head][:, -positions:], rtol=1e-4, atol=1e-5)


def test_the_state_is_a_snapshot():
    model = build_model(load_config("mamba2-1a", SMALL)).eval()
    frames, controls = batch_for(model, 1, 12, 12)
    with torch.no_grad():
        state = model.prefill(frames.map(lambda t: t[:, :11]))
        first, _ = model.step(frames.map(lambda t: t[:, 11]), controls[:, 11], state)
        again, after = model.step(frames.map(lambda t: t[:, 11]), controls[:, 11], state)
        last, written = model.step(frames.map(lambda t: t[:, 11]), controls[:, 11], state, reuse=True)
    for head in first: assert torch.equal(first[head], again[head]) and torch.equal(first[head], last[head])
    assert all(new.ssm.data_ptr() == old.ssm.data_ptr() and torch.equal(new.ssm, other.ssm) for new, old, other in zip(written, state, after))   # written over, to the same bits


@pytest.mark.parametrize("name", ["baseline-v22", "v1", "mamba2-1a"])
def test_every_parameter_learns(name):
    model = build_model(load_config(name, ["model.dropout=0"]))
    frames, controls = batch_for(model, 16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = sum((p - 1).square().mean() for p in model(frames, controls).values())
        optimiser.zero_grad(); loss.backward(); optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < .8*losses[0]
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead, dead


def test_a_fresh_model_changes_nothing():
    for name in ("baseline-v22", "mamba2-1a"):
        model = build_model(load_config(name)).eval()
        prediction = model(*batch_for(model))
        for head, p in prediction.items(): assert p.any() != (HEADS[head].target in ("delta", "absolute")), head


def test_the_state_entered_is_never_written_to():
    inputs = ssd_inputs(3, 1, 2, 4, 5, 0, torch.float32)
    x, dt, A, B, C, state = inputs
    kept = state.clone()
    _, after = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)
    assert torch.equal(state, kept) and after.data_ptr() != state.data_ptr()


def test_the_direct_path_of_the_chunks():
    *inputs, state = ssd_inputs(2, 23, 3, 4, 5, 0)
    D = torch.randn(3, dtype=torch.float64)
    def added(x, dt, A, B, C, state, D): return ssd_sequential(x, dt, A, B, C, state)[0] + D[:, None]*x, ssd_sequential(x, dt, A, B, C, state)[1]
    want = values_and_gradients(added, [*inputs, state, D], 0)
    for chunk in (5, 23):
        got = values_and_gradients(lambda *v: ssd_chunked(*v[:6], chunk_size=chunk, D=v[6]), [*inputs, state, D], 0)
        for a, b in zip(want, got): torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_recomputed_layers_give_the_same_gradients():
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_model(load_config("mamba2-1a", SMALL + ["model.dropout=0.5", f"training.recompute={str(recompute).lower()}"])).train()
        frames, controls = batch_for(model, 2, 40, 40)
        state = model.prefill(frames)
        torch.manual_seed(1)
        hidden, after = model.trunk(frames, state, need_state=True)
        loss = sum(p.square().mean() for p in model.predict(hidden, controls).values()) + sum(s.ssm.square().mean() for s in after)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t): model.trunk(frames, state)
        loss.backward()
        results.append((loss, sum(kept), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, kept, grads), (again, kept_again, grads_again) = results
    assert torch.equal(loss, again) and grads.keys() == grads_again.keys() and kept_again < kept/3
    for name in grads: torch.testing.assert_close(grads_again[name], grads[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("T, positions", [(10, 1), (80, 80)])
def test_bfloat16_stays_near_single_precision(T, positions):
    model = build_model(load_config("mamba2-1a", ["model.chunk_size=32", "model.dropout=0"]))
    frames, controls = batch_for(model, 4, T, positions)
    with torch.no_grad(): state = model.prefill(batch_for(model, 4, 30, seed=1)[0])
    results = []
    for rough in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=rough):
            hidden, after = model.trunk(frames, state, last=positions, need_state=True)
            loss = sum(p.float().square().mean() for p in model.predict(hidden, controls).values())
            stepped, last = model.step(frames.map(lambda t: t[:, 0]), controls[:, 0], state)
        model.zero_grad(); loss.backward()
        assert all(t.dtype == torch.float32 for s in (*after, *last) for t in s) and hidden.dtype == torch.float32
        results.append([loss, hidden, stepped["action"].float(), *(t for s in (*after, *last) for t in s), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])])
    for exact, rough in zip(*results): assert (rough - exact).norm() < .04*exact.norm()


def test_time_and_memory_stay_in_single_precision():
    "Long sums of small steps and a state that grows over 500 frames: bfloat16 of either would be wrong in the first digit."
    x, dt, A, B, C, state = ssd_inputs(1, 500, 2, 4, 5, 0, torch.float32)
    dt, A = dt*.002, -torch.ones(2)
    half = [v.bfloat16() for v in (x, B, C)]
    want, end = ssd_sequential(half[0].float(), dt, A, half[1].float(), half[2].float(), state)
    got, got_end = ssd_chunked(half[0], dt, A, half[1], half[2], state, chunk_size=64)
    assert got.dtype == torch.bfloat16 and got_end.dtype == torch.float32
    assert (got_end - end).norm() < .004*end.norm() and (got.float() - want).norm() < .01*want.norm()


def test_half_precision_where_a_gpu_would_use_it():
    model = build_model(load_config("mamba2-1a", SMALL))
    frames, controls = batch_for(model, 4, 33, 33)
    with torch.autocast("cpu", torch.bfloat16): prediction = model(frames, controls)
    sum(p.float().square().mean() for p in prediction.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    exact = model.eval()(frames, controls)["action"]
    with torch.autocast("cpu", torch.bfloat16): rough = model(frames, controls)["action"]
    assert (rough - exact).abs().max() < .1*exact.abs().max()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is changed")
def test_memory_that_stays_is_not_taken_page_by_page_again():
    code = """
import melee_wm.core, resource, sys, torch
from melee_wm.mamba2 import keep_memory
if sys.argv[1] == "keep": assert keep_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
big = torch.zeros(12_500_000)
for _ in range(10): made = big + 1
before = faults()
for _ in range(10): made = big + 1
print(faults() - before)
"""
    taken = {how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout) for how in ("keep", "give")}
    assert taken["give"] > 1000 and taken["keep"] < taken["give"]/4


# ---------------------------------------------------------------- counts and weights

@pytest.mark.parametrize("name, count", [("v1", 931_422), ("v2", 1_116_138), ("v2.1", 1_290_870), ("baseline-v22", 1_360_722), ("exp-1a-state-age-embed", 1_433_602),
    ("mamba2-1a", 1_206_578), ("mamba2-1a-k60", 1_206_578), ("mamba2-1a-3layer", 1_638_602), ("mamba2-medium-gpu", 4_282_386), ("mamba2-large", 10_592_546)])
def test_recorded_parameter_counts(name, count): assert parameter_count(load_config(name)) == count


@pytest.mark.parametrize("name, count", [("baseline-v22", 1_308_294), ("mamba2-1a", 1_154_150)])
def test_counts_without_combat_heads(name, count): assert parameter_count(load_config(name, ["model.heads=[core, kinematics]"])) == count


def test_counting_leaves_no_trace():
    before = torch.random.get_rng_state()
    counts = {name: parameter_count(load_config(name)) for name in experiment_names()}
    assert torch.equal(before, torch.random.get_rng_state())
    assert counts["toy"] == sum(p.numel() for p in build_model(load_config("toy")).parameters())


def test_an_old_checkpoint_loads_and_says_what_is_new():
    old = build_model(load_config("baseline-v22", ["model.heads=[core]"]))
    model = build_model(load_config("baseline-v22"))
    with pytest.warns(UserWarning, match="no head for velocity, dynamics, l_cancel, hurtbox, ground, last_attack"): missing = load_weights(model, old.state_dict())
    assert missing == ["velocity", "dynamics", "l_cancel", "hurtbox", "ground", "last_attack"]
    assert torch.equal(model.heads["action"].weight, old.heads["action"].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_weights(build_model(load_config("baseline-v22")), model.state_dict()) == []


@pytest.mark.parametrize("break_it, named", [
    (lambda w: w.pop("trunk.0.bias"), r"trunk\.0\.bias"), (lambda w: w.pop("heads.action.bias"), r"heads\.action\.bias"), (lambda w: w.update(extra=torch.zeros(2)), "extra"),
    (lambda w: w.update({"heads.jumps.weight": torch.zeros(14, 256)}), r"heads\.jumps\.weight.*\(16, 256\).*\(14, 256\)"), (lambda w: w.update({"heads.projectile.weight": torch.zeros(3, 256)}), r"heads\.projectile")])
def test_other_weights_are_refused_whole(break_it, named):
    model, other = build_model(load_config("baseline-v22")), build_model(load_config("baseline-v22"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = other.state_dict()
    break_it(weights)
    with pytest.raises(UserError, match=named): load_weights(model, weights)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_wrong_shapes_are_told_in_words():
    for name in ("baseline-v22", "mamba2-1a"):
        model = build_model(load_config(name))
        frames, controls = batch_for(model)
        with pytest.raises(UserError, match=r"controls \(2, 1, 42\)"): model(frames, torch.zeros(2, 1, 42))
        with pytest.raises(UserError, match="frames and controls"): model(frames, torch.zeros(3, 1, 26))
        with pytest.raises(UserError, match="frames and controls"): model(frames, torch.zeros(2, 11, 26))
