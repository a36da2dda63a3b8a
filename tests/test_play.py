"""Playing: the stepper without a network, the server with one, and everything a stranger might send to it.

`python tests/test_play.py --fuzz-seconds 60` does to a server for a minute what the suite does for a few seconds.
"""
import argparse
import json
import logging
import random
import socket
import threading
import time

import httpx
import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from melee_wm.checkpoint import load_model
from melee_wm.config import load_config
from melee_wm.core import UserError, quick_replays
from melee_wm.export import read_rollout, rollout, to_game
from melee_wm.fields import CONTROLS
from melee_wm.mamba2 import build_model
from melee_wm.match import EIGHT_MINUTES, from_replay, from_spawn
from melee_wm.protocol import REPLAY_BYTES
from melee_wm.play import Limits, running_server, shipped_policies
from melee_wm.policy import load_fighter
from melee_wm.practice import practice_match
from melee_wm.slp import read_slp, write_slp
from melee_wm.stepper import Metronome, Stepper, ghosts, pad_bytes, present, record, recorded
from melee_wm.world import World

HELD = 60   # seconds to wait for an answer at most


# The stepper, without a network.

@pytest.fixture(scope="module")
def model():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model("default")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def game():
    paths = quick_replays()
    return read_slp(paths[0]) if paths else practice_match(0)


def test_replayed_hands_live_the_rollout(model, game):
    "A session under a replay's inputs is what `rollout` dreams, to the bit."
    stepper = Stepper(World(model))
    session = stepper.begin(from_replay(stepper.world, game, 100), ("replay", "replay"))
    for _ in range(30): stepper.step([session])
    dream = rollout(model, game, 100, 30)
    mine = recorded(record(session), model)
    for name in ("x", "y", "percent", "action_state", "main_x", "speed_y", "state_age"):
        np.testing.assert_array_equal(mine.columns[name][-30:], dream.columns[name])
    np.testing.assert_array_equal(mine.frame[-30:], dream.frame)


@pytest.mark.parametrize("experiment, memory", [("exp-3a-lookahead", "window"), ("mamba2-1a", "window"), ("mamba2-1a", "state")])
def test_any_world_can_be_played_and_rewound(experiment, memory):
    torch.manual_seed(0)
    stepper = Stepper(World(build_model(load_config(experiment, ["model.d_model=32", "model.d_state=8", "model.headdim=16"] if "mamba" in experiment else [])), memory=memory))
    sessions = [stepper.begin(from_spawn(stepper.world, 31, (2, 20)), ("person", "neutral")) for _ in range(2)]
    for session in sessions: session.pads = np.tile(np.eye(len(CONTROLS), dtype=np.float32)[0], (2, 1))
    for _ in range(12): stepper.step(sessions)
    late = stepper.world.layout.encoding.lookahead
    assert sessions[0].values(sessions[0].first + 1 + late)["main_x"][0] == 1 and sessions[0].values(sessions[0].at)["main_x"][1] == 0
    life = sessions[0].rows[:sessions[0].last + 1].copy()
    stepper.seek(sessions[0], 5)
    for _ in range(7): stepper.step([sessions[0]])
    again = sessions[0].rows[:sessions[0].last + 1]
    x = stepper.fields.index("x")
    np.testing.assert_allclose(again[-1 - late, x], life[-1 - late, x], atol=.05 + .5*late)
    assert sessions[0].branches == 1


def test_it_ends_by_the_rules(model):
    stepper = Stepper(World(model))
    session = stepper.begin(from_spawn(stepper.world, 31, (2, 20)), ("neutral", "random"))
    stepper.step([session])
    session.rows[session.at, stepper.fields.index("stocks")] = 0
    stepper.go_to(session, session.at)
    assert session.ended == "four stocks" and not stepper.due()
    frame = session.frame
    stepper.step([session])
    assert session.frame == frame
    stepper.seek(session, 0)
    assert session.ended is None
    session.rows[-9:] = session.rows[session.at]   # seven minutes and 59.9 seconds later
    session.last = len(session.rows) - 2
    stepper.go_to(session, session.last)
    stepper.step([session])
    assert session.ended == "eight minutes" and session.frame == EIGHT_MINUTES and session.told()["ended"] == "eight minutes"


