/** A fighter as a stylised figure: limbs, head and a feature or two, the player's colour throughout. */
import {PLAYER_COLORS, PLAYER_DARK, PLAYER_LIGHT, looksOf} from "./cast.js";
import {poseOf} from "./poses.js";

const TORSO = 0.32, LIMB = 0.1;

/** Where the elbow or knee of a limb is, given both ends and the length of its halves. */
function joint(from, to, half, bend) {
  const dx = to[0] - from[0], dy = to[1] - from[1], distance = Math.hypot(dx, dy) || 1e-6;
  const out = Math.sqrt(Math.max(0, half * half - distance * distance / 4)) * bend;
  return [(from[0] + to[0]) / 2 - dy / distance * out, (from[1] + to[1]) / 2 + dx / distance * out];
}

function stroke(ctx, width, ...points) {
  ctx.lineWidth = width;
  ctx.beginPath();
  points.forEach(([x, y], i) => i ? ctx.lineTo(x, y) : ctx.moveTo(x, y));
  ctx.stroke();
}

function disc(ctx, x, y, radius) {
  ctx.beginPath();
  ctx.arc(x, y, radius, 0, 2 * Math.PI);
  ctx.fill();
}

function shape(ctx, ...points) {
  ctx.beginPath();
  points.forEach(([x, y], i) => i ? ctx.lineTo(x, y) : ctx.moveTo(x, y));
  ctx.closePath();
  ctx.fill();
}

/** What stands out behind the body: capes, tails, shells, long hair. */
function behind(ctx, features, hip, chest, head) {
  if (features.has("tail")) { ctx.lineWidth = 0.07; ctx.beginPath(); ctx.moveTo(...hip); ctx.quadraticCurveTo(hip[0] - 0.34, hip[1] - 0.1, hip[0] - 0.4, hip[1] + 0.2); ctx.stroke(); }
  if (features.has("cape")) shape(ctx, [chest[0] + 0.06, chest[1] + 0.06], [chest[0] - 0.14, chest[1] + 0.02], [hip[0] - 0.36, hip[1] - 0.3], [hip[0] - 0.05, hip[1] - 0.28]);
  if (features.has("shell")) { ctx.beginPath(); ctx.ellipse((hip[0] + chest[0]) / 2 - 0.15, (hip[1] + chest[1]) / 2, 0.17, 0.26, 0, 0, 2 * Math.PI); ctx.fill(); }
  if (features.has("hair")) shape(ctx, [head[0] - 0.02, head[1] + 0.13], [head[0] - 0.17, head[1] + 0.04], [head[0] - 0.2, head[1] - 0.16], [head[0] - 0.03, head[1] - 0.09]);
}

/** What the head wears. */
function headgear(ctx, features, [x, y], radius, colors) {
  ctx.fillStyle = colors.main;
  if (features.has("ears")) { shape(ctx, [x - radius * 0.9, y + radius * 0.3], [x - radius * 0.95, y + radius * 2], [x - radius * 0.1, y + radius * 0.9]); shape(ctx, [x, y + radius * 0.9], [x + radius * 0.35, y + radius * 1.9], [x + radius * 0.75, y + radius * 0.5]); }
  if (features.has("horns")) { shape(ctx, [x - radius, y + radius * 0.2], [x - radius * 1.1, y + radius * 1.6], [x - radius * 0.2, y + radius * 0.8]); shape(ctx, [x + radius * 0.1, y + radius * 0.9], [x + radius * 0.5, y + radius * 1.6], [x + radius * 0.8, y + radius * 0.5]); }
  if (features.has("beak")) { ctx.fillStyle = colors.light; shape(ctx, [x + radius * 0.6, y + radius * 0.4], [x + radius * 1.9, y - radius * 0.2], [x + radius * 0.7, y - radius * 0.4]); }
  if (features.has("snout")) disc(ctx, x + radius * 0.9, y - radius * 0.15, radius * 0.75);
  if (features.has("cap") || features.has("hood")) { ctx.fillStyle = colors.dark; ctx.beginPath(); ctx.arc(x, y + radius * 0.1, radius * 1.08, 0, Math.PI); ctx.fill(); if (features.has("cap")) ctx.fillRect(x, y + radius * 0.02, radius * 1.5, radius * 0.28); }
}

