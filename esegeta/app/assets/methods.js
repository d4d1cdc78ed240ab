// The second step: methods, metrics and dreams, each with its parameters.
import { $, button, el, options, time } from "./dom.js";
import { row, stack } from "./fields.js";
import { change, list, on, store, worded } from "./store.js";

// What can be added: the table of the configuration, the key of the name there, and where its forms are.
const TABLES = {
  methods: { key: "name", forms: "methods", title: "Methods" },
  metrics: { key: "metric", forms: "metrics", title: "Metrics" },
  dreams: { key: "objective", forms: "objectives", title: "Dreams" },
};
// Beside these, tables that kinds of jobs bring along: entries without names of the registry.
const bringing = () => store.forms.kinds || [];
const kindOf = (name) => bringing().find((one) => one.name === name);
const formsOf = (name) => (TABLES[name] ? store.forms[TABLES[name].forms] : [kindOf(name)]);
const every = () => [...Object.entries(TABLES).map(([key, { title }]) => [key, title]), ...bringing().map((one) => [one.name, one.title])];
let table = "methods", word = "", family = "";

const estimate = (form) => {
  if (form.cost === undefined) return "";
  if (form.cost === null) return "the image decides what it costs";
  const pace = form.needs === "gradient" ? store.trial.gradient_seconds : store.trial.seconds;
  const unit = form.needs === "gradient" ? "gradient" : "evaluation";
  return `${form.cost} ${unit}${form.cost === 1 ? "" : "s"}${pace ? `, about ${time(form.cost * pace)}` : ""}`;
};

const needs = (form) => [form.place ? "a place" : "", ...(form.refs || []), form.key ? "random draws" : "", ...(Array.isArray(form.needs) ? form.needs : [])].filter(Boolean);

function found() {
  return formsOf(table).filter((form) => (!family || form.family === family)
    && [form.name, form.line, form.family, form.paper, ...form.also].join(" ").toLowerCase().includes(word.toLowerCase()));
}

export function add(name, more = {}) {
  if (!TABLES[table]) {
    const many = kindOf(table).many;
    const count = (store.tables[table] || []).length;
    change((tables) => { if (many) (tables[table] ||= []).push(count ? { id: `${table}_${count + 1}` } : {}); else tables[table] ||= {}; });
    opened.add(`${table}[${many ? count : ""}]`);
    chosen();
    return;
  }
  const { key } = TABLES[table];
  change((tables) => {
    const entries = (tables[table] ||= []);
    const entry = { [key]: name, ...more };
    const same = entries.filter((one) => named(one, key) === name).length;
    if (same) entry.id = `${name}_${same + 1}`;
    const form = store.forms[TABLES[table].forms].find((one) => one.name === name);
    if (form?.place && !entry.place) entry.place = suggested();
    entries.push(entry);
  });
  chosen();
}

const named = (entry, key) => (typeof entry[key] === "string" ? entry[key] : entry[key]?.name);

// The deepest place on a grid that all passes through: where a class activation map looks first.
function suggested() {
  const places = (store.trial.places || []).filter((one) => one.kind === "module" && one.shape.length > 2 && one.shape[0] > 1);
  const cuts = places.filter((one) => one.cut);
  const size = (one) => one.shape.slice(1).reduce((a, b) => a * b, 1);
  const among = cuts.length ? cuts : places;
  const least = Math.min(...among.map(size));
  return among.filter((one) => size(one) === least).pop()?.name || "";
}

function offered() {
  const all = found();
  if (!all.length) $("offered").replaceChildren(el("p", { class: "quiet" }, `Nothing of ${every().find(([key]) => key === table)[1].toLowerCase()} has \u201c${word}\u201d in its name, its words or its paper${family ? `, among ${family}` : ""}.`));
  else $("offered").replaceChildren(...all.map((form) => el("div", { class: "method", data: { method: form.name } },
    el("div", { class: "row" }, el("strong", {}, form.name), button("add", () => add(form.name), { class: "small", "aria-label": `Add ${form.name}` })),
    el("p", {}, form.line), form.does ? el("p", { class: "quiet" }, form.does) : null,
    el("div", { class: "tags" }, [form.family, estimate(form), ...needs(form).map((one) => `needs ${one}`), form.better ? `${form.better} is better` : ""]
      .filter(Boolean).map((tag) => el("span", { class: "tag" }, tag))),
    (form.axioms || []).length ? el("small", { class: "quiet" }, `Keeps ${form.axioms.join(", ").replaceAll("_", " ")}. `) : null,
    form.paper ? el("small", { class: "quiet" }, form.paper) : null)));
  $("count").textContent = `${all.length} of ${formsOf(table).length}`;
}

const put = (entry, key, value) => change(() => {
  if (value === undefined || value === "") delete entry[key]; else entry[key] = value;
});

function parameters(entry, key, fields) {
  return fields.map((field) => row(field, (entry[key] || {})[field.name], (value) => change(() => {
    const given = (entry[key] ||= {});
    if (value === undefined) delete given[field.name]; else given[field.name] = value;
    if (!Object.keys(given).length) delete entry[key];
  })));
}

