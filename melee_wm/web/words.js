/** The game's names of actions in plain words. */

const WHOLE = {
  Wait: "standing", Sleep: "out", Rebirth: "coming back", RebirthWait: "on the halo", Turn: "turning", TurnRun: "turning around", Dash: "dashing", Run: "running",
  RunDirect: "running", RunBrake: "braking", KneeBend: "about to jump", DamageFall: "tumbling", Squat: "crouching", SquatWait: "crouching", SquatRv: "standing up",
  Landing: "landing", LandingFallSpecial: "landing, helpless", AttackDash: "dash attack", GuardOn: "raising the shield", Guard: "shielding", GuardOff: "dropping the shield",
  GuardSetOff: "shield hit", GuardReflect: "power shield", Passive: "tech", PassiveStandF: "tech roll forward", PassiveStandB: "tech roll back", PassiveWall: "wall tech",
  PassiveWallJump: "wall jump", PassiveCeil: "ceiling tech", FuraFura: "dizzy", Catch: "grabbing", CatchPull: "pulling in", CatchDash: "dash grab", CatchDashPull: "pulling in",
  CatchWait: "holding", CatchAttack: "pummel", CatchCut: "grab broken", ThrowF: "forward throw", ThrowB: "back throw", ThrowHi: "up throw", ThrowLw: "down throw",
  EscapeF: "roll forward", EscapeB: "roll back", Escape: "spot dodge", EscapeAir: "air dodge", ReboundStop: "clank", Rebound: "clank", Pass: "dropping through", Ottotto: "teetering",
  OttottoWait: "teetering", MissFoot: "slipping off", CliffCatch: "catching the ledge", CliffWait: "on the ledge", AppealR: "taunt", AppealL: "taunt", Bury: "buried",
  Entry: "entering", EntryStart: "entering", EntryEnd: "entering", DeadDown: "fell out below", DeadLeft: "out to the left", DeadRight: "out to the right", DeadUp: "out at the top",
};

const SIDES = {F: "forward", B: "back", Hi: "up", Lw: "down", N: "neutral"};

/** Patterns, first match wins; `side` is the translated direction. */
const PATTERNS = [
  [/^AttackAir(N|F|B|Hi|Lw)$/, side => `${side} air`],
  [/^LandingAir(N|F|B|Hi|Lw)$/, side => `landing from ${side} air`],
  [/^Attack1(\d)$/, () => "jab"],
  [/^Attack100/, () => "rapid jabs"],
  [/^AttackS3/, () => "forward tilt"],
  [/^AttackS4/, () => "forward smash"],
  [/^Attack(Hi|Lw)3$/, side => `${side} tilt`],
  [/^Attack(Hi|Lw)4$/, side => `${side} smash`],
  [/^Walk/, () => "walking"],
  [/^JumpAerial/, () => "double jump"],
  [/^Jump/, () => "jumping"],
  [/^FallSpecial/, () => "falling, helpless"],
  [/^Fall/, () => "falling"],
  [/^Dead/, () => "out at the top"],
  [/^DamageFlyRoll/, () => "sent spinning"],
  [/^DamageFly/, () => "sent flying"],
  [/^Damage/, () => "hit"],
  [/^(FlyReflect|Stop)(Wall|Ceil)/, () => "bouncing off"],
  [/^DownBound/, () => "bouncing on the floor"],
  [/^DownWait/, () => "lying down"],
  [/^DownStand/, () => "getting up"],
  [/^DownAttack/, () => "get-up attack"],
  [/^DownF/, () => "get-up roll forward"],
  [/^DownBack/, () => "get-up roll back"],
  [/^Down/, () => "lying down"],
  [/^ShieldBreak/, () => "shield broken"],
  [/^Capture/, () => "grabbed"],
  [/^Thrown/, () => "thrown"],
  [/^CliffClimb/, () => "climbing up"],
  [/^CliffAttack/, () => "ledge attack"],
  [/^CliffEscape/, () => "ledge roll"],
  [/^CliffJump/, () => "ledge jump"],
  [/^Special\d*$/, () => "special move"],
];

/** An action's name as a person would say it. */
export function inPlainWords(name) {
  if (WHOLE[name]) return WHOLE[name];
  for (const [pattern, phrase] of PATTERNS) {
    const found = name.match(pattern);
    if (found) return phrase(SIDES[found[1]]);
  }
  return name.replace(/([a-z])([A-Z0-9])/g, "$1 $2").toLowerCase();
}

/** The match clock: eight minutes from the first frame on which one may act. */
export function clock(frame) {
  const left = Math.max(0, 8 * 3600 - Math.max(0, frame));
  const hundredths = String(Math.floor(left % 60 * 100 / 60)).padStart(2, "0");
  return {minutes: `${Math.floor(left / 3600)}:${String(Math.floor(left / 60) % 60).padStart(2, "0")}`, hundredths};
}

/** Seconds with one decimal, for positions on a timeline. */
export function seconds(frames) { return `${(frames / 60).toFixed(1)} s`; }

/** What a controller's name means. */
export const CONTROLLERS = {person: "person", policy: "policy", replay: "replay", neutral: "nobody", random: "random"};