def test_stepper_refuses(model, game):
    stepper = Stepper(World(model), limit=1)
    start = from_spawn(stepper.world, 31, (2, 20))
    for hands in (("policy", "neutral"), ("nobody", "neutral"), ("replay", "neutral"), ("policy:../../x", "neutral")):
        with pytest.raises(UserError, match="nobody of that name"): stepper.begin(start, hands)
    session = stepper.begin(start, ("neutral", "neutral"))
    with pytest.raises(UserError, match="too many matches"): stepper.begin(start, ("neutral", "neutral"))
    for act in (lambda: stepper.seek(session, 10), lambda: stepper.swap(session)):
        with pytest.raises(UserError): act()


def test_fighters_play_and_ghosts_part(model):
    if not shipped_policies(): pytest.skip("no fighter in the package")
    fighters = {"fighter": load_fighter()}
    stepper = Stepper(World(model), fighters)
    sessions = [stepper.begin(from_spawn(stepper.world, 31, (2, 20)), hands) for hands in (("policy", "policy:fighter"), ("policy", "neutral"))]
    for _ in range(60): stepper.step(sessions)
    F = len(stepper.fields)
    assert all(np.isfinite(s.rows[s.first:s.at + 1, :2*F]).all() for s in sessions)
    pads = sessions[0].rows[sessions[0].first + 1:sessions[0].at + 1, [stepper.fields.index(n) for n in CONTROLS]]
    assert len(np.unique(pads, axis=0)) > 3 and np.allclose(pads[:, :4]*80, np.rint(pads[:, :4]*80), atol=1e-4)
    futures = ghosts(model, fighters, present(sessions[0]), sessions[0].controllers, sessions[0].pads, count=4, frames=30)
    assert futures["x"].shape == (4, 30, 2) and np.ptp(futures["x"][:, -1], axis=0).max() > 0


def test_metronome_keeps_time():
    clock = [0.]
    ticks = Metronome(rate=60, patience=6, now=lambda: clock[0])
    for _ in range(3600): clock[0] += max(0., ticks.until()) + 1e-4; ticks.tick()
    assert abs(clock[0] - 3599/60) < 2e-4 and not ticks.skipped
    clock[0] += 10
    assert ticks.tick() < 1/60 and ticks.skipped == 599


# The server, as a page sees it.

@pytest.fixture(scope="module")
def server():
    with running_server(policies=shipped_policies()) as running: yield running
    assert running.process.returncode == 0, "Ctrl-C ends it cleanly"


@pytest.fixture(scope="module")
def replay_bytes(tmp_path_factory):
    paths = quick_replays()
    if paths: return paths[0].read_bytes()
    return write_slp(practice_match(0), tmp_path_factory.mktemp("replay")/"game.slp", "synthetic practice match").read_bytes()


class Page:
    "What the page does, without drawing."
    def __init__(self, server, **options):
        self.server, self.fields = server, httpx.get(server.url + "about.json", timeout=60).json()["fields"]
        self.connection = connect(f"ws://127.0.0.1:{server.port}/play", open_timeout=60, close_timeout=1, **options)

    def __enter__(self):
        self.socket = self.connection.__enter__()
        return self

    def __exit__(self, *error): return self.connection.__exit__(*error)
    def do(self, do, **more): self.socket.send(json.dumps(dict(do=do, **more)))

    def hear(self, say):
        "The next message of a kind; everything else on the way is dropped."
        end = time.monotonic() + HELD
        while time.monotonic() < end:
            message = self.socket.recv(timeout=HELD)
            if isinstance(message, str) and json.loads(message)["say"] == say: return json.loads(message)
        raise AssertionError(f"nobody said {say}")

    def frame(self):
        "The next frame: its header, and the fields as (2,)."
        while isinstance(message := self.socket.recv(timeout=HELD), str): pass
        numbers = np.frombuffer(message, "<f4")
        return numbers[:5], dict(zip(self.fields, numbers[5:].reshape(2, -1).T))

    def frames(self, seconds):
        end, seen = time.monotonic() + seconds, []
        while time.monotonic() < end: seen.append(self.frame()[0][0])
        return seen

    def begin(self, controllers=("person", "neutral"), **more):
        self.do("begin", **(dict(controllers=controllers, stage=31, characters=[2, 20]) | more))
        began = self.hear("began")
        return began, self.hear("state")

    def pause(self):
        self.do("pause")
        return self.hear("state")

    def refused(self, do, **more):
        self.do(do, **more)
        return self.hear("refused")["what"]


