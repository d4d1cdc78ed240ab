// Volumes in three planes and 3-D: one screen, or several whose crosshairs go together.
import * as api from "./api.js";
import { el, say, short } from "./dom.js";
import { store } from "./store.js";

let library = null;

function loaded() {
  library ||= new Promise((resolve, reject) => {
    const script = el("script", { src: "assets/niivue.js" });
    script.addEventListener("load", resolve);
    script.addEventListener("error", () => reject(new Error("the viewer's library was not loaded")));
    document.head.append(script);
  });
  return library;
}

const ramp = (steps) => ({
  R: steps.map((s) => s[0]), G: steps.map((s) => s[1]), B: steps.map((s) => s[2]),
  A: steps.map((_, i) => (i ? 255 : 0)),
  I: steps.map((_, i) => Math.round((255 * i) / (steps.length - 1))),
});

// Without a graphics card the processor draws: a rendering then takes seconds, so that it is shown when asked for.
function slow() {
  const gl = document.createElement("canvas").getContext("webgl2");
  const info = gl?.getExtension("WEBGL_debug_renderer_info");
  const name = info ? gl.getParameter(info.UNMASKED_RENDERER_WEBGL) : "";
  gl?.getExtension("WEBGL_lose_context")?.loseContext();
  return /swiftshader|llvmpipe|softpipe|software/i.test(name);
}

export const PLANES = 10;  // the three planes without the rendering: a view of this page, not of the library
const views = (nv, flat) => {
  nv.opts.multiplanarShowRender = look.view === PLANES ? 0 : 1;
  nv.opts.multiplanarLayout = look.view === PLANES ? 0 : 2;  // planes alone go as they fit, with the rendering in a square
  nv.setSliceType(flat ? 0 : look.view === PLANES ? 3 : look.view);
};

// How a map is drawn, the same for all screens.
export const look = { threshold: 0.3, opacity: 0.85, window: 1, fade: true, smooth: true, view: slow() ? PLANES : 3, symmetric: true, outline: false };

export class Screen {
  constructor(moved) {
    this.canvas = el("canvas", { tabindex: "0", role: "img", "aria-label": "Planes and a rendering of the image with a map in colour" });
    this.caption = el("figcaption");
    this.root = el("figure", { class: "screen" }, this.canvas, this.caption);
    this.moved = moved;
    this.work = Promise.resolve();
    this.parts = {};
  }

  async start() {
    await loaded();
    if (!document.createElement("canvas").getContext("webgl2")) throw new Error("this browser has no WebGL 2");
    this.nv = new niivue.Niivue({
      logLevel: "error", dragAndDropEnabled: false, isRadiologicalConvention: true, sagittalNoseLeft: true,
      multiplanarShowRender: 1, multiplanarLayout: 2, multiplanarPadPixels: 4, backColor: [0, 0, 0, 1],
      crosshairColor: [0.55, 0.85, 0.55, 0.6], crosshairWidth: 0.25, show3Dcrosshair: false, isColorbar: false,
      loadingText: "", scrollRequiresFocus: true, clipPlaneColor: [0, 0, 0, 0], clipPlaneHotKey: "",
      cycleClipPlaneHotKey: "", viewModeHotKey: "",
    });
    this.nv.onLocationChange = (location) => this.moved(this, location);
    await this.nv.attachToCanvas(this.canvas, false);
    this.nv.addColormap("esegeta_for", ramp(store.about.colours.positive));
    this.nv.addColormap("esegeta_against", ramp(store.about.colours.negative));
    this.nv.addColormap("esegeta_labels", ramp([[90, 200, 120], [90, 200, 120]]));
    views(this.nv, false);
    this.nv.setRenderAzimuthElevation(120, 15);
  }

  // One after the other: what was asked for last is what is seen.
  queue(act) {
    this.work = this.work.then(act).catch((error) => {
      this.root.dataset.state = "failed";
      say(`The viewer: ${error.message}`, true);
    });
    return this.work;
  }

  async image(found, name, colours, opacity, low, high, negative) {
    const signed = negative ? [-low, -high] : [NaN, NaN];
    return niivue.NVImage.new(found.buffer, `${name}.nii`, colours, opacity, null, low, high, true, 0.02, false, false,
      negative || "", 0, 0, signed[0], signed[1], false, null, negative ? (look.fade ? 1 : 2) : 0, null);
  }

  // All volumes at once, so that nothing flickers and each is taken to the graphics card once: the anatomy lies below,
  // the map above it, outlines on top.
  lay(parts) {
    this.parts = parts;
    this.nv.volumes = ["anatomy", "map", "labels"].filter((part) => parts[part]).map((part) => parts[part].image);
    this.nv.back = this.nv.volumes[0] || null;
    this.nv.overlays = this.nv.volumes.slice(1);
    this.flat = (parts.anatomy || parts.map)?.about.full[2] === 1;
    this.colour();
    this.nv.setInterpolation(!look.smooth);
    views(this.nv, this.flat);
    if (this.nv.volumes.length) this.nv.updateGLVolume();
  }

