/** Postures: where head, hands and feet are for an action. A function of the frame alone; nothing is interpolated. */

const turn = (point, angle) => [point[0] * Math.cos(angle) - point[1] * Math.sin(angle), point[0] * Math.sin(angle) + point[1] * Math.cos(angle)];
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

/** A posture in units of the fighter's height, facing right, the origin between the feet. */
function posture(changes) {
  return {hip: 0.42, lean: 0.08, spin: 0, feet: [[0.13, 0], [-0.13, 0]], hands: [[0.22, 0.48], [-0.1, 0.44]], swing: null, ...changes};
}

/** How far an attack has come out: drawn back, out, and back again. */
function strike(age) {
  const out = clamp(age / 5, 0, 1), back = clamp((age - 12) / 14, 0, 1);
  return out * (1 - 0.7 * back);
}

function attack(name, age, grounded) {
  const reach = strike(age), aerial = name.startsWith("AttackAir");
  const kind = aerial ? name.slice(9) : /Hi/.test(name) && !/S[34]/.test(name) ? "Hi" : /Lw[34]/.test(name) && !/S[34]/.test(name) ? "Lw" : "F";
  const smash = /4/.test(name) && !aerial, angle = {F: 0.05, B: Math.PI, Hi: Math.PI / 2, Lw: aerial ? -Math.PI / 2 : -0.25, N: 0}[kind] ?? 0;
  const length = (smash ? 0.72 : 0.6) * (0.3 + 0.7 * reach), tip = turn([length, 0], angle);
  const swing = reach > 0.55 ? {angle, length: length + 0.12, strength: reach, all: kind === "N"} : null;
  if (aerial) {
    const base = {swing, hip: 0.45, lean: kind === "B" ? -0.35 : 0.15};
    if (kind === "N") return posture({...base, feet: [[0.42 * reach, 0.3], [-0.2, 0.2]], hands: [[0.3, 0.6], [-0.38 * reach, 0.55]]});
    if (kind === "Hi") return posture({...base, lean: -0.5, feet: [[0.18 + tip[0], 0.45 + tip[1] * 0.8], [-0.2, 0.15]], hands: [[0.1, 0.35], [-0.4, 0.5]]});
    if (kind === "Lw") return posture({...base, feet: [[0.05, 0.36 + tip[1] * 0.8], [-0.12, 0.25]], hands: [[0.3, 0.8], [-0.3, 0.8]]});
    return posture({...base, feet: [[tip[0], 0.42 + tip[1]], [-0.15 * Math.sign(tip[0] || 1), 0.12]], hands: [[0.2, 0.7], [-0.3, 0.6]]});
  }
  if (kind === "Lw") return posture({swing, hip: 0.26, lean: -0.1, feet: [[0.15 + 0.6 * reach, 0.03], [-0.15, 0]], hands: [[0.05, 0.3], [-0.25, 0.2]]});
  if (kind === "Hi") return posture({swing, lean: -0.05, hands: [[0.08 + tip[0] * 0.2, 0.6 + tip[1] * 0.75], smash ? [0.0, 0.55 + tip[1] * 0.7] : [-0.2, 0.5]]});
  if (name.startsWith("AttackS3")) return posture({swing, lean: -0.2, feet: [[0.1 + tip[0] * 0.9, 0.12 + 0.3 * reach], [-0.12, 0]], hands: [[0.15, 0.6], [-0.3, 0.55]]});
  const lean = name === "AttackDash" ? 0.5 : 0.15 + 0.2 * reach;
  return posture({swing, lean, feet: [[0.22, 0], [-0.25, 0]], hands: [[0.1 + tip[0], 0.62 + tip[1]], smash ? [0.05 + tip[0], 0.56] : [-0.18, 0.5]]});
}

function steps(fighter, height, width, lean) {
  const phase = fighter.x / height * 2.6 * fighter.facing;               // feet follow the ground covered
  const foot = shift => [Math.sin(phase + shift) * width, Math.max(0, Math.cos(phase + shift)) * width * 0.7];
  return posture({lean, hip: 0.4, feet: [foot(0), foot(Math.PI)], hands: [[0.1 - Math.sin(phase) * width, 0.5], [0.1 + Math.sin(phase) * width, 0.5]]});
}