const line = (label, control, help) => {
  control.setAttribute("aria-label", label);
  return el("div", { class: "field" }, el("span", {}, label), control, el("small", {}, help));
};

function text(entry, key, label, help, kind = "text") {
  const input = el("input", { type: kind, value: entry[key] ?? "", step: "any" });
  input.addEventListener("change", () => put(entry, key, kind === "number" && input.value !== "" ? Number(input.value) : input.value.trim()));
  return line(label, input, help);
}

const placeField = (entry, needed) => row({ name: "place", kind: "text", required: needed,
  help: needed ? "A layer of the network, from the tree of its layers; several with commas." : "Explain by the activations at a layer instead; several with commas." },
entry.place, (value) => put(entry, "place", value));

const several = (entry, key, help) => row({ name: key, kind: "texts", default: null, help }, entry[key], (value) => put(entry, key, value));

function baselineField(entry) {
  const now = typeof entry.baseline === "string" ? entry.baseline : entry.baseline?.name ?? "";
  const select = options(el("select"), [["", "that of the run"], ...store.forms.baselines.map((one) => one.name)], now);
  select.addEventListener("change", () => { put(entry, "baseline", select.value); chosen(); });
  const form = store.forms.baselines.find((one) => one.name === now);
  const set = (name) => (value) => change(() => {
    const call = typeof entry.baseline === "string" ? { name: now } : { ...entry.baseline };
    if (value === undefined) delete call[name]; else call[name] = value;
    entry.baseline = call;
  });
  return el("div", {}, line("baseline", select, form ? form.line : "What stands for nothing."),
    (form ? form.fields : []).map((field) => row(field, (entry.baseline || {})[field.name], set(field.name))));
}

// What an entry costs as it is set, known when the configuration has been checked.
function costing(own) {
  const cost = store.costs[own];
  if (!cost) return "";
  if (cost.count === null) return "the image decides what it costs";
  const pace = cost.needs === "gradients" ? store.trial.gradient_seconds : store.trial.seconds;
  return `${cost.count} ${cost.count === 1 ? cost.needs.slice(0, -1) : cost.needs}${pace ? `, about ${time(cost.count * pace)}` : ""}`;
}

function card(kind, entry, n) {
  const { key, forms } = TABLES[kind];
  const name = named(entry, key);
  const form = store.forms[forms].find((one) => one.name === name || one.also.includes(name));
  const inner = el("div");
  const own = entry.id || name;
  const wrong = store.problems.filter((problem) => problem.startsWith(`${kind}[${n}]`));
  if (form) {
    inner.append(el("p", { class: "quiet" }, form.line));
    if (kind === "dreams") inner.append(...dream(entry, form)); else inner.append(...parameters(entry, "parameters", form.fields));
    if (kind === "methods") {
      inner.append(placeField(entry, form.place));
      inner.append(row({ name: "patches", kind: "choice", choices: ["whole", "stitched", "per_patch"], default: "whole",
        help: "The whole volume at once, or cut as the settings of the run say: maps of patches put together, or each by itself." }, entry.patches, (value) => put(entry, "patches", value)));
      if (form.refs.length || (entry.transforms || []).some((one) => one.name === "over_baselines")) inner.append(baselineField(entry));
      inner.append(el("h3", {}, "Transforms"), stack("Transforms", store.forms.transforms, structuredClone(entry.transforms || []), "name",
        (entries) => put(entry, "transforms", entries.length ? structuredClone(entries) : undefined)));
    }
    if (kind === "metrics") {
      if (form.needs.includes("mask")) inner.append(text(entry, "mask", "mask", '"prediction", "reference", or files of masks'));
      inner.append(several(entry, "methods", "Of which methods, by their ids; of all by default."), several(entry, "targets", "Of which targets, by their names; of all by default."));
      inner.append(text(entry, "null", "null", "Random maps beside each map, by name, such as surrogate."));
    }
    inner.append(text(entry, "id", "id", "The name of a second entry of the same."), text(entry, "title", "title", "As figures show it."),
      text(entry, "deadline", "deadline", "Seconds, instead of that of the run.", "number"));
  }
  return el("details", { class: "card", data: { chosen: own }, open: wrong.length > 0 || opened.has(own) },
    el("summary", {}, el("strong", {}, own), " ", kind === "methods" ? el("span", { class: "quiet", data: { cost: own } }, costing(own)) : null, " ",
      button("remove", (event) => { event.preventDefault(); change((tables) => { tables[kind].splice(n, 1); if (!tables[kind].length) delete tables[kind]; }); chosen(); }, { class: "small", "aria-label": `Remove ${own}` })),
    wrong.map((problem) => el("p", { class: "bad" }, problem)), inner);
}

