/** A match as the JSON that every melee_wm program reads (melee-wm-rollout/1). What a replay's columns are made of is in local.json. */

const shortest = value => { for (let digits = 1; digits < 10; digits++) { const short = Number(value.toPrecision(digits)); if (Math.fround(short) === value) return short; } return value; };
const as = {f: shortest, i: Math.round, b: value => value > .5};

/** The whole match so far. */
export function recorded(match) {
  const {model, stage, characters} = match, {record, fields} = model.local, rows = Array.from({length: match.last + 1}, (_, row) => row);
  const players = [0, 1].map(player => {
    const field = name => rows.map(row => match.rows[row * match.span + player * fields.length + model.place[name]]);
    const made = ({kind, field: source, sum, flag, table, constant}) => {
      if (source) return field(source).map(as[kind]);
      if (table) return field(table).map(id => record.tables[stage][id]);
      if (flag) return field(flag.field).map(value => value > 0 ? flag.bit : 0);
      if (sum) { const parts = Object.entries(sum).map(([name, weight]) => field(name).map(value => weight * value)); return rows.map(row => as[kind](Math.fround(parts.reduce((total, part) => total + part[row], 0)))); }
      return rows.map(() => constant === "character" ? model.local.internal[characters[player]] : constant);
    };
    const columns = Object.fromEntries(Object.entries(record.columns).map(([name, rule]) => [name, made(rule)]));
    const velocity = rows.map(row => record.velocity.map(name => columns[name][row]));
    for (const name of record.velocity) delete columns[name];
    return {...columns, velocity};
  });
  return {schema: "melee-wm-rollout/1", source: {...record.source, controls: match.controllers, ended: match.ended}, stage,
    players: characters.map((character, port) => ({character, port})), fps: 60, frames: {frame: rows.map(row => match.number(row)), players, items: null}};
}
