// The first step: a network, images, and what is to be explained.
import * as api from "./api.js";
import { browse } from "./browse.js";
import { $, button, el, options, say, short } from "./dom.js";
import { row, stack } from "./fields.js";
import { tree } from "./places.js";
import { change, list, lookAtTrial, on, saved, store, tell } from "./store.js";
import { Screens } from "./viewer.js";

const set = (table, key, value) => change((tables) => {
  const now = (tables[table] ||= {});
  if (value === undefined || value === "") delete now[key]; else now[key] = value;
});

// --- The network ---

function network() {
  const model = store.tables.model || {};
  const zoo = (model.source || "").startsWith("zoo:") ? model.source.slice(4) : "";
  const known = store.forms.networks.find((one) => one.name === zoo);
  const choice = options(el("select", { id: "network" }),
    [["", "choose"], ...store.forms.networks.map((one) => [`zoo:${one.name}`, one.name]), ["#own", "one of your own ..."]],
    zoo ? `zoo:${zoo}` : model.source ? "#own" : "");
  const own = el("div", { hidden: choice.value !== "#own" });
  choice.addEventListener("change", () => {
    own.hidden = choice.value !== "#own";
    if (choice.value !== "#own") change((tables) => { if (choice.value) tables.model = { source: choice.value }; else delete tables.model; }, false);
  });
  const text = (key, label, help, files) => {
    const input = el("input", { id: `model-${key}`, type: "text", class: "wide-input", value: model[key] ?? "" });
    input.addEventListener("change", () => set("model", key, input.value.trim()));
    const look = files ? button("Browse", async () => { const path = await browse(); if (path) { input.value = path; set("model", key, path); } }, { class: "small", "aria-label": `Browse for ${label}` }) : null;
    return el("div", { class: "field" }, el("label", { for: `model-${key}` }, label), el("span", { class: "row" }, input, look), el("small", {}, help));
  };
  const inner = el("textarea", { id: "model-arguments", rows: 2, class: "wide-input" });
  inner.value = JSON.stringify(model.arguments || {});
  inner.addEventListener("change", () => {
    try { set("model", "arguments", JSON.parse(inner.value || "{}")); inner.removeAttribute("aria-invalid"); } catch { inner.setAttribute("aria-invalid", "true"); }
  });
  own.append(
    text("source", "source", "A file .pt2 or .ts, or module:factory. Code beside the configuration may run; other code only with --trust.", true),
    text("weights", "weights", "A file .safetensors, .pth or .pt, read as tensors alone.", true),
    text("path", "folder", "Where the module of a factory is.", true),
    el("div", { class: "field" }, el("label", { for: "model-arguments" }, "arguments"), inner, el("small", {}, "Of the factory, in JSON.")));
  const fields = known ? known.fields.map((field) => row(field, (model.arguments || {})[field.name], (value) => change((tables) => {
    const given = (tables.model.arguments ||= {});
    if (value === undefined) delete given[field.name]; else given[field.name] = value;
  }))) : [];
  return el("div", { class: "card" }, el("h2", {}, "Network"),
    el("label", {}, "Network ", choice), el("p", { class: "quiet" }, known ? known.line : ""),
    known && fields.length ? el("details", {}, el("summary", {}, "Settings"), fields) : null, own,
    el("p", { class: "row" }, button("Try it on the first image", attempt, { id: "try", class: "main" })),
    el("div", { id: "tried", "aria-live": "polite" }));
}

async function attempt() {
  const start = $("try");
  start.disabled = true;
  say("The network runs once, in a process of its own.");
  $("tried").replaceChildren(el("progress", { "aria-label": "The trial" }));
  try {
    await saved();
    store.trial = await api.send("api/trial", {});
    say("The network takes the image.");
    tell("tried");
  } catch (error) { say(error.message, true); $("tried")?.replaceChildren(el("p", { class: "bad" }, error.message)); return; } finally { $("try").disabled = false; }
}

