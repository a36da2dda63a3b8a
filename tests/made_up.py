"""Games of random values, for tests of what must hold whatever the values are."""
from dataclasses import replace

import numpy as np

from melee_wm.fields import BY_NAME
from melee_wm.frame import COLUMNS, Game
from melee_wm.melee import STAGES, ground_of


def made_up_game(seed: int, frames: int = 40) -> Game:
    "Random values over the whole range of every column, so that no corner of a vocabulary goes unseen."
    rng, stage = np.random.default_rng(seed), int(np.random.default_rng(seed).choice(list(STAGES)))
    columns = {}
    for name, column in COLUMNS.items():
        vocab = BY_NAME[name].vocab if name in BY_NAME and BY_NAME[name].kind == "category" else 0
        low, high = max(column.low, -1e6), min(column.high, 1e6, vocab - 1 if vocab else np.inf)
        kind = np.dtype(column.dtype).kind
        values = rng.uniform(low, high, (frames, 2)) if kind == "f" else rng.integers(low, high + 1, (frames, 2))
        columns[name] = values.astype(column.dtype)
    for name in ("main_x", "main_y", "c_x", "c_y"):
        columns[name] = (rng.integers(-80, 81, (frames, 2))/80).astype(np.float32)      # the controller's own steps
    columns["shoulder"] = (rng.integers(0, 141, (frames, 2))/140).astype(np.float32)
    columns["hitlag"] = rng.integers(0, 200, (frames, 2)).astype(np.float32)            # whole frames
    columns["character"][:] = columns["character"][:1]                                  # nobody becomes somebody else
    columns["ground"] = ground_of(stage, rng.integers(0, 3, (frames, 2)).astype(np.uint8))
    columns["state_age"] = rng.uniform(-3, 200, (frames, 2)).astype(np.float32)
    return Game(stage, columns)


def without(game: Game, *names: str) -> Game:
    "The game of an old version that lacks some columns."
    return replace(game, columns={k: v for k, v in game.columns.items() if k not in names}, version=(1, 2, 3))
