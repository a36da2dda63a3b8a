/** The controller's own grids: sticks in 1/80 inside the unit circle, triggers in 1/140, eight buttons. */

export const STICK = 80, TRIGGER = 140;
export const BUTTONS = ["button_a", "button_b", "button_x", "button_y", "button_z", "button_l", "button_r", "button_d_up"];
export const CONTROLS = ["main_x", "main_y", "c_x", "c_y", "shoulder", ...BUTTONS];
const STICK_DEAD = 23, TRIGGER_DEAD = 43, LIGHT_PRESS = 49;   // smallest values a replay holds; Z presses the trigger to 49/140

/** A controller nobody touches. */
export function neutral() {
  return Object.fromEntries(CONTROLS.map(name => [name, 0]));
}

/** One stick as the game reads it: clamped to the unit circle, cut to 1/80, each axis dead below 23/80. */
export function onStickGrid(x, y) {
  const length = Math.hypot(x, y);
  const scale = STICK / Math.max(1, length);
  const axis = value => {
    const steps = Math.trunc(value * scale + Math.sign(value) * 1e-6);
    return Math.abs(steps) < STICK_DEAD ? 0 : Math.max(-STICK, Math.min(STICK, steps)) / STICK;
  };
  return [axis(x), axis(y)];
}

/** One analog trigger as the game reads it: cut to 1/140, dead below 43/140. */
export function onTriggerGrid(value) {
  const steps = Math.round(Math.max(0, Math.min(1, value)) * TRIGGER);
  return steps < TRIGGER_DEAD ? 0 : steps / TRIGGER;
}

/** Raw controls (any floats) as the game would record them; a full L or R press is a full trigger, Z a light one. */
export function asTheGameReads(raw) {
  const controls = {...neutral(), ...raw};
  [controls.main_x, controls.main_y] = onStickGrid(controls.main_x, controls.main_y);
  [controls.c_x, controls.c_y] = onStickGrid(controls.c_x, controls.c_y);
  const pressed = controls.button_l || controls.button_r ? 1 : controls.button_z ? LIGHT_PRESS / TRIGGER : 0;
  controls.shoulder = Math.max(onTriggerGrid(controls.shoulder), pressed);
  for (const name of BUTTONS) controls[name] = controls[name] ? 1 : 0;
  return controls;
}

/** The 13 bytes in which a player's controls travel to the server. */
export function packed(player, controls) {
  const bytes = new DataView(new ArrayBuffer(13));
  bytes.setUint8(0, player);
  ["main_x", "main_y", "c_x", "c_y"].forEach((name, i) => bytes.setInt8(1 + i, Math.round(controls[name] * STICK)));
  bytes.setUint8(5, Math.round(controls.shoulder * TRIGGER));
  bytes.setUint8(6, BUTTONS.reduce((bits, name, i) => bits | (controls[name] ? 1 << i : 0), 0));
  return bytes.buffer;
}

/** Whether two controllers are in the same position. */
export function same(one, other) {
  return CONTROLS.every(name => Math.abs(one[name] - other[name]) < 1e-4);
}