  // A part of the picture: that which is there, if it is the same.
  async part(part, query, make) {
    const key = JSON.stringify(query);
    if (!query) return null;
    if (this.parts[part]?.key === key) return this.parts[part];
    const found = await api.volume(query);
    return { key, about: found.about, image: await make(found) };
  }

  show(what) {
    this.wanted = what;
    return this.queue(async () => {
      if (this.wanted !== what) return;
      if (!this.nv) await this.start();
      this.root.dataset.state = "reading";
      this.caption.textContent = what.title;
      const grey = (found) => this.image(found, "image", "gray", 1, 24, 255);
      const colour = (found) => this.image(found, "map", "esegeta_for", look.opacity, 0, found.about.end, "esegeta_against");
      const green = (found) => this.image(found, "labels", "esegeta_labels", 0.35, 0.5, 1);
      const anatomy = await this.part("anatomy", what.anatomy && { ...what.anatomy, level: "fine" }, grey);
      const labels = await this.part("labels", what.labels && (look.outline || what.always) ? { ...what.labels, level: "fine" } : null, green);
      const fine = what.map && { ...what.map, level: "fine" };
      const again = fine && this.parts.map?.key === JSON.stringify(fine);
      let map = fine && await this.part("map", again ? fine : { ...what.map, level: "preview" }, colour);
      if (this.wanted !== what) return;
      this.lay({ anatomy, map, labels });
      if (map && !this.seen) { this.seen = true; this.go(map.about.peak); }
      if (what.map) this.root.dataset.shown = what.map.job;
      if (map && JSON.stringify(map.about.shape) === JSON.stringify(map.about.full)) map.key = JSON.stringify(fine);
      else if (map && !again) {
        map = await this.part("map", fine, colour);
        if (this.wanted !== what) return;
        this.lay({ anatomy, map, labels });
      }
      this.root.dataset.state = "ready";
    });
  }

  colour() {
    const { map } = this.parts;
    if (!map) return;
    const end = map.about.end * look.window, low = look.threshold * end;
    Object.assign(map.image, { cal_min: low, cal_max: end, cal_minNeg: look.symmetric ? -low : NaN, cal_maxNeg: look.symmetric ? -end : NaN });
    map.image.colormapType = look.fade ? 1 : 2;
    map.image.opacity = look.opacity;
  }

  dress() {
    this.queue(() => this.lay(this.parts));
  }

  go(mm, tellOthers = true) {
    if (!this.nv || !this.nv.volumes.length) return;
    this.nv.scene.crosshairPos = this.nv.mm2frac(mm);
    this.nv.drawScene();
    if (tellOthers) this.nv.createOnLocationChange();
  }

  // The value of the map at a place in mm, as exactly as the copy has it.
  value(mm) {
    const { map } = this.parts;
    if (!map) return "";
    const voxel = map.image.mm2vox(mm);
    const found = map.image.getValue(...voxel);
    return Number.isFinite(found) ? `${short(found * map.about.step)} ± ${short(map.about.step / 2)}` : "";
  }

  close() {
    const context = this.canvas.getContext("webgl2");
    context?.getExtension("WEBGL_lose_context")?.loseContext();
    this.root.remove();
  }
}

export class Screens {
  constructor(where) {
    this.root = el("div", { class: "screens" });
    this.where = where;
    this.all = [];
    this.busy = false;
  }

  moved(screen, location) {
    if (this.busy) return;
    this.busy = true;
    const mm = [...location.mm].slice(0, 3);
    for (const other of this.all) if (other !== screen) other.go(mm, false);
    this.busy = false;
    this.mm = mm;
    const words = mm.map((v) => v.toFixed(0));
    const values = this.all.map((one) => [one.caption.textContent, one.value(mm)]).filter((pair) => pair[1]);
    this.where.textContent = `right ${words[0]}, front ${words[1]}, up ${words[2]} mm${values.map(([name, value]) => `; ${name} ${value}`).join("")}`;
  }

  show(list) {
    while (this.all.length > Math.max(1, list.length)) this.all.pop().close();
    while (this.all.length < list.length) {
      const screen = new Screen((one, location) => this.moved(one, location));
      this.all.push(screen);
      this.root.append(screen.root);
    }
    this.root.className = `screens n${this.all.length}`;
    list.forEach((what, n) => this.all[n].show(what));
  }

  // A slider gives many values while it is moved: what is drawn is the last.
  dress() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => { for (const screen of this.all) if (screen.nv) screen.dress(); }, 30);
  }

  // Only the view: nothing is read again.
  turn() {
    for (const screen of this.all) if (screen.nv) screen.queue(() => { views(screen.nv, screen.flat); screen.nv.drawScene(); });
  }

  again() { for (const screen of this.all) if (screen.wanted) screen.show({ ...screen.wanted }); }
}
