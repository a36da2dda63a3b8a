/** Game pads: GameCube controllers behind an adapter, and pads of the standard layout. */
import {neutral} from "./grid.js";

const pressed = (pad, index) => (pad.buttons[index]?.pressed ? 1 : 0);
const axis = (pad, index) => pad.axes[index] ?? 0;

/** Nothing below the dead zone, everything above it stretched so that the rim stays the rim. */
export function pastDeadZone(x, y, dead) {
  const length = Math.hypot(x, y);
  if (length <= dead) return [0, 0];
  const scale = (length - dead) / (1 - dead) / length;
  return [x * scale, y * scale];
}

/** A GameCube controller behind a USB adapter: an axis of 1 is 128 steps, the stick's rim is at 80. */
function gameCube(pad, dead) {
  const gain = 128 / 80;
  const trigger = index => Math.max(0, (axis(pad, index) + 1) / 2 * 255 - 35) / 140;   // at rest an adapter reads about 35 of 255
  const [main_x, main_y] = pastDeadZone(axis(pad, 0) * gain, -axis(pad, 1) * gain, dead);
  const [c_x, c_y] = pastDeadZone(axis(pad, 5) * gain, -axis(pad, 2) * gain, dead);
  return {...neutral(), main_x, main_y, c_x, c_y, shoulder: Math.max(trigger(3), trigger(4)),
    button_a: pressed(pad, 1), button_b: pressed(pad, 2), button_x: pressed(pad, 0), button_y: pressed(pad, 3),
    button_l: pressed(pad, 4), button_r: pressed(pad, 5), button_z: pressed(pad, 7), button_d_up: pressed(pad, 12)};
}

/** The layout browsers call standard: A below, B left, X right, Y above, as on a GameCube controller; both bumpers grab. */
function standard(pad, dead) {
  const [main_x, main_y] = pastDeadZone(axis(pad, 0), -axis(pad, 1), dead);
  const [c_x, c_y] = pastDeadZone(axis(pad, 2), -axis(pad, 3), dead);
  const left = pad.buttons[6]?.value ?? 0, right = pad.buttons[7]?.value ?? 0;
  return {...neutral(), main_x, main_y, c_x, c_y, shoulder: Math.max(left, right),
    button_a: pressed(pad, 0), button_b: pressed(pad, 2), button_x: pressed(pad, 1), button_y: pressed(pad, 3),
    button_l: left > 0.9 ? 1 : 0, button_r: right > 0.9 ? 1 : 0, button_z: pressed(pad, 4) || pressed(pad, 5), button_d_up: pressed(pad, 12)};
}

/** Whether a pad is a GameCube controller (by the adapters' names and numbers). */
export function isGameCube(pad) {
  return pad.mapping !== "standard" && /gamecube|0079[-: ]+(product: )?184[346]|057e[-: ]+(product: )?0337/i.test(pad.id);
}

/** A pad's controls, before the game's grids. */
export function readPad(pad, dead) {
  return (isGameCube(pad) ? gameCube : standard)(pad, dead);
}

/** The pads that are plugged in and have been touched. */
export function connectedPads() {
  return [...(navigator.getGamepads?.() ?? [])].filter(pad => pad?.connected);
}

/** A pad's name, short enough for a list. */
export function padName(pad) {
  const name = pad.id.replace(/\(.*|Vendor.*/i, "").trim() || "pad";
  return `${pad.index + 1}: ${isGameCube(pad) ? "GameCube controller" : name.slice(0, 28)}`;
}
