/** The page: asks what is offered, opens the engine, and puts Play and Watch to work. */
import {Devices} from "./devices.js";
import {KeysPanel} from "./keys.js";
import {Play} from "./play.js";
import {Setup} from "./setup.js";
import {Watch} from "./watch.js";
import {byId, notice} from "./elements.js";
import {openEngine} from "./engine.js";

/** Show one of the two tabs. */
function openTab(name) {
  for (const each of ["play", "watch"]) {
    const chosen = each === name, tab = byId(`${each}-tab`);
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    byId(`${each}-panel`).hidden = !chosen;
  }
}

function wireTabs(play) {
  const leave = () => { if (play.match && !play.state?.paused) play.send({do: "pause"}); };
  byId("play-tab").addEventListener("click", () => openTab("play"));
  byId("watch-tab").addEventListener("click", () => { leave(); openTab("watch"); });
  for (const [from, to] of [["play", "watch"], ["watch", "play"]]) byId(`${from}-tab`).addEventListener("keydown", event => {
    if (event.code === "ArrowLeft" || event.code === "ArrowRight") { byId(`${to}-tab`).click(); byId(`${to}-tab`).focus(); }
  });
}

/** Take in a file for one of the tabs: a replay goes to the engine, a rollout is shown as it is. */
async function takeIn(file, tab, {about, engine, setup, watch}) {
  try {
    if (/\.json$/i.test(file.name)) {
      watch.open(JSON.parse(await file.text()), file.name);
      openTab("watch");
      notice();
      return;
    }
    const most = about.limits?.replay_bytes ?? Infinity;
    if (file.size > most) throw new Error(`${(file.size / 1e6).toFixed(0)} MB is more than the ${(most / 1e6).toFixed(0)} MB that are taken`);
    notice(`Reading ${file.name} …`, true);
    const info = await engine.upload(file);
    notice();
    openTab(tab);
    if (tab === "watch") await watch.useReplay(info, file.name);
    else setup.useReplay(info, file.name);
  } catch (error) { notice(`${file.name} cannot be opened: ${error.message}`); }
}

function wireFiles(parts) {
  for (const [button, input, tab] of [["open-replay", "file", "play"], ["open-watch", "watch-file", "watch"], ["open-another", "watch-file", "watch"]]) {
    byId(button).addEventListener("click", () => byId(input).click());
    if (button !== "open-another") byId(input).addEventListener("change", ({target}) => { if (target.files[0]) takeIn(target.files[0], tab, parts); target.value = ""; });
  }
}

/** A rollout that came with the page (about.example names its file), for those who have none at hand. */
function wireExample({about, watch}) {
  const button = byId("open-example");
  button.hidden = !about.example;
  button.addEventListener("click", async () => {
    try { watch.open(await (await fetch(about.example)).json(), "an example"); } catch (error) { notice(`The example cannot be opened: ${error.message}`); }
  });
}

/** Files dropped anywhere: the zone under the pointer says what becomes of them. */
function wireDrops(parts) {
  const veil = byId("drop");
  const zoneOf = event => event.target.closest?.(".zone");
  addEventListener("dragenter", event => { if (event.dataTransfer?.types.includes("Files")) veil.hidden = false; });
  addEventListener("dragover", event => {
    event.preventDefault();
    for (const zone of veil.children) zone.classList.toggle("over", zone === zoneOf(event));
  });
  veil.addEventListener("dragleave", event => { if (!event.relatedTarget) veil.hidden = true; });
  addEventListener("drop", event => {
    event.preventDefault();
    veil.hidden = true;
    const [file] = event.dataTransfer?.files ?? [], tab = zoneOf(event)?.dataset.to ?? (byId("watch-panel").hidden ? "play" : "watch");
    if (file) takeIn(file, tab, parts);
  });
}

/** What stands in the corner: which model this is, and where it runs. Without a server there are no .slp files, and nothing that needs them. */
function introduce(about) {
  const {name, parameters} = about.model;
  const alone = about.engine === "browser";
  for (const id of ["origin", "download-slp", "welcome-replay"]) byId(id).hidden = alone;
  byId("welcome-rollout").hidden = !alone;
  byId("model").textContent = `${name} · ${(parameters / 1e6).toFixed(1)} M parameters · ${alone ? "runs in this page" : "runs on the server"}`;
}

async function open() {
  const response = await fetch("about.json");
  if (!response.ok) throw new Error(`about.json: ${response.status} ${response.statusText}`);
  const about = await response.json();
  introduce(about);
  if (about.engine === "browser") notice("Loading the model …", true);
  const engine = await openEngine(about, (done, of) => notice(`Loading the model … ${of ? Math.round(100 * done / of) : 0}%`, true)), devices = new Devices(), setup = new Setup(about, devices);
  const play = new Play(about, engine, devices, setup), watch = new Watch(about, engine);
  const parts = {about, engine, setup, watch};
  new KeysPanel(byId("keys"), devices, setup);
  watch.ontakeover = (info, frame) => { setup.useReplay(info, watch.name); setup.moveTo(frame); setup.setControllers(["person", "replay"]); openTab("play"); play.begin(setup.command()); };
  wireTabs(play);
  wireFiles(parts);
  wireDrops(parts);
  wireExample(parts);
  window.melee = {about, info: () => ({match: play.match, state: play.state, frame: play.history.present, dropped: play.history.dropped.size, row: watch.rollout ? watch.row : null}),
    get view() { const numbers = play.match && play.history.frames.get(play.history.present); return numbers ? play.view(numbers) : null; }, watch};
  notice();
  for (const id of ["begin", "first-begin"]) byId(id).disabled = false;
  document.documentElement.dataset.ready = "true";
}

open().catch(error => { notice(`The page cannot start: ${error.message}`); console.error(error); });
