/** The camera: keeps both fighters in the picture, and never shows much beyond the blast zones. */

const NARROWEST = 140, SIDE = 36, ABOVE = 34, BELOW = 30, HALF_TIME = 0.16;   // game units; seconds to half the way

/** Eases after the fighters; with `still` it shows the whole stage and does not move. */
export class Camera {
  constructor() { this.view = null; this.still = false; }

  /** Jump, instead of easing, at the next frame. */
  cut() { this.view = null; }

  /** The rectangle of game units to show: {x, y, width} around its centre. */
  target(stage, fighters, aspect) {
    const [left, right, top, bottom] = stage.blast_zone;
    const widest = Math.max(right - left, (top - bottom) * aspect) * 1.04;
    const seen = fighters.filter(fighter => !fighter.dead && Number.isFinite(fighter.x));
    if (this.still) return {x: (left + right) / 2, y: (top + bottom) / 2, width: widest};
    if (!seen.length) return {x: 0, y: 20, width: Math.min(widest, NARROWEST * 1.5)};
    const xs = seen.map(fighter => fighter.x), ys = seen.map(fighter => fighter.y);
    const west = Math.min(...xs) - SIDE, east = Math.max(...xs) + SIDE, south = Math.min(...ys) - BELOW, north = Math.max(...ys) + ABOVE;
    const width = Math.min(widest, Math.max(NARROWEST, east - west, (north - south) * aspect)), height = width / aspect;
    const within = (value, low, high) => low > high ? (low + high) / 2 : Math.max(low, Math.min(high, value));
    const margin = 0.02 * width;
    return {x: within((west + east) / 2, left + width / 2 - margin, right - width / 2 + margin),
            y: within((south + north) / 2, bottom + height / 2 - margin, top - height / 2 + margin), width};
  }

  /** Follow for so many seconds and return the mapping from game units to pixels. */
  follow(stage, fighters, pixels, seconds) {
    const aim = this.target(stage, fighters, pixels.width / pixels.height);
    const share = this.view && !this.still ? 1 - 0.5 ** (seconds / HALF_TIME) : 1;
    this.view ??= aim;
    for (const name of ["x", "y", "width"]) this.view[name] += (aim[name] - this.view[name]) * share;
    const {x, y, width} = this.view, scale = pixels.width / width;
    return {scale, at: (gx, gy) => [pixels.width / 2 + (gx - x) * scale, pixels.height / 2 - (gy - y) * scale]};
  }
}
