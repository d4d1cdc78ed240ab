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

// How a map is drawn, the same for all screens.
export const look = { threshold: 0.3, opacity: 0.85, window: 1, fade: true, smooth: true, view: 3, symmetric: true, outline: false };

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
    this.nv.setSliceType(look.view);
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

  // Put a volume where the one before it was: both at once, so that nothing flickers.
  place(part, image, about) {
    const before = this.parts[part];
    if (image) this.nv.addVolume(image);
    if (before && this.nv.volumes.includes(before.image)) this.nv.removeVolume(before.image);
    if (image) this.parts[part] = { image, about }; else delete this.parts[part];
    this.order();
  }

  // The anatomy lies below, the map above it, outlines on top.
  order() {
    ["anatomy", "map", "labels"].filter((part) => this.parts[part])
      .forEach((part, n) => this.nv.setVolume(this.parts[part].image, n));
  }

  show(what) {
    this.wanted = what;
    return this.queue(async () => {
      if (this.wanted !== what) return;
      if (!this.nv) await this.start();
      this.root.dataset.state = "reading";
      this.caption.textContent = what.title;
      const key = (part) => JSON.stringify([what[part], what.stamp]);
      if (this.anatomy !== key("anatomy")) {
        if (what.anatomy) {
          const found = await api.volume({ ...what.anatomy, level: "fine" });
          this.place("anatomy", await this.image(found, "image", "gray", 1, 24, 255), found.about);
        } else this.place("anatomy", null);
        this.anatomy = key("anatomy");
        this.flat = (this.parts.anatomy?.about.full || [2, 2, 2])[2] === 1;
      }
      for (const level of ["preview", "fine"]) {
        if (this.wanted !== what || !what.map) break;
        if (level === "preview" && this.shown === key("map")) continue;
        const found = await api.volume({ ...what.map, level });
        const end = found.about.end * look.window;
        this.place("map", await this.image(found, "map", "esegeta_for", look.opacity, look.threshold * end, end, "esegeta_against"), found.about);
        if (level === "preview" && !this.seen) { this.seen = true; this.go(found.about.peak); }
        this.root.dataset.shown = what.map.job;
        if (JSON.stringify(found.about.shape) === JSON.stringify(found.about.full)) break;
      }
      if (!what.map) this.place("map", null);
      this.shown = key("map");
      const labels = what.labels && (look.outline || what.always) ? what.labels : null;
      if (labels) {
        const found = await api.volume({ ...labels, level: "fine" });
        this.place("labels", await this.image(found, "labels", "esegeta_labels", 0.35, 0.5, 1), found.about);
      } else this.place("labels", null);
      this.dress();
      this.nv.setSliceType(this.flat ? 0 : look.view);
      this.root.dataset.state = "ready";
    });
  }

  dress() {
    const map = this.parts.map;
    if (map) {
      const end = map.about.end * look.window, low = look.threshold * end;
      Object.assign(map.image, { cal_min: low, cal_max: end, cal_minNeg: look.symmetric ? -low : NaN, cal_maxNeg: look.symmetric ? -end : NaN });
      map.image.colormapType = look.fade ? 1 : 2;
      map.image.opacity = look.opacity;
    }
    this.nv.setInterpolation(!look.smooth);
    this.nv.updateGLVolume();
  }

  go(mm, tellOthers = true) {
    if (!this.nv || !this.nv.volumes.length) return;
    this.nv.scene.crosshairPos = this.nv.mm2frac(mm);
    this.nv.drawScene();
    if (tellOthers) this.nv.createOnLocationChange();
  }

  value(location) {
    const map = this.parts.map;
    const index = map ? this.nv.volumes.indexOf(map.image) : -1;
    const found = index >= 0 && location.values[index];
    return found ? `${short(found.value * map.about.step)} ± ${short(map.about.step / 2)}` : "";
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
    const values = this.all.map((one) => [one.caption.textContent, one === screen ? one.value(location) : ""]).filter((pair) => pair[1]);
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

  dress() {
    for (const screen of this.all) if (screen.nv) screen.queue(() => { screen.nv.setSliceType(screen.flat ? 0 : look.view); screen.dress(); });
  }

  again() { for (const screen of this.all) if (screen.wanted) screen.show({ ...screen.wanted }); }
}