function tried() {
  const box = $("tried"), found = store.trial;
  if (!box) return;
  if (!found.input) { box.replaceChildren(el("p", { class: "quiet" }, "A trial shows the answer and the layers.")); return; }
  const facts = [["image", found.input.join(" × ")], ["answer", found.output.join(" × ")], ["one evaluation", `${short(found.seconds)} s`]];
  box.replaceChildren(
    el("dl", { class: "facts" }, facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    el("h3", {}, "Layers"), tree(found.places, (name) => button("copy", (event) => { event.preventDefault(); navigator.clipboard?.writeText(name); say(`${name} is copied.`); }, { class: "small", "aria-label": `Copy ${name}` })));
  document.documentElement.dataset.tried = "yes";
}

// --- Images ---

const names = () => {
  const files = (store.tables.input || {}).files;
  return files === undefined ? [] : typeof files === "string" ? [files] : files;
};

function images() {
  const input = store.tables.input || {};
  const box = el("textarea", { id: "files", rows: 2, class: "wide-input", "aria-describedby": "files-help" });
  box.value = names().map((one) => (typeof one === "string" ? one : one.join(" + "))).join("\n");
  const take = (lines) => {
    const found = lines.map((line) => (line.includes(" + ") ? line.split(" + ").map((part) => part.trim()) : line));
    set("input", "files", found.length === 0 ? undefined : found.length === 1 && typeof found[0] === "string" ? found[0] : found);
    picture();
  };
  box.addEventListener("change", () => take(box.value.split("\n").map((line) => line.trim()).filter(Boolean)));
  const add = (path) => { box.value = [...box.value.split("\n").filter(Boolean), path].join("\n"); box.dispatchEvent(new Event("change")); };
  const sent = async (files) => {
    for (const file of files) {
      say(`Reading ${file.name}.`);
      try { add((await api.upload(file)).path); say(`${file.name} is there.`); } catch (error) { say(error.message, true); }
    }
  };
  const chooser = el("input", { type: "file", id: "upload", multiple: true, accept: store.about.uploads.join(","), "aria-label": "Upload images" });
  chooser.addEventListener("change", async () => { await sent([...chooser.files]); chooser.value = ""; });
  const drop = el("div", { class: "drop" }, "Drop files here, or ", chooser);
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); sent(event.dataTransfer.files); });
  const pad = el("input", { type: "checkbox", id: "pad", checked: input.pad === "auto" });
  pad.addEventListener("change", () => set("input", "pad", pad.checked ? "auto" : undefined));
  const channels = options(el("select", { id: "channels" }), [["", "as the file says"], "first", "last", "none"], input.channels || "");
  channels.addEventListener("change", () => { set("input", "channels", channels.value); picture(); });
  const example = button("The example head", () => add(store.forms.example), { class: "small", id: "example" });
  return el("div", { class: "card" }, el("h2", {}, "Images"),
    el("p", { class: "row" }, button("Browse", async () => { const path = await browse(true); if (path) add(path); }, { id: "browse-images" }), example),
    drop, el("label", { for: "files" }, "Files"), box,
    el("small", { id: "files-help", class: "quiet" }, "One in a line, or a pattern; channels of one subject in a line with + between."),
    el("div", { id: "picture" }),
    el("details", { open: Boolean((input.preprocess || []).length) }, el("summary", {}, "Preparation"),
      stack("Steps of preparation", store.forms.steps, structuredClone(input.preprocess || []), "step", (entries) => set("input", "preprocess", entries.length ? structuredClone(entries) : undefined)),
      el("p", {}, el("label", {}, pad, "pad to sizes that the network takes")),
      el("p", {}, el("label", {}, "axis of channels ", channels))),
    truth());
}