function airborne(fighter, name) {
  const rising = (fighter.speed_y ?? 0) > 0.3;
  if (name.startsWith("FallSpecial")) return posture({lean: 0.3, feet: [[0.08, 0.02], [-0.1, 0.06]], hands: [[0.25, 0.9], [-0.2, 0.92]]});
  if (name.startsWith("JumpAerial")) return posture({spin: -0.25, feet: [[0.14, 0.2], [-0.06, 0.12]], hands: [[0.28, 0.75], [-0.26, 0.72]]});
  if (rising) return posture({lean: 0.12, feet: [[0.12, 0.2], [-0.12, 0.0]], hands: [[0.22, 0.82], [-0.2, 0.4]]});
  return posture({lean: 0.02, feet: [[0.13, 0.08], [-0.16, 0.02]], hands: [[0.32, 0.66], [-0.3, 0.68]]});
}

function hit(fighter, name, age) {
  if (/^DownBound|^DownWait|^DownDamage|^DownSpot/.test(name)) return posture({spin: Math.PI / 2, lie: true, hands: [[0.2, 0.8], [-0.1, 0.5]]});
  if (/^Down/.test(name)) return posture({hip: 0.24, lean: 0.6, hands: [[0.3, 0.1], [-0.1, 0.2]]});
  if (/Roll|DamageFall/.test(name)) return posture({spin: age * 0.28, feet: [[0.16, 0.15], [-0.1, 0.1]], hands: [[0.25, 0.6], [-0.2, 0.6]]});
  if (/^DamageFly|^ShieldBreakF/.test(name)) return posture({spin: 0.9, lean: -0.3, feet: [[0.25, 0.1], [0.05, 0.02]], hands: [[0.3, 0.75], [0.2, 0.9]]});
  if (/^FuraFura/.test(name)) return posture({lean: Math.sin(age / 14) * 0.25, hands: [[0.14, 0.35], [-0.14, 0.35]]});
  if (/^Capture|^Thrown/.test(name)) return posture({lean: -0.25, feet: [[0.05, 0.06], [-0.1, 0.02]], hands: [[0.1, 0.5], [-0.15, 0.5]]});
  return posture({lean: -0.42, hip: 0.4, feet: [[0.2, 0], [-0.08, 0]], hands: [[0.3, 0.62], [0.12, 0.78]]});
}

function evading(name, age) {
  if (/^Guard/.test(name)) return posture({hip: 0.34, lean: 0.12, hands: [[0.24, 0.6], [0.2, 0.46]]});
  if (/^Escape[FB]|^PassiveStand/.test(name)) return posture({ball: true, spin: (name.endsWith("B") ? 1 : -1) * age * 0.3});
  if (name === "EscapeAir") return posture({spin: -0.4, feet: [[0.1, 0.24], [-0.05, 0.2]], hands: [[0.2, 0.66], [0.16, 0.5]]});
  return posture({hip: 0.4, lean: -0.2, hands: [[0.1, 0.6], [0.05, 0.5]]});
}

/** The posture of a fighter on this frame; `height` in game units. */
export function poseOf(fighter, height) {
  const {name, category} = fighter.action, age = Math.max(0, fighter.state_age ?? 0);
  if (/^Attack/.test(name)) return attack(name, age, fighter.grounded);
  if (/^CliffCatch|^CliffWait/.test(name)) return posture({lean: -0.05, feet: [[0.02, 0.05], [-0.08, 0]], hands: [[0.24, 1.02], [0.18, 1.02]]});
  if (/^Catch|^Throw(F|B|Hi|Lw)$/.test(name)) return posture({lean: 0.25, feet: [[0.2, 0], [-0.2, 0]], hands: [[0.46, 0.58], [0.42, 0.5]]});
  if (/^Squat|^Landing|^KneeBend/.test(name)) return posture({hip: 0.24, lean: 0.3, feet: [[0.18, 0], [-0.16, 0]], hands: [[0.26, 0.3], [-0.16, 0.26]]});
  if (category === "damage" || /^Down|^Shoulder/.test(name)) return hit(fighter, name, age);
  if (category === "shield_dodge" || /^Passive/.test(name)) return evading(name, age);
  if (/^Walk/.test(name)) return steps(fighter, height, 0.14, 0.1);
  if (/^Dash|^Run$|^RunDirect/.test(name)) return steps(fighter, height, 0.28, 0.38);
  if (/^RunBrake|^TurnRun/.test(name)) return posture({lean: -0.3, feet: [[0.3, 0], [0.02, 0]], hands: [[0.3, 0.5], [-0.3, 0.6]]});
  if (category === "special") return posture({lean: 0.1, glow: true, feet: fighter.grounded ? [[0.2, 0], [-0.2, 0]] : [[0.12, 0.12], [-0.14, 0.06]], hands: [[0.4, 0.62], [0.32, 0.52]]});
  if (/^Appeal/.test(name)) return posture({lean: -0.05, hands: [[0.18, 0.95], [-0.14, 0.44]]});
  return fighter.grounded ? posture({}) : airborne(fighter, name);
}
