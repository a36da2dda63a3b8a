/** The picture of a match: stage, blast zones, fighters, projectiles, trails and ghosts, on one canvas. */
import {Camera} from "./camera.js";
import {PLAYER_COLORS} from "./cast.js";
import {drawFigure} from "./figure.js";

const TRAIL_JUMP = 40;          // a longer step between two frames is no movement but a return to the stage

/** The floor's broken line from ledge to ledge, and the segments that are platforms. */
export function floorAndPlatforms(stage) {
  const [[left], [right]] = stage.ledges, floor = [], platforms = [];
  for (const segment of stage.segments) {
    const [x0, y0, x1] = segment, end = floor.at(-1);
    const continues = end ? x0 === end[0] && y0 === end[1] : x0 === left && Math.abs(y0 - stage.ledges[0][1]) < 1e-6;
    if (continues && x1 <= right) { if (!end) floor.push([x0, y0]); floor.push([segment[2], segment[3]]); }
    else platforms.push(segment);
  }
  return {floor, platforms};
}

/** One canvas with its camera. */
export class Scene {
  constructor(canvas) {
    this.canvas = canvas;
    this.ctx = canvas.getContext("2d");
    this.camera = new Camera();
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    this.before = 0;
    this.sized = new ResizeObserver(([entry]) => this.resize(entry));
    this.sized.observe(canvas);
  }

  /** As many pixels as the screen has. */
  resize({contentRect}) {
    this.canvas.width = Math.max(1, Math.round(contentRect.width * devicePixelRatio));
    this.canvas.height = Math.max(1, Math.round(contentRect.height * devicePixelRatio));
    this.onresize?.();
  }

  /** Draw a frame. `extras`: {trail: views, ghosts: said, old: view, whole: the whole stage, follow: whom the camera keeps in sight, cut: do not ease}. */
  render(view, stage, extras = {}, time = performance.now()) {
    const {ctx, canvas} = this, elapsed = Math.min(0.1, (time - this.before) / 1000);
    this.before = time;
    this.camera.still = extras.whole || this.calm.matches;
    if (extras.cut) this.camera.cut();
    const place = this.camera.follow(stage, extras.follow ?? view?.players ?? [], canvas, elapsed);
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    this.background(stage, place);
    this.stage(stage, place);
    if (!view) return;
    if (extras.trail && !this.calm.matches) this.trail(extras.trail, place);
    if (extras.ghosts) this.ghosts(extras.ghosts, place);
    if (extras.old) extras.old.players.forEach((fighter, player) => { if (!fighter.dead) drawFigure(ctx, fighter, player, place, {alpha: 0.3, plain: true}); });
    view.players.forEach((fighter, player) => fighter.dead ? this.burst(fighter, player, stage, place) : drawFigure(ctx, fighter, player, place, {calm: this.calm.matches}));
    for (const item of view.items) this.projectile(item, place);
    view.players.forEach((fighter, player) => { if (!fighter.dead) this.tag(fighter, player, place); });
  }

  background(stage, place) {
    const {ctx, canvas} = this, [left, right, top, bottom] = stage.blast_zone;
    ctx.fillStyle = "#0a0c10";
    ctx.fillRect(0, 0, canvas.width, canvas.height);
    const [x0, y0] = place.at(left, top), [x1, y1] = place.at(right, bottom);
    const sky = ctx.createLinearGradient(0, y0, 0, y1);
    sky.addColorStop(0, "#161c2a"); sky.addColorStop(0.62, "#1b2230"); sky.addColorStop(1, "#11151d");
    ctx.fillStyle = sky;
    ctx.fillRect(x0, y0, x1 - x0, y1 - y0);
    ctx.strokeStyle = "rgb(255 255 255 / 0.035)";
    ctx.lineWidth = 1;
    ctx.beginPath();
    for (let x = Math.ceil(left / 25) * 25; x <= right; x += 25) { const [px] = place.at(x, 0); ctx.moveTo(Math.round(px) + 0.5, y0); ctx.lineTo(Math.round(px) + 0.5, y1); }
    for (let y = Math.ceil(bottom / 25) * 25; y <= top; y += 25) { const [, py] = place.at(0, y); ctx.moveTo(x0, Math.round(py) + 0.5); ctx.lineTo(x1, Math.round(py) + 0.5); }
    ctx.stroke();
    ctx.setLineDash([6 * devicePixelRatio, 6 * devicePixelRatio]);
    ctx.strokeStyle = "rgb(255 107 107 / 0.55)";
    ctx.lineWidth = 1.5 * devicePixelRatio;
    ctx.strokeRect(x0, y0, x1 - x0, y1 - y0);
    ctx.setLineDash([]);
  }