/** The look of an eye or a visor: which way the fighter faces. */
function gaze(ctx, features, [x, y], radius, colors) {
  ctx.fillStyle = colors.light;
  if (features.has("visor")) { ctx.beginPath(); ctx.roundRect(x - radius * 0.05, y - radius * 0.2, radius * 1.1, radius * 0.5, radius * 0.2); ctx.fill(); }
  else { ctx.beginPath(); ctx.ellipse(x + radius * 0.5, y + radius * 0.08, radius * 0.2, radius * 0.32, 0, 0, 2 * Math.PI); ctx.fill(); }
}

function limbs(ctx, root, ends, half, bend, width, colors, which) {
  ctx.strokeStyle = which ? colors.dark : colors.main;
  const end = ends[which];
  stroke(ctx, width, root, joint(root, end, half, bend), end);
}

/** Body, limbs and head in units of the height, y up, facing right. */
function body(ctx, pose, looks, colors) {
  const {features, bulk} = looks, limb = LIMB * (0.7 + 0.3 * bulk), thick = 0.2 * bulk;
  const hip = [0, pose.hip], chest = [Math.sin(pose.lean) * TORSO, pose.hip + Math.cos(pose.lean) * TORSO];
  const radius = 0.135 * Math.max(1, 13.5 / looks.height) ** 0.7, head = [chest[0] + Math.sin(pose.lean) * 0.1 + 0.02, chest[1] + 0.035 + radius];
  if (features.has("ball") || pose.ball) return ball(ctx, pose, looks, colors);
  ctx.strokeStyle = ctx.fillStyle = colors.dark;
  behind(ctx, features, hip, chest, head);
  limbs(ctx, chest, pose.hands, 0.2, -1, limb * 0.9, colors, 1);
  limbs(ctx, hip, pose.feet, 0.24, 1, limb * 1.1, colors, 1);
  ctx.strokeStyle = ctx.fillStyle = colors.main;
  stroke(ctx, thick, hip, chest);
  if (features.has("skirt") || features.has("coat")) shape(ctx, [chest[0] - 0.08, chest[1]], [chest[0] + 0.08, chest[1]], [0.22, pose.hip - 0.26], [-0.24, pose.hip - 0.26]);
  limbs(ctx, hip, pose.feet, 0.24, 1, limb * 1.15, colors, 0);
  ctx.fillStyle = colors.main;
  disc(ctx, ...head, radius);
  headgear(ctx, features, head, radius, colors);
  gaze(ctx, features, head, radius, colors);
  ctx.strokeStyle = colors.main;
  limbs(ctx, chest, pose.hands, features.has("arms") ? 0.3 : 0.2, -1, limb, colors, 0);
  carried(ctx, features, chest, pose.hands[0], colors);
}

function carried(ctx, features, chest, hand, colors) {
  ctx.strokeStyle = colors.light;
  const angle = Math.atan2(hand[1] - chest[1] + 0.12, hand[0] - chest[0]);
  if (features.has("sword")) stroke(ctx, 0.035, hand, [hand[0] + Math.cos(angle) * 0.46, hand[1] + Math.sin(angle) * 0.46]);
  if (features.has("cannon")) stroke(ctx, 0.15, [(chest[0] + hand[0]) / 2, (chest[1] + hand[1]) / 2], hand);
}

/** The round ones, and everyone who rolls. */
function ball(ctx, pose, looks, colors) {
  const round = looks.features.has("ball"), radius = round ? 0.42 : 0.3, centre = [0, round ? 0.48 : 0.32];
  if (round) for (const which of [1, 0]) { ctx.fillStyle = colors.dark; disc(ctx, pose.feet[which][0], pose.feet[which][1] + 0.09, 0.13); }
  ctx.fillStyle = colors.main;
  if (looks.features.has("ears")) headgear(ctx, looks.features, centre, radius * 0.75, colors);
  ctx.fillStyle = colors.main;
  disc(ctx, ...centre, radius);
  if (round) { ctx.fillStyle = colors.dark; disc(ctx, pose.hands[0][0] + 0.12, pose.hands[0][1], 0.11); }
  gaze(ctx, new Set(), [centre[0] + radius * 0.15, centre[1] + radius * 0.2], radius * 0.7, colors);
}