// An entry of a table that a kind brings along.
function plainCard(kind, entry, n, remove) {
  const own = `${kind.name}[${n}]`;
  const set = (name) => (value) => change(() => { if (value === undefined) delete entry[name]; else entry[name] = value; });
  const wrong = store.problems.filter((problem) => problem.startsWith(kind.many ? own : kind.name));
  return el("details", { class: "card", data: { chosen: own }, open: wrong.length > 0 || opened.has(own) },
    el("summary", {}, el("strong", {}, entry.id || kind.title), " ",
      button("remove", (event) => { event.preventDefault(); change(remove); chosen(); }, { class: "small", "aria-label": `Remove ${entry.id || kind.title}` })),
    wrong.map((problem) => el("p", { class: "bad" }, problem)), el("p", { class: "quiet" }, kind.line),
    kind.fields.map((field) => row(field, entry[field.name], set(field.name))),
    kind.many ? text(entry, "id", "id", "The name of a second entry of the same.") : null);
}

function plainCards(kind) {
  const now = store.tables[kind.name];
  if (!now) return [];
  const cards = kind.many
    ? now.map((entry, n) => plainCard(kind, entry, n, (tables) => { tables[kind.name].splice(n, 1); if (!tables[kind.name].length) delete tables[kind.name]; }))
    : [plainCard(kind, now, "", (tables) => { delete tables[kind.name]; })];
  return [el("h3", {}, kind.many ? `${kind.title}: ${now.length}` : kind.title), ...cards];
}

function dream(entry, form) {
  const call = typeof entry.objective === "string" ? { name: entry.objective } : entry.objective;
  const recipe = store.forms.recipes.find((one) => one.name === (entry.recipe || "natekar"));
  const select = options(el("select"), store.forms.recipes.map((one) => one.name), entry.recipe || "natekar");
  select.addEventListener("change", () => { change(() => { entry.recipe = select.value; delete entry.parameters; }); chosen(); });
  return [...form.fields.map((field) => row(field, call[field.name], (value) => change(() => {
    if (value === undefined) delete call[field.name]; else call[field.name] = value;
    entry.objective = { ...call };
  }))), line("recipe", select, recipe.line), ...parameters(entry, "parameters", recipe.fields)];
}

const opened = new Set();

export function chosen() {
  const box = $("chosen");
  if (!box) return;
  for (const one of box.querySelectorAll("details[data-chosen]")) if (one.open) opened.add(one.dataset.chosen); else opened.delete(one.dataset.chosen);
  box.replaceChildren(...Object.entries(TABLES).flatMap(([kind, { title }]) => {
    const entries = store.tables[kind] || [];
    return entries.length || kind === "methods" ? [el("h3", {}, `${title}: ${entries.length}`), ...entries.map((entry, n) => card(kind, entry, n))] : [];
  }), ...bringing().flatMap(plainCards));
  $("places")?.replaceChildren(...(store.trial.places || []).map((place) => el("option", { value: place.name }, place.shape.join(" × "))));
}

function faults() {
  const box = $("faults");
  if (!box) return;
  box.replaceChildren(...store.problems.map((problem) => el("li", { class: "bad" }, worded(problem))));
  box.hidden = !store.problems.length;
  for (const one of document.querySelectorAll("details[data-chosen]")) {
    const wrong = store.problems.some((problem) => problem.includes(one.dataset.chosen));
    one.classList.toggle("wrong", wrong);
  }
}

export function draw() {
  const kinds = options(el("select", { "aria-label": "Kind" }), every(), table);
  kinds.addEventListener("change", () => { table = kinds.value; family = ""; draw(); });
  const families = [...new Set(formsOf(table).map((form) => form.family).filter(Boolean))].sort();
  const select = options(el("select", { "aria-label": "Family" }), [["", "all families"], ...families], family);
  select.addEventListener("change", () => { family = select.value; offered(); });
  const search = el("input", { type: "search", id: "search", placeholder: "Search", "aria-label": "Search", value: word });
  search.addEventListener("input", () => { word = search.value; offered(); });
  const presets = store.forms.presets.map((preset) => button(preset.name, () => {
    table = "methods";
    const missing = preset.methods.filter((name) => !list("methods").some((one) => one.name === name));
    missing.forEach((name) => add(name));
    draw();
  }, { title: preset.line, data: { preset: preset.name } }));
  $("methods").replaceChildren(el("datalist", { id: "places" }), el("div", { class: "columns two" },
    el("div", { class: "card" }, el("h2", {}, "What there is"), el("div", { class: "row" }, kinds, select, search, el("span", { id: "count", class: "quiet" })),
      el("p", { class: "row" }, "Presets: ", presets), el("div", { id: "offered", class: "list", tabindex: "0", role: "region", "aria-label": "What there is" })),
    el("div", { class: "card" }, el("h2", {}, "What is chosen"), el("ul", { id: "faults", class: "faults", "aria-live": "polite" }), el("div", { id: "chosen", class: "list" }))));
  offered();
  chosen();
  faults();
}

on("replaced", draw);
on("tried", draw);
on("checked", () => {
  faults();
  for (const one of document.querySelectorAll("[data-cost]")) one.textContent = costing(one.dataset.cost);
});
