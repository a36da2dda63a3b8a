/** How the fighters look: heights in game units and a few features to tell them by. Rough, and only for the picture. */

export const PLAYER_COLORS = ["#ff8a5c", "#5ab4ff"];
export const PLAYER_LIGHT = ["#ffd9c4", "#d3ebff"];
export const PLAYER_DARK = ["#a9482a", "#2668a8"];

const LOOKS = {                       // [height, bulk, features]
  "Captain Falcon": [17.5, 1.05, "visor"], "Donkey Kong": [17, 1.7, "arms"], Fox: [13, 0.8, "ears tail"], "Mr. Game & Watch": [12, 0.9, "flat"], Kirby: [8.5, 1, "ball"],
  Bowser: [19, 1.75, "horns shell tail"], Link: [15.5, 0.95, "sword ears"], Luigi: [15, 0.95, "cap"], Mario: [12.5, 1.15, "cap"], Marth: [16, 0.85, "sword hair"],
  Mewtwo: [17, 0.8, "horns tail"], Ness: [10, 1.1, "cap"], Peach: [15.5, 0.8, "skirt hair"], Pikachu: [8.5, 1.35, "ears tail"], "Ice Climbers": [9.5, 1.3, "hood"],
  Jigglypuff: [8.5, 1, "ball ears"], Samus: [17.5, 1.2, "visor cannon"], Yoshi: [13.5, 1.15, "tail snout"], Zelda: [16, 0.8, "skirt ears hair"], Sheik: [15.5, 0.75, "hair"],
  Falco: [14.5, 0.75, "beak tail"], "Young Link": [11, 1, "sword ears"], "Dr. Mario": [12.5, 1.2, "coat"], Roy: [14.5, 0.9, "sword hair"], Pichu: [7, 1.35, "ears tail"],
  Ganondorf: [19.5, 1.25, "cape hair"], Popo: [9.5, 1.3, "hood"],
};

/** A fighter's height, bulk and features by name. */
export function looksOf(name) {
  const [height, bulk, features] = LOOKS[name] ?? [14, 1, ""];
  return {height, bulk, features: new Set(features.split(" "))};
}
