"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const page = document.documentElement;
  page.classList.add("js");
  const data = JSON.parse($("data").textContent);

  // Tables: a click on a head sorts, a second one turns round; what has no number comes last.
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.textContent = "";
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => {
          const cell = row.cells[column];
          const value = cell.dataset.value;
          return value === undefined ? cell.textContent.trim() : value === "" ? null : Number(value);
        };
        const rows = [...body.rows].map((row, i) => [key(row), i, row]);
        rows.sort(([a, i], [b, j]) => {
          if (a === null || b === null) return (a === null) - (b === null) || i - j;
          const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
          return (up ? order : -order) || i - j;
        });
        body.append(...rows.map((entry) => entry[2]));
      });
    });
  }

  // On paper everything is open.
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("article details, #settings ~ details")) part.open = true;
  });

  if (!$("viewer")) {
    page.dataset.viewer = "none";
    return;
  }

  const say = (text) => { $("state").textContent = text; };
  const bytes = (id) => {
    const text = atob($(id).textContent);
    const found = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i);
    return found;
  };
  const inflated = (id) =>
    new Response(new Blob([bytes(id)]).stream().pipeThrough(new DecompressionStream("gzip")));
  const short = (value) => (value === 0 ? "0" : Number(value.toPrecision(3)).toString().replace(/e\+?/, " × 10^"));

  const LEAST = 24; // of 255: darker than this is air, and invisible in 3-D
  const state = { anatomy: undefined, map: undefined, mask: undefined, first: true };
  let nv;
  let work = Promise.resolve();
  const queue = (job) => { work = work.then(job).catch(fail); return work; };

  function fail(error) {
    page.dataset.viewer = "failed";
    say(`The viewer does not work here (${error.message}). The figures and tables below are complete.`);
  }

  const chosen = () => data.overlays[Number($("choose-map").value)];

  function fill(select, options, keep) {
    select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    const same = options.find(([value, text]) => text === keep);
    if (same) select.value = same[0];
    select.parentNode.hidden = options.length < 2 && select !== $("choose-map");
  }

  const distinct = (values) => [...new Set(values)].map((value) => [value, value]);
  const said = (select) => select.selectedOptions[0] && select.selectedOptions[0].textContent;

  function offer() {
    const subject = $("choose-subject"), target = $("choose-target"), map = $("choose-map");
    if (!subject.options.length) fill(subject, distinct(data.overlays.map((o) => o.subject)));
    const here = data.overlays.filter((o) => o.subject === subject.value);
    fill(target, distinct(here.map((o) => o.target)), said(target));
    const maps = data.overlays.map((o, i) => [o, i]).filter(([o]) => here.includes(o) && o.target === target.value);
    const names = maps.map(([o]) => o.title);
    const unique = (o) => (names.filter((name) => name === o.title).length > 1 ? `${o.title} (${o.method})` : o.title);
    fill(map, maps.map(([o, i]) => [String(i), unique(o)]), said(map));
  }

  async function image(id, name, colours, opacity, low, high, negative) {
    const buffer = await inflated(`volume-${id}`).arrayBuffer();
    const signed = negative ? [-low, -high] : [NaN, NaN];
    return niivue.NVImage.new(
      buffer, `${name}.nii`, colours, opacity, null, low, high, true, 0.02, false, false,
      negative || "", 0, 0, signed[0], signed[1], false, null, negative ? soft() : 0, null);
  }

  // How NiiVue calls it: 1 fades in until the threshold, 2 shows nothing below it. Colours begin at zero in both.
  const soft = () => ($("fade").checked ? 1 : 2);
  const end = () => chosen().end * 10 ** (Number($("window").value) / 20);
  const least = () => (Number($("threshold").value) / 100) * end();

  function scales() {
    const one = chosen(), limit = end();
    $("threshold-said").textContent = `${$("threshold").value} %`;
    $("window-said").textContent = short(limit * one.step);
    $("bar-low").textContent = `−${short(limit * one.step)}`;
    $("bar-high").textContent = short(limit * one.step);
    if (!nv || !state.map) return;
    Object.assign(state.map, { cal_min: least(), cal_max: limit, cal_minNeg: -least(), cal_maxNeg: -limit });
    state.map.colormapType = soft();
    state.map.opacity = Number($("opacity").value) / 100;
    nv.updateGLVolume();
    bar();
  }

  function bar() {
    const canvas = $("bar"), pen = canvas.getContext("2d"), n = canvas.width;
    const hidden = Number($("threshold").value) / 100, opacity = Number($("opacity").value) / 100;
    const at = (steps, share) => {
      const x = share * (steps.length - 1), i = Math.min(Math.floor(x), steps.length - 2), t = x - i;
      return [0, 1, 2].map((c) => steps[i][c] * (1 - t) + steps[i + 1][c] * t);
    };
    for (let x = 0; x < n; x++) {
      const share = (2 * (x + 0.5)) / n - 1, size = Math.abs(share);
      const colour = at(share < 0 ? data.colours.negative : data.colours.positive, size);
      const below = $("fade").checked ? (size / hidden) ** 2 : 0;
      const cover = opacity * (size < hidden ? below : 1);
      pen.fillStyle = `rgb(${colour.map((c) => Math.round(c * cover)).join(",")})`;
      pen.fillRect(x, 0, 1, canvas.height);
    }
  }

  function go(place) {
    nv.scene.crosshairPos = nv.mm2frac(place);
    nv.drawScene();
    nv.createOnLocationChange();
  }

  // The left half of the image gives way in 3-D; the map stays whole. A depth of 2 is outside.
  const cut = () => nv.setClipPlane($("cut").checked ? [0, 270, 0] : [2, 0, 0]);

  async function show() {
    const one = chosen();
    say(`Reading ${one.title}.`);
    if (state.anatomy !== one.anatomy || !nv.volumes.length) {
      for (const volume of [...nv.volumes]) nv.removeVolume(volume);
      state.map = state.mask = undefined;
      if (one.anatomy !== null) nv.addVolume(await image(one.anatomy, "image", "gray", 1, LEAST, 255));
      state.anatomy = one.anatomy;
    }
    for (const volume of [state.map, state.mask]) if (volume && nv.volumes.includes(volume)) nv.removeVolume(volume);
    state.mask = undefined;
    state.map = await image(one.text, "map", "esegeta_for", 1, least(), end(), "esegeta_against");
    nv.addVolume(state.map);
    if ($("outline").checked && one.prediction !== null) {
      state.mask = await image(one.prediction, "prediction", "esegeta_mask", 0.8, 0.5, 1);
      nv.addVolume(state.mask);
    }
    $("outline").parentNode.hidden = one.prediction === null;
    scales();
    if (state.first) { go(one.centre); state.first = false; }
    const copy = one.shape.join(" × "), full = one.full.join(" × ");
    const grid = copy === full ? `${copy} voxels` : `${copy} voxels here, ${full} in the file`;
    say(`${one.title}: largest size ${short(one.largest)}; ${grid}.`);
    page.dataset.shown = one.id;
    page.dataset.viewer = "ready";
  }

  function located(location) {
    const mm = location.mm.slice ? [...location.mm].slice(0, 3) : [];
    const words = mm.map((v) => String(Math.round(v)));  // never -0
    let value = "";
    const index = nv.volumes.indexOf(state.map);
    if (index >= 0 && location.values[index]) value = `, map ${short(location.values[index].value * chosen().step)} ± ${short(chosen().step / 2)}`;
    $("where").textContent = words.length ? `right ${words[0]}, front ${words[1]}, up ${words[2]} mm${value}` : "";
  }

  async function start() {
    if (typeof DecompressionStream === "undefined") throw new Error("this browser cannot inflate gzip");
    if (!document.createElement("canvas").getContext("webgl2")) throw new Error("there is no WebGL 2");
    offer();
    say("Starting the viewer.");
    const library = document.createElement("script");
    library.textContent = await inflated("library").text();
    document.head.append(library);
    if (typeof niivue === "undefined") throw new Error("its library was refused");
    nv = new niivue.Niivue({
      logLevel: "error", dragAndDropEnabled: false, isRadiologicalConvention: true, sagittalNoseLeft: true,
      multiplanarShowRender: 1, multiplanarLayout: 2, multiplanarPadPixels: 4, backColor: [0, 0, 0, 1], crosshairColor: [0.55, 0.85, 0.55, 0.6],
      crosshairWidth: 0.25, show3Dcrosshair: false, fontColor: [0.8, 0.82, 0.85, 1], isColorbar: false,
      loadingText: "", scrollRequiresFocus: true, clipPlaneColor: [0, 0, 0, 0], clipPlaneHotKey: "",
      cycleClipPlaneHotKey: "", viewModeHotKey: "",
    });
    nv.onLocationChange = located;
    await nv.attachToCanvas($("canvas"), false);
    const ramp = (steps) => ({
      R: steps.map((s) => s[0]), G: steps.map((s) => s[1]), B: steps.map((s) => s[2]),
      A: steps.map((_, i) => (i ? 255 : 0)),
      I: steps.map((_, i) => Math.round((255 * i) / (steps.length - 1))),
    });
    nv.addColormap("esegeta_for", ramp(data.colours.positive));
    nv.addColormap("esegeta_against", ramp(data.colours.negative));
    nv.addColormap("esegeta_mask", ramp([[90, 200, 120], [90, 200, 120]]));
    nv.setSliceType(nv.sliceTypeMultiplanar);
    nv.setRenderAzimuthElevation(120, 15);
    cut();
    await show();
  }

  const later = () => queue(show);
  $("choose-subject").addEventListener("change", () => { offer(); state.first = true; later(); });
  $("choose-target").addEventListener("change", () => { offer(); later(); });
  $("choose-map").addEventListener("change", later);
  $("outline").addEventListener("change", later);
  $("choose-view").addEventListener("change", () => queue(() => nv.setSliceType(Number($("choose-view").value))));
  $("smooth").addEventListener("change", () => queue(() => nv.setInterpolation(!$("smooth").checked)));
  $("cut").addEventListener("change", () => queue(cut));
  $("strongest").addEventListener("click", () => queue(() => go(chosen().peak)));
  for (const id of ["opacity", "threshold", "fade", "window"]) $(id).addEventListener("input", () => queue(scales));
  queue(start);
})();