def test_about_tells_everything(server):
    about = httpx.get(server.url + "about.json", timeout=60).json()
    assert about["schema"] == "melee-wm-play/1" and about["engine"] == "server" and about["fps"] == 60 and about["controls"] == list(CONTROLS)
    assert {"fields", "stages", "characters", "actions", "controllers", "policies", "limits", "model"} <= set(about) and 14 not in [c["id"] for c in about["characters"]]
    assert httpx.get(server.url).headers["content-security-policy"].startswith("default-src 'self'")
    for path in ("local.js", "cli.py", "..%2f..%2fpyproject.toml", "%2e%2e/core.py", "onnxruntime/ort.js", "match/x.slp", "C:%5cwindows"):
        assert httpx.get(server.url + path).status_code in (400, 404)


def test_a_match(server, tmp_path):
    "Begin, hold, pause, step, rewind, branch, seek, speed, controllers, files."
    with Page(server) as page:
        assert "no match yet" in page.refused("pause")
        began, state = page.begin()
        assert state["frame"] == state["first"] == 0 and began["fields"] == page.fields and began["characters"] == [2, 20] and not state["paused"]
        page.socket.send(pad_bytes(0, np.eye(13)[0]))
        while page.frame()[1]["main_x"][0] != 1: pass
        while page.frame()[0][0] < 60: pass
        state = page.pause()
        last = state["last"]
        while (head := page.frame()[0])[0] < last: pass
        assert int(head[1]) & 1 and state["paused"] and state["frame"] == last
        with pytest.raises(TimeoutError): page.socket.recv(timeout=.3)   # paused: nothing comes
        page.do("step"); assert page.hear("state")["frame"] == last + 1
        head, fields = page.frame()
        assert head[0] == last + 1 and 0 < head[2] < 1000 and head[4] == pytest.approx(1000/60) and fields["x"][0] > -38
        page.do("seek", frame=20); assert page.hear("state")["frame"] == 20
        assert page.frame()[0][0] == 20
        page.do("rewind", frames=5); state = page.hear("state")
        assert (state["frame"], state["last"], state["branches"]) == (15, last + 1, [])
        page.frame()
        page.socket.send(pad_bytes(0, -np.eye(13)[0]))
        page.do("step"); state = page.hear("state")
        assert (state["frame"], state["last"], state["branches"], state["branched"]) == (16, 16, [{"frame": 15, "last": last + 1}], 1)
        assert page.frame()[1]["main_x"][0] == -1
        page.do("swap"); assert page.hear("state")["last"] == last + 1
        page.do("swap"); assert page.hear("state")["last"] == 16
        page.do("controllers", controllers=["neutral", "random"]); assert page.hear("state")["controllers"] == ["neutral", "random"]
        page.do("step"); page.hear("state")
        for kind in ("slp", "json"):
            answer = httpx.get(f"{server.url}match/{began['token']}.{kind}", timeout=60)
            (tmp_path/f"match.{kind}").write_bytes(answer.content)
        saved, replayed = read_rollout(tmp_path/"match.json"), read_slp(tmp_path/"match.slp")
        assert saved.source["controls"] == ["neutral", "random"] and saved.players[1]["character"] == 20 and saved.frame[-1] == 16
        for name in ("x", "action_state", "buttons"): np.testing.assert_array_equal(saved.columns[name], replayed[name])
        assert saved.columns["main_x"][-3:, 0].tolist() == [1, 1, 0] and len(to_game(saved)) == len(replayed)
        for line in (page.refused("seek", frame=500), page.refused("speed", value=7), page.refused("controllers", controllers=["me", "you"]), page.refused("dance"), page.refused("rewind", frames=-1)):
            assert line and "\n" not in line


def test_slow_motion(server):
    with Page(server) as page:
        page.begin(("neutral", "neutral"))
        page.do("speed", value=.1); page.hear("state")
        first = page.frame()[0][0]
        seen = page.frames(2.)
        assert 5 <= seen[-1] - first <= 16


def test_ghosts(server):
    with Page(server) as page:
        page.begin(("neutral", "random"))
        page.do("ghosts", count=3, frames=10)
        said = page.hear("ghosts")
        assert np.array(said["x"]).shape == np.array(said["y"]).shape == (3, 10, 2) and np.isfinite(said["x"]).all()
        state = page.pause()
        for count in (1, 2, 3, 4): page.do("ghosts", count=count, frames=5)
        answers = [page.hear("ghosts") for _ in range(2)]                # the first, and the last of those that came meanwhile
        assert answers[0]["frame"] == answers[1]["frame"] == state["frame"] and len(answers[1]["x"]) >= 2


