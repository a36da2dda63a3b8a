// Prints what slippi-js reads from a .slp as one JSON object: settings, metadata, end, stats and columns of every frame.
const { SlippiGame } = require("@slippi/slippi-js/node");

const game = new SlippiGame(process.argv[2]);
const settings = game.getSettings();
const frames = game.getFrames();
const numbers = Object.keys(frames).map(Number).sort((a, b) => a - b);

// {a: {b: 1}} of every row -> {"a.b": [1, ...]}; JSON has no NaN, so it becomes null
function columns(rows) {
  const out = {};
  const walk = (value, path, row) => {
    if (value !== null && typeof value === "object") for (const [key, inner] of Object.entries(value)) walk(inner, path ? `${path}.${key}` : key, row);
    else (out[path] ??= Array(rows.length).fill(null))[row] = value;
  };
  rows.forEach((value, row) => walk(value, "", row));
  return out;
}

const players = settings.players.map(({ playerIndex }) => ({
  port: playerIndex,
  pre: columns(numbers.map((n) => frames[n].players[playerIndex].pre)),
  post: columns(numbers.map((n) => frames[n].players[playerIndex].post)),
}));
const items = columns(numbers.flatMap((n) => frames[n].items ?? []));
const stats = game.getStats();

process.stdout.write(JSON.stringify({
  settings, metadata: game.getMetadata(), end: game.getGameEnd(), winners: game.getWinners(), numbers, players, items,
  complete: game.getLatestFrame()?.isTransferComplete ?? null,
  stats: { lastFrame: stats.lastFrame, stocks: stats.stocks.length, inputs: stats.overall.map((o) => o.inputCounts.total) },
}));