/** The arc an attack sweeps; a hint from the action's name, not a hitbox. */
function swing(ctx, {angle, length, strength, all}, color) {
  const spread = all ? Math.PI : 0.6;
  ctx.strokeStyle = color;
  ctx.globalAlpha *= 0.5 * strength;
  ctx.lineWidth = 0.09;
  ctx.beginPath();
  ctx.arc(0.05, 0.55, length, angle - spread, angle + spread);
  ctx.stroke();
}

/** The colours a fighter wears on this frame: pale in hitlag, shimmering while untouchable. */
function colorsOf(fighter, player, calm) {
  const shimmer = fighter.hurt && (calm || Math.floor((fighter.state_age ?? 0) / 3) % 2 === 0);
  if (fighter.frozen) return {main: "#ffffff", light: PLAYER_COLORS[player], dark: PLAYER_LIGHT[player]};
  if (shimmer) return {main: PLAYER_LIGHT[player], light: "#20242b", dark: PLAYER_COLORS[player]};
  return {main: PLAYER_COLORS[player], light: PLAYER_LIGHT[player], dark: PLAYER_DARK[player]};
}

/** Draw a fighter where it stands. `place` maps game units to pixels, `alpha` makes a ghost of it. */
export function drawFigure(ctx, fighter, player, place, {alpha = 1, calm = false, plain = false} = {}) {
  const looks = looksOf(fighter.name), pose = poseOf(fighter, looks.height), size = looks.height * place.scale;
  const [x, y] = place.at(fighter.x, fighter.y);
  const colors = plain ? {main: "#c9d1db", light: "#8b95a3", dark: "#8b95a3"} : colorsOf(fighter, player, calm);
  ctx.save();
  ctx.translate(x, y);
  ctx.scale(size * fighter.facing, -size);
  ctx.lineCap = ctx.lineJoin = "round";
  ctx.globalAlpha = alpha * (/^Escape$|^EscapeAir/.test(fighter.action.name) ? 0.65 : 1);
  if (pose.lie) ctx.translate(0.4, 0.1);
  if (pose.spin) { ctx.translate(0, pose.lie ? 0 : 0.45); ctx.rotate(pose.spin); ctx.translate(0, pose.lie ? 0 : -0.45); }
  body(ctx, pose, looks, colors);
  if (pose.swing && !plain) swing(ctx, pose.swing, colors.light);
  ctx.restore();
  if (!plain) drawState(ctx, fighter, player, x, y, size, pose, place);
}

/** What surrounds a fighter: shield, glow of a special, ring of hitlag, halo of a return, stars of hitstun. */
function drawState(ctx, fighter, player, x, y, size, pose, place) {
  const middle = y - size * 0.5;
  ctx.save();
  if (fighter.shielding) {
    const radius = size * 0.28 + size * 0.42 * Math.max(0, fighter.shield) / 60;
    ctx.fillStyle = ctx.strokeStyle = PLAYER_COLORS[player];
    ctx.globalAlpha = 0.34;
    disc(ctx, x, middle, radius);
    ctx.globalAlpha = 0.9;
    ctx.lineWidth = Math.max(1.5, size * 0.03);
    ctx.beginPath(); ctx.arc(x, middle, radius, 0, 2 * Math.PI); ctx.stroke();
  }
  if (pose.glow) { ctx.strokeStyle = PLAYER_LIGHT[player]; ctx.globalAlpha = 0.45; ctx.lineWidth = size * 0.035; ctx.beginPath(); ctx.arc(x, middle, size * 0.62, 0, 2 * Math.PI); ctx.stroke(); }
  if (fighter.frozen) {
    ctx.strokeStyle = "#fff3c4";
    ctx.lineWidth = Math.max(1, size * 0.03);
    for (let i = 0; i < 8; i++) { const angle = i * Math.PI / 4 + 0.3; ctx.beginPath(); ctx.moveTo(x + Math.cos(angle) * size * 0.55, middle + Math.sin(angle) * size * 0.55); ctx.lineTo(x + Math.cos(angle) * size * 0.75, middle + Math.sin(angle) * size * 0.75); ctx.stroke(); }
  }
  if (/^Rebirth/.test(fighter.action.name)) { ctx.strokeStyle = "#cfe9dc"; ctx.lineWidth = Math.max(2, size * 0.05); ctx.beginPath(); ctx.ellipse(x, y, 9 * place.scale, 1.6 * place.scale, 0, 0, 2 * Math.PI); ctx.stroke(); }
  ctx.restore();
}