def test_replays(server, replay_bytes, model, tmp_path):
    "Handed in, taken over, watched; and everything that is none."
    (tmp_path/"game.slp").write_bytes(replay_bytes)
    game = read_slp(tmp_path/"game.slp")
    told = httpx.post(server.url + "replay", content=replay_bytes, timeout=60).json()
    assert told["stage"] == game.stage and told["characters"] == list(game.characters) and told["first"] + told["frames"] - 1 == game.frame_numbers[-1]
    watched = httpx.post(server.url + "watch", json=dict(token=told["token"], frame=200, frames=20), timeout=60).json()
    (tmp_path/"watched.json").write_text(json.dumps(watched))
    expected, seen = rollout(model, game, 200, 20), read_rollout(tmp_path/"watched.json")
    for name in ("x", "action_state"): np.testing.assert_array_equal(seen.columns[name], expected.columns[name]); np.testing.assert_array_equal(seen.truth[name], expected.truth[name])
    with Page(server) as page:
        began, state = page.begin(("replay", "person"), replay=told["token"], frame=150)
        assert began["stage"] == game.stage and state["first"] == 150
        page.pause()
        page.do("seek", frame=150); page.hear("state"); page.do("step"); page.hear("state")
        while (numbers := page.frame())[0][0] != 151: pass
        assert numbers[1]["main_x"][0] == game["main_x"][151 + 123, 0]
        assert "no such frame" in page.refused("begin", replay=told["token"], frame=100_000, controllers=["replay", "replay"])
        assert "no such replay" in page.refused("begin", replay="x", controllers=["replay", "replay"])
    for body in (b"", b"not a replay", replay_bytes[:5000]):
        answer = httpx.post(server.url + "replay", content=body, timeout=60)
        assert answer.status_code == 400 and "\n" not in answer.json()["what"] and "/" not in answer.json()["what"]
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:                              # refused before it is sent
        raw.sendall(f"POST /replay HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {REPLAY_BYTES + 1}\r\n\r\n".encode())
        assert b"400" in (said := raw.recv(2000)) and b"at most" in said + raw.recv(2000)
    for body in (b"", b"{}", b"x"*5000, json.dumps(dict(token=told["token"], frame=200, frames=10**9)).encode(), json.dumps(dict(token=told["token"], frame=10**6, frames=10)).encode()):
        assert httpx.post(server.url + "watch", content=body, timeout=60).status_code == 400