  stage(stage, place) {
    const {ctx} = this, {floor, platforms} = floorAndPlatforms(stage), corner = point => place.at(...point);
    const [left, right] = [floor[0], floor.at(-1)], middle = (left[0] + right[0]) / 2, width = right[0] - left[0];
    const under = [[right[0] - 3, right[1] - 7], [middle + width * 0.3, right[1] - 22], [middle + width * 0.08, right[1] - 34],
                   [middle - width * 0.08, left[1] - 34], [middle - width * 0.3, left[1] - 22], [left[0] + 3, left[1] - 7]];
    const [, from] = place.at(0, 2), [, to] = place.at(0, -36), rock = ctx.createLinearGradient(0, from, 0, to);
    rock.addColorStop(0, "#39445a"); rock.addColorStop(0.25, "#2a3344"); rock.addColorStop(1, "rgb(32 39 52 / 0.15)");
    ctx.fillStyle = rock;
    ctx.beginPath();
    [...floor, ...under].forEach((point, i) => i ? ctx.lineTo(...corner(point)) : ctx.moveTo(...corner(point)));
    ctx.fill();
    ctx.strokeStyle = "#b9c6dc";
    ctx.lineJoin = "round"; ctx.lineCap = "butt";
    ctx.lineWidth = Math.max(2, 0.9 * place.scale);
    ctx.beginPath();
    floor.forEach((point, i) => i ? ctx.lineTo(...corner(point)) : ctx.moveTo(...corner(point)));
    ctx.stroke();
    ctx.lineCap = "round";
    for (const [x0, y0, x1, y1] of platforms) {
      ctx.strokeStyle = "rgb(70 84 110 / 0.7)"; ctx.lineWidth = Math.max(3, 2.2 * place.scale);
      ctx.beginPath(); ctx.moveTo(...place.at(x0 + 1, y0 - 1.1)); ctx.lineTo(...place.at(x1 - 1, y1 - 1.1)); ctx.stroke();
      ctx.strokeStyle = "#94a5c2"; ctx.lineWidth = Math.max(1.5, 0.7 * place.scale);
      ctx.beginPath(); ctx.moveTo(...place.at(x0, y0)); ctx.lineTo(...place.at(x1, y1)); ctx.stroke();
    }
  }

  /** Where the fighters came from: thin at the old end. */
  trail(views, place) {
    const {ctx} = this;
    ctx.lineCap = "butt";
    for (const player of [0, 1]) for (let i = 1; i < views.length; i++) {
      const one = views[i - 1].players[player], other = views[i].players[player];
      if (one.dead || other.dead || Math.hypot(other.x - one.x, other.y - one.y) > TRAIL_JUMP) continue;
      ctx.strokeStyle = PLAYER_COLORS[player];
      ctx.globalAlpha = 0.35 * i / views.length;
      ctx.lineWidth = Math.max(1, 2.4 * place.scale * i / views.length);
      ctx.beginPath(); ctx.moveTo(...place.at(one.x, one.y + 6)); ctx.lineTo(...place.at(other.x, other.y + 6)); ctx.stroke();
    }
    ctx.globalAlpha = 1;
  }

  /** Sampled futures, one thin line each with a dot where it ends. */
  ghosts({x, y}, place) {
    const {ctx} = this;
    for (const player of [0, 1]) for (let sample = 0; sample < x.length; sample++) {
      const path = x[sample].map((frame, i) => place.at(frame[player], y[sample][i][player] + 6));
      ctx.strokeStyle = ctx.fillStyle = PLAYER_COLORS[player];
      ctx.globalAlpha = 0.45;
      ctx.lineWidth = Math.max(1, 0.45 * place.scale);
      ctx.beginPath(); path.forEach((point, i) => i ? ctx.lineTo(...point) : ctx.moveTo(...point)); ctx.stroke();
      ctx.globalAlpha = 0.8;
      ctx.beginPath(); ctx.arc(...path.at(-1), Math.max(2, 1.1 * place.scale), 0, 2 * Math.PI); ctx.fill();
    }
    ctx.globalAlpha = 1;
  }

  projectile({x, y, owner}, place) {
    const {ctx} = this, [px, py] = place.at(x, y);
    ctx.fillStyle = PLAYER_COLORS[owner];
    ctx.globalAlpha = 0.3; ctx.beginPath(); ctx.ellipse(px, py, 5 * place.scale, 1.8 * place.scale, 0, 0, 2 * Math.PI); ctx.fill();
    ctx.globalAlpha = 1; ctx.fillStyle = "#fff"; ctx.beginPath(); ctx.ellipse(px, py, 3 * place.scale, 0.8 * place.scale, 0, 0, 2 * Math.PI); ctx.fill();
  }

  /** A lost stock: rays from the edge where the fighter went out. */
  burst(fighter, player, stage, place) {
    const {ctx} = this, [left, right, top, bottom] = stage.blast_zone, age = fighter.state_age ?? 0;
    if (age > 60 || fighter.action.id > 10) return;
    const [x, y] = place.at(Math.max(left, Math.min(right, fighter.x)), Math.max(bottom, Math.min(top, fighter.y)));
    ctx.strokeStyle = PLAYER_COLORS[player];
    ctx.globalAlpha = Math.max(0, 1 - age / 60);
    ctx.lineWidth = Math.max(2, 1.6 * place.scale);
    for (let i = 0; i < 14; i++) { const angle = i * Math.PI / 7, near = (8 + age * 0.6) * place.scale, far = (26 + age) * place.scale;
      ctx.beginPath(); ctx.moveTo(x + Math.cos(angle) * near, y + Math.sin(angle) * near); ctx.lineTo(x + Math.cos(angle) * far, y + Math.sin(angle) * far); ctx.stroke(); }
    ctx.globalAlpha = 1;
  }

  /** A small mark above each fighter; at the border of the picture for one who has left it. */
  tag(fighter, player, place) {
    const {ctx, canvas} = this, size = 11 * devicePixelRatio, [px, py] = place.at(fighter.x, fighter.y + 24);
    const x = Math.max(size, Math.min(canvas.width - size, px)), y = Math.max(size * 2, Math.min(canvas.height - size, py));
    ctx.fillStyle = PLAYER_COLORS[player];
    ctx.font = `600 ${size}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    ctx.fillText(`P${player + 1}`, x, y - size * 0.55);
    ctx.beginPath(); ctx.moveTo(x - size * 0.35, y - size * 0.35); ctx.lineTo(x + size * 0.35, y - size * 0.35); ctx.lineTo(x, y); ctx.fill();
  }
}