// Label maps that metrics compare with.
function truth() {
  const now = store.tables.reference || {};
  const form = store.forms.sections.reference;
  const put = (name) => (value) => change((tables) => {
    const table = (tables.reference ||= {});
    if (value === undefined) delete table[name]; else table[name] = value;
    if (!Object.keys(table).length) delete tables.reference;
  });
  const look = button("Browse", async () => { const path = await browse(true); if (path) { put("files")(path); draw(); } }, { class: "small", "aria-label": "Browse for the ground truth" });
  return el("details", { open: Boolean(store.tables.reference) }, el("summary", {}, "Ground truth"),
    el("p", { class: "row" }, el("small", { class: "quiet" }, form.line), look), form.fields.map((field) => row(field, now[field.name], put(field.name))));
}

async function picture() {
  const box = $("picture"), first = names()[0];
  const path = Array.isArray(first) ? first[0] : first;
  if (!box) return;
  if (!path || /[*?[]/.test(path)) { box.replaceChildren(); return; }
  const query = { path };
  if ((store.tables.input || {}).channels) query.channels = store.tables.input.channels;
  try {
    const found = await api.get("api/image", query);
    const facts = [["shape", `${found.shape.join(" × ")}${found.channels > 1 ? `, ${found.channels} channels` : ""}`], ["spacing", `${found.spacing.map(short).join(" × ")} mm`],
      ["orientation", found.orientation || "a picture"], ["values", `${short(found.low)} to ${short(found.high)}`]];
    box.replaceChildren(
      el("img", { class: "planes", alt: `Three planes of ${path.split("/").pop()}`, src: api.address("api/image/thumbnail", query) }),
      el("dl", { class: "facts" }, facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
  } catch (error) { box.replaceChildren(el("p", { class: "bad" }, error.message)); }
}

// --- What is explained ---

let screens = null, painting = false;

function fresh(name) {
  const taken = new Set(list("targets").map((one) => one.name));
  let found = name;
  for (let n = 2; taken.has(found); n++) found = `${name}${n}`;
  return found;
}

const addTarget = (target) => { change((tables) => (tables.targets ||= []).push({ ...target, name: fresh(target.name) }), true); targets(); };

function targets() {
  const box = $("targets");
  if (!box) return;
  box.replaceChildren(...(store.tables.targets || []).map((target, n) => {
    const spec = store.forms.reducers.find((one) => one.name === (target.reducer || "predicted_class_sum"));
    const name = el("input", { type: "text", value: target.name, "aria-label": "Name of the target" });
    name.addEventListener("change", () => change(() => { target.name = name.value.trim(); }));
    const reducer = options(el("select", { "aria-label": "Reducer" }), store.forms.reducers.map((one) => one.name), target.reducer || "predicted_class_sum");
    reducer.addEventListener("change", () => { change(() => { target.reducer = reducer.value; delete target.parameters; }); targets(); });
    const number = el("input", { type: "number", min: 0, step: 1, value: target.class ?? "", "aria-label": "Class" });
    number.addEventListener("change", () => change(() => { if (number.value === "") delete target.class; else target.class = Number(number.value); }));
    const fields = (spec ? spec.fields : []).filter((field) => field.name !== "target");
    return el("div", { class: "card", data: { target: target.name } },
      el("div", { class: "row" }, name, reducer, el("label", {}, "class ", number), button("remove", () => { change((tables) => tables.targets.splice(n, 1)); targets(); }, { class: "small" })),
      el("small", { class: "quiet" }, spec ? spec.line : ""),
      fields.length ? el("details", {}, el("summary", {}, "Settings"), fields.map((field) => row(field, (target.parameters || {})[field.name], (value) => change(() => {
        const given = (target.parameters ||= {});
        if (value === undefined) delete given[field.name]; else given[field.name] = value;
      })))) : null);
  }));
}

function picker() {
  const box = $("picker"), found = store.trial;
  if (!box) return;
  if (!found.input) { box.replaceChildren(el("p", { class: "quiet" }, "After a trial the target can be clicked in the image.")); return; }
  const classes = found.classes.filter((one) => (found.grid ? one.class > 0 && one.voxels : true)).slice(0, 30);
  const most = found.grid ? "predicted_class_sum" : "logit";
  const buttons = classes.map((one) => button(found.grid ? `class ${one.class} (${one.voxels} voxels)` : `class ${one.class} (${short(one.value)})`,
    () => addTarget({ name: `class${one.class}`, reducer: most, class: one.class }), { data: { class: one.class } }));
  box.replaceChildren(el("h3", {}, "Classes in the answer"), el("p", { class: "row" }, buttons.length ? buttons : "No voxel belongs to a class."));
  if (!found.grid) return;
  const where = el("p", { id: "picked", class: "row", "aria-live": "polite" }, "Click a voxel of the answer, which is green.");
  painting = false;
  screens = new Screens(el("span"));
  const plain = screens.moved.bind(screens);
  let timer = null;
  screens.moved = (screen, location) => {
    plain(screen, location);
    clearTimeout(timer);
    timer = setTimeout(() => pick(screens.mm, where), 250);
  };
  box.append(el("div", { class: "picker" }, screens.root), where,
    el("p", { class: "row" }, button("A region from a file", async () => {
      const path = await browse();
      if (path) addTarget({ name: "region", reducer: "region", class: classes[0]?.class ?? 1, parameters: { mask: { file: path } } });
    }), button("Paint a region", () => paint(where), { id: "paint" })));
  screens.show([{ title: "answer", anatomy: { job: "trial", what: "anatomy" }, labels: { job: "trial", what: "prediction" }, always: true, stamp: found.mark }]);
}

async function pick(mm, where) {
  if (!mm || painting) return;
  try {
    const found = await api.get("api/trial/voxel", { mm: mm.join(",") });
    if (painting) return;
    const at = found.index.join(", "), name = `class${found.class}`;
    where.replaceChildren(`Voxel ${at}: class ${found.class}${found.part === null ? "" : `, part ${found.part}`}. `,
      button("the whole class", () => addTarget({ name, reducer: "predicted_class_sum", class: found.class }), { class: "small" }),
      found.part === null ? "" : button("this part", () => addTarget({ name: `${name}part${found.part}`, reducer: "component", class: found.class, parameters: { k: found.part } }), { class: "small" }),
      button("this voxel", () => addTarget({ name: `${name}voxel`, reducer: "voxel", class: found.class, parameters: { index: found.index } }), { class: "small" }));
  } catch (error) { where.textContent = error.message; }
}

// A region painted in the planes of the image becomes a file, on the grid of the network.
async function paint(where) {
  const { nv } = screens.all[0];
  painting = true;
  nv.setDrawingEnabled(true);
  nv.setPenValue(1, true);
  const end = (words) => {
    painting = false;
    nv.setDrawingEnabled(false);
    nv.closeDrawing();
    where.textContent = words;
  };
  const use = async () => {
    const found = await nv.saveImage({ filename: "", isSaveDrawing: true });
    if (!found || !found.length) { end("Nothing was painted."); return; }
    try {
      const kept = await api.upload(new File([found], "region.nii"));
      addTarget({ name: "painted", reducer: "region", class: 1, parameters: { mask: { file: kept.path } } });
      end("The region is a target.");
    } catch (error) { say(error.message, true); }
  };
  where.replaceChildren("Draw round a region in a plane: it is filled. ", button("use it", use, { class: "small" }), button("give up", () => end(""), { class: "small" }));
}

export function draw() {
  $("choose").replaceChildren(el("div", { class: "columns" }, network(), images(),
    el("div", { class: "card" }, el("h2", {}, "What is explained"), el("div", { id: "targets" }),
      el("p", { class: "row" }, button("Add a target", () => addTarget({ name: "target", reducer: "predicted_class_sum", class: 1 }), { id: "add-target" })),
      el("div", { id: "picker" }))));
  targets();
  tried();
  picture();
  picker();
}

on("replaced", draw);
on("tried", () => { tried(); picker(); });
export { lookAtTrial };