def test_a_stalled_client_stalls_nobody(server):
    with Page(server) as page, socket.create_connection(("127.0.0.1", server.port)) as stalled:
        page.begin(("random", "random"))
        before = len(page.frames(1.5))
        stalled.sendall(f"GET /play HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        assert b"101" in stalled.recv(200)
        text = json.dumps(dict(do="begin", stage=31, characters=[2, 2], controllers=["random", "random"])).encode()
        stalled.sendall(bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text)                                   # and never reads again
        for _ in range(200):                                                                                   # but asks and asks
            wish = b'{"do": "pause"}'
            stalled.sendall(bytes([0x81, 0x80 | len(wish), 0, 0, 0, 0]) + wish)
        memory, during = server.memory(), len(page.frames(3.))/2
        assert during > .4*before and server.memory() < memory + 100


def test_several_matches_do_not_touch(server):
    with Page(server) as one, Page(server) as two:
        one.begin(("person", "neutral")); two.begin(("person", "neutral"), stage=32)
        one.socket.send(pad_bytes(0, np.eye(13)[0])); two.socket.send(pad_bytes(0, -np.eye(13)[0]))
        for page, way in ((one, 1), (two, -1)):
            while page.frame()[1]["main_x"][0] != way: pass
        one.pause()
        moved = two.frames(.5)
        assert moved[-1] > moved[0]


def test_who_may_speak(server):
    here, port = f"http://127.0.0.1:{server.port}", server.port
    with Page(server, origin=here) as page: page.begin()
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}"):
        with pytest.raises(InvalidStatus, match="403"), connect(f"ws://127.0.0.1:{port}/play", origin=origin): pass
        assert httpx.post(server.url + "watch", json={}, headers={"Origin": origin}).status_code == 403
    assert httpx.get(server.url + "about.json", headers={"Host": f"evil.example:{port}"}).status_code == 403     # a name that was made to mean this machine
    assert httpx.get(server.url + "about.json", headers={"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}).status_code == 200


def test_too_much(server):
    with Page(server) as page, pytest.raises(ConnectionClosed) as closed:
        page.socket.send("x"*10_000); page.hear("never")
    assert closed.value.sent.code == 1009 if closed.value.sent else True
    with Page(server) as page, pytest.raises(ConnectionClosed) as closed:
        for _ in range(200): page.socket.send("nonsense")
        page.hear("never")
    assert closed.value.rcvd.code == 1008


def test_small_limits():
    "Idle pages are sent away, and there is room for so many only; a port in use is one line."
    with running_server(policies=(), limits=Limits(sessions=1, per_address=2, idle=2., stalled=1.)) as small:
        with Page(small) as one, Page(small) as two:
            one.begin()
            assert "too many matches" in two.refused("begin", stage=31, characters=[2, 2], controllers=["neutral", "neutral"])
            with Page(small) as three, pytest.raises(ConnectionClosed): three.hear("never")
            with pytest.raises(ConnectionClosed): two.hear("never")      # idle
        with pytest.raises(UserError, match="cannot listen"):
            with running_server(port=small.port): pass
        lines = small.log.read_text().splitlines()
        assert sum("nothing heard" in line for line in lines) >= 1 and all(line.startswith("melee-wm play: ") for line in lines)


# Strangers.

COMMANDS = [dict(do="begin", stage=31, characters=[2, 20], controllers=["random", "neutral"]), dict(do="pause"), dict(do="resume"), dict(do="step"), dict(do="rewind", frames=3),
    dict(do="seek", frame=2), dict(do="speed", value=.5), dict(do="controllers", controllers=["person", "random"]), dict(do="ghosts", count=1, frames=2), dict(do="swap")]
ODD = [None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, "x", "\u0000", "\ud83d\ude00"*50, "../../etc/passwd", [], [[]]*3, {}, {"do": "begin"}, ["person"]*2, [31, 31], float("nan")]


def odd_message(chance: random.Random):
    "Something to say on a WebSocket: nonsense, nearly right, or right."
    kind = chance.randrange(6)
    if kind == 0: return chance.randbytes(chance.choice((0, 1, 12, 13, 13, 13, 14, 200, 5000)))
    if kind == 1: return "".join(chr(chance.randrange(1, 0xD000)) for _ in range(chance.choice((0, 3, 60, 1000, 5000))))
    command = dict(chance.choice(COMMANDS))
    if kind < 4: command[chance.choice([*command, "frames", "frame", "replay", "stage", "characters", chance.choice("abc")])] = chance.choice(ODD)
    if kind == 4: return json.dumps(command)[:chance.randrange(60)]
    return json.dumps(command)


def talk_nonsense(server, chance: random.Random, until: float, count: dict):
    "WebSockets full of nonsense, one after another."
    while time.monotonic() < until:
        try:
            if chance.random() < .2:                                     # not even a WebSocket
                with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
                    raw.sendall(chance.choice((chance.randbytes(500), b"GET /play HTTP/1.1\r\n", f"GET /play HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode() + chance.randbytes(300))))
                count["raw"] += 1
                continue
            with connect(f"ws://127.0.0.1:{server.port}/play", open_timeout=30, close_timeout=1) as page:
                count["sockets"] += 1
                for _ in range(chance.randrange(1, 60)):
                    page.send(odd_message(chance)); count["messages"] += 1
                    if time.monotonic() > until: break
                if chance.random() < .5: page.recv(timeout=5)
        except (ConnectionClosed, ConnectionError, TimeoutError, InvalidStatus, EOFError): count["closed"] += 1


def send_rubbish(server, chance: random.Random, until: float, count: dict, replay: bytes):
    "Requests and uploads that are wrong in every way."
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while time.monotonic() < until:
            try:
                kind = chance.randrange(8)
                if kind < 2: body = bytearray(replay[:chance.choice((len(replay), chance.randrange(len(replay))))])
                if kind == 0:
                    for _ in range(chance.choice((1, 10, 300))): body[chance.randrange(len(body))] = chance.randrange(256)
                if kind < 2: answer = client.post("replay", content=bytes(body))
                elif kind == 2: answer = client.post("replay", content=chance.randbytes(chance.choice((0, 10, 5000, 200_000))))
                elif kind == 3: answer = client.post("replay", content=(bytes(1_000_000) for _ in range(25)))          # of unsaid length, and too long
                elif kind == 4: answer = client.post("watch", content=json.dumps(dict(token=chance.choice(ODD), frame=chance.choice(ODD), frames=chance.choice(ODD))))
                elif kind == 5: answer = client.get("match/" + chance.choice(("x.slp", "..%2f..%2fx.json", ".slp", "%00.json", "x"*3000)))
                elif kind == 6: answer = client.request(chance.choice(("GET", "PUT", "DELETE", "OPTIONS", "HEAD")), chance.choice(("replay", "play", "about.json", "%2e%2e%2f", "//etc/passwd", "?x=1")))
                else: answer = client.post("watch", content=chance.randbytes(100), headers={"Origin": "http://evil.example"})
                assert answer.status_code < 500, (kind, answer.status_code, answer.text)
                count[answer.status_code] = count.get(answer.status_code, 0) + 1
            except (httpx.TransportError, UnicodeError): count["closed"] += 1


def fuzz(seconds: float, replay: bytes, seed: int = 0) -> dict:
    "Strangers do their worst to a server for so long, while somebody plays; what was done, and how the server took it."
    count = dict(sockets=0, messages=0, raw=0, closed=0)
    logging.getLogger("websockets").setLevel(logging.CRITICAL)   # the clients here are cut off all the time
    with running_server(policies=()) as server, Page(server) as page:
        page.begin(("neutral", "neutral"))      # nobody can lose
        page.frames(1.)
        before, until = server.memory(), time.monotonic() + seconds
        strangers = [threading.Thread(target=talk_nonsense, args=(server, random.Random(f"{seed} talk {i}"), until, count)) for i in range(2)]
        strangers += [threading.Thread(target=send_rubbish, args=(server, random.Random(f"{seed} send"), until, count, replay))]
        for thread in strangers: thread.start()
        played, peak = [], before
        try:
            while time.monotonic() < until: played += page.frames(min(1., seconds)); peak = max(peak, server.memory())
        except TimeoutError: raise AssertionError("no frames any more; the last lines of the log: " + " | ".join(server.log.read_text().splitlines()[-5:])) from None
        for thread in strangers: thread.join(90)
        assert not any(thread.is_alive() for thread in strangers)
        page.do("pause"); state = page.hear("state")
        time.sleep(1.)
        lines, after = server.log.read_text().splitlines(), server.memory()
        assert server.process.poll() is None and httpx.get(server.url + "about.json", timeout=30).status_code == 200
    assert server.process.returncode == 0
    return dict(count=count, before_mb=round(before), peak_mb=round(peak), after_mb=round(after), lines=lines, frames_per_second=round(len(played)/seconds, 1), last_frame=state["last"])


@pytest.mark.timeout(600)
def test_strangers(replay_bytes, request):
    "The server stays up, its memory bounded, its log one clear line for each refusal."
    result = fuzz(request.config.getoption("--fuzz-seconds", default=4.), replay_bytes)
    assert result["count"]["messages"] > 20 and result["frames_per_second"] > 5
    assert result["peak_mb"] < result["before_mb"] + 1000   # sixteen replays kept, two being read, a workshop at work
    assert result["lines"] and all(line.startswith("melee-wm play: ") and len(line) < 500 for line in result["lines"]), [line for line in result["lines"] if not line.startswith("melee-wm play: ")][:5]
    assert not any("Traceback" in line or "Error:" in line for line in result["lines"])


if __name__ == "__main__":
    import tempfile
    from pathlib import Path
    parser = argparse.ArgumentParser(description=fuzz.__doc__)
    parser.add_argument("--fuzz-seconds", type=float, default=60.)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder: body = write_slp(practice_match(0), Path(folder)/"game.slp", "synthetic practice match").read_bytes()
    found = fuzz(given.fuzz_seconds, body, given.seed)
    lines = found.pop("lines")
    print(json.dumps(found, indent=1))
    print(f"{len(lines)} lines in the log, of {len(set(line.split(':', 3)[2][:30] for line in lines if line.count(':') > 2))} kinds; some of them:")
    for line in random.Random(1).sample(lines, min(12, len(lines))): print("  " + line[:200])
