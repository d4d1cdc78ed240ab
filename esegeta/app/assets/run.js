// The third step: jobs as they go on, and maps as they appear.
import * as api from "./api.js";
import { $, button, el, options, say, short, time } from "./dom.js";
import { row } from "./fields.js";
import { change, on, saved, store, worded } from "./store.js";
import { look, PLANES, Screens } from "./viewer.js";

let jobs = {}, run = { state: "none" }, results = { rows: [], tables: [] };
let picked = [], screens = null, several = false, timer = null, drawn = false;

const MADE = ["done", "partial"];
const MOST = 6;  // screens at once: a browser draws into some and no more
const WORDS = { waiting: "waits", running: "runs", skipped: "skipped: what it needs is missing" };

// --- News from the server ---

export function heard(news) {
  if (news.anew) jobs = {};
  if (news.run && run.state === "running" && news.run.state === "ended") say("The run has ended.");
  if (news.run) run = news.run;
  if (news.jobs) jobs = { ...jobs, ...news.jobs };
  if (!drawn) return;
  if (news.run || news.anew) head();
  if (news.jobs || news.anew) rows();
  const ended = Object.values(news.jobs || {}).some((job) => job.status !== "waiting" && job.status !== "running");
  if (ended || news.run || news.anew) { clearTimeout(timer); timer = setTimeout(refresh, 400); }
}

async function refresh() {
  try { results = await api.get("api/results"); } catch (error) { say(error.message, true); return; }
  maps();
  tables();
  failures();
  if ($("log-box")?.open) showLog();
  $("report").hidden = !results.report;
}

// --- Begin and end ---

export async function start(resume = true) {
  try {
    await saved();
    await api.send("api/run", { resume });
    say("The run begins.");
  } catch (error) { say(error.lines ? error.lines.map(worded).join(" ") : error.message, true); }
}

async function cancel(ids) {
  try { await api.send("api/run/cancel", { ids }); say("Asked to be cancelled."); } catch (error) { say(error.message, true); }
}

function head() {
  const busy = run.state === "running" || run.state === "starting";
  $("start").disabled = $("anew").disabled = busy || store.about.finished;
  $("start").textContent = run.state === "interrupted" || (run.state === "ended" && run.done < run.total) ? "Resume" : "Run";
  $("cancel-all").disabled = run.state !== "running";
  $("progress").max = Math.max(1, run.total || 1);
  $("progress").value = run.done || 0;
  const words = {
    none: "Nothing has run yet.", starting: "Starting.", running: run.line, ended: `Ended: ${run.line}.`,
    interrupted: `Interrupted: ${run.line}. Run again to go on.`, failed: run.message,
  };
  $("run-state").textContent = words[run.state];
  $("run-state").className = run.state === "failed" ? "bad" : "";
  document.documentElement.dataset.run = run.state;
}

const kept = new Map();

// Names of jobs begin with the subject, which is long: where all have the same one it is said once, above.
function brief(name) {
  const names = Object.keys(jobs).map((one) => one.split("_")[0]);
  const first = name.split("_")[0];
  const alone = names.filter((one) => one.startsWith("sub-")).every((one) => one === first);
  return first.startsWith("sub-") && alone && name !== first ? name.slice(first.length + 1).replaceAll("_", " ") : name.replaceAll("_", " ");
}

function rows() {
  const body = $("jobs");
  for (const name of kept.keys()) if (!(name in jobs)) { kept.get(name).remove(); kept.delete(name); }
  for (const [name, job] of Object.entries(jobs)) {
    let line = kept.get(name);
    if (!line) {
      line = el("tr", { data: { job: name } }, el("th", { scope: "row", title: name }, brief(name)), el("td", {}, el("span"), " ", el("progress", { max: 1, "aria-label": `Progress of ${name}` })),
        el("td", {}, button("cancel", () => cancel([name]), { class: "small", "aria-label": `Cancel ${name}` })));
      kept.set(name, line);
      body.append(line);
    }
    if (line.dataset.number === String(job.number)) continue;
    line.dataset.number = job.number;
    const open = job.status === "waiting" || job.status === "running";
    const status = line.querySelector("span");
    status.textContent = `${WORDS[job.status] || job.status}${job.status === "running" && job.label ? `: ${job.label}` : ""}${job.seconds ? ` in ${time(job.seconds)}` : ""}`;
    status.className = `status-${job.status}`;
    line.dataset.status = job.status;
    const bar = line.querySelector("progress");
    bar.hidden = job.status !== "running";
    bar.value = job.fraction || 0;
    line.querySelector("button").hidden = !open;
    line.title = job.error || job.message || "";
  }
}

// What keeps it from running is said before the button is pressed.
function lacking() {
  if (!drawn) return;
  $("lacking").replaceChildren(...store.problems.map((problem) => el("li", {}, worded(problem))));
  $("lacking").hidden = !store.problems.length || store.about.finished;
}

// --- What there is ---

function failures() {
  const failed = results.rows.filter((row) => !MADE.includes(row.status));
  // One reason often fails many jobs, and what needs them is skipped: each reason is told once.
  const reasons = new Map();
  for (const row of failed) {
    const reason = row.status === "skipped" ? WORDS.skipped : `${row.status}: ${row.error || "no reason was recorded"}`;
    reasons.set(reason, [...(reasons.get(reason) || []), brief(row.id)]);
  }
  $("failures").replaceChildren(...[...reasons].map(([reason, names]) => el("li", {}, names.length > 3
    ? el("details", {}, el("summary", {}, el("strong", {}, `${names.length} jobs`), ` ${reason}`), names.join(", "))
    : [el("strong", {}, names.join(", ")), ` ${reason}`])));
  $("failures").hidden = !failed.length;
}

// Every volume of every row: a job may have made several.
const shown = () => results.rows.flatMap((row) => row.volumes.map((what) => ({ ...row, what, name: what === "map" ? row.id : `${row.id} ${what}` })));
const alone = () => new Set(results.rows.map((row) => row.subject).filter(Boolean)).size < 2;  // then its name says nothing
const title = (row) => [alone() ? "" : row.subject, row.target, row.title || row.method || row.id, row.what?.startsWith("maps.") ? row.what.slice(5).replaceAll("_", " ") : ""].filter(Boolean).join(", ");
const stamp = (row) => `${row.name} ${row.sum} ${row.max} ${row.seconds}`;

const entries = new Map();

function maps() {
  const box = $("maps"), all = shown();
  for (const [name, entry] of entries) if (!all.some((row) => stamp(row) === entry.stamp)) { entry.node.remove(); entries.delete(name); }
  for (const row of all) {
    if (entries.has(row.name)) continue;
    const node = button("", () => pick(row.name), { class: "map-entry", data: { map: row.name }, "aria-pressed": "false" });
    node.append(el("img", { alt: "", loading: "lazy", src: api.address("api/results/picture", { job: row.id, what: row.what, ...under(row), stamp: stamp(row) }) }),
      el("span", { class: "words" }, caption(row), row.marks.map((mark) => el("span", { class: "tag bad" }, mark))));
    entries.set(row.name, { node, stamp: stamp(row) });
    box.append(node);
  }
  $("no-maps").hidden = $("no-screens").hidden = all.length > 0;
  $("controls").hidden = $("where").hidden = !all.length;
  picked = picked.filter((name) => all.some((row) => row.name === name));
  if (!picked.length && all.length) pick(all[0].name); else press();
}

function press() {
  for (const [name, entry] of entries) entry.node.setAttribute("aria-pressed", String(picked.includes(name)));
}

export function pick(name) {
  if (several) picked = picked.includes(name) ? picked.filter((one) => one !== name) : [...picked, name].slice(-MOST);
  else picked = [name];
  press();
  display();
}

// Targets and methods in a grid: the first maps at once.
function grid() {
  several = true;
  $("several").checked = true;
  picked = shown().slice(0, MOST).map((row) => row.name);
  press();
  display();
}

export function step(by) {
  const all = shown().map((row) => row.name);
  if (all.length) pick(all[(all.indexOf(picked.at(-1)) + by + all.length) % all.length]);
}

function display() {
  if (!screens) {
    screens = new Screens($("where"));
    $("screens").replaceChildren(screens.root);
  }
  const all = shown();
  screens.show(picked.map((name) => all.find((row) => row.name === name)).filter(Boolean).map((row) => {
    const below = same(row, "anatomy"), outline = same(row, "prediction");
    const own = { job: row.id, what: row.what, ...under(row), stamp: stamp(row) };
    return {
      title: title(row), stamp: stamp(row), map: row.what === "image" ? null : own,
      anatomy: row.what === "image" ? own : below ? { job: below, what: "anatomy" } : null,
      labels: outline ? { job: outline, what: "prediction" } : null,
    };
  }));
}

// Maps of one subject lie on one image: it is read once. The answer is of a target, or of any where there is none.
const same = (row, what) => (row.has[what] && what !== "anatomy" ? row
  : results.rows.find((one) => one.subject === row.subject && one.has[what] && (what === "anatomy" || !row.target || one.target === row.target)))?.id;
const under = (row) => { const found = same(row, "anatomy"); return found && !row.has.anatomy ? { under: found } : {}; };

// A map in a narrow list: what it is first, of whom below.
function caption(row) {
  const whole = title(row), subject = alone() ? "" : row.subject;
  return [el("strong", {}, subject ? whole.slice(subject.length + 2) : whole), el("small", { class: "quiet" }, subject)];
}

function tables() {
  const metrics = [...new Set(results.rows.flatMap((row) => Object.keys(row.metrics)))].sort();
  const heads = ["score", "residual", "min", "max", "sum", "seconds"];
  const maps_ = results.rows.filter((row) => row.kind === "methods");
  const number = (value) => el("td", { class: "number" }, short(value));
  const whole = el("table", { id: "numbers" },
    el("thead", {}, el("tr", {}, [...(alone() ? [] : ["subject"]), "target", "map"].map((head) => el("th", { scope: "col" }, head)), [...heads, ...metrics].map((head) => el("th", { scope: "col", class: "number" }, head)))),
    el("tbody", {}, maps_.map((row) => el("tr", {}, alone() ? null : el("td", {}, row.subject), el("td", {}, row.target), el("th", { scope: "row" }, row.title || row.method),
      heads.map((head) => number(row[head])), metrics.map((name) => number(row.metrics[name]))))));
  const others = results.tables.map((table) => el("details", {}, el("summary", {}, table.title),
    el("table", {}, el("thead", {}, el("tr", {}, table.heads.map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, table.rows.map((row) => el("tr", {}, row.map((value) => (typeof value === "number" ? number(value) : el("td", {}, value ?? ""))))))),
    el("p", { class: "quiet" }, table.note)));
  $("tables").replaceChildren(...(maps_.length ? [el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Numbers of the maps" }, whole)] : []), ...others);
}

async function showLog() {
  const box = $("log");
  const end = box.scrollTop + box.clientHeight >= box.scrollHeight - 5;
  box.textContent = await api.text("api/log");
  if (end) box.scrollTop = box.scrollHeight;
}

// --- Controls ---

function controls() {
  const slider = (id, label, min, max, value, take, words) => {
    const output = el("output", {}, words(value));
    const input = el("input", { type: "range", id, min, max, value });
    input.addEventListener("input", () => { take(Number(input.value)); output.textContent = words(Number(input.value)); screens?.dress(); });
    return el("label", {}, label, input, output);
  };
  const box = (id, label, key, again) => {
    const input = el("input", { type: "checkbox", id, checked: look[key] });
    input.addEventListener("change", () => { look[key] = input.checked; if (again) screens?.again(); else screens?.dress(); });
    return el("label", {}, input, label);
  };
  const view = options(el("select", { id: "view" }), [[PLANES, "planes"], ["3", "planes and 3-D"], ["0", "axial"], ["1", "coronal"], ["2", "sagittal"], ["4", "3-D"]], String(look.view));
  view.addEventListener("change", () => { look.view = Number(view.value); screens?.turn(); });
  const beside = el("input", { type: "checkbox", id: "several" });
  beside.addEventListener("change", () => { several = beside.checked; if (!several) { picked = picked.slice(-1); press(); display(); } });
  return el("div", { id: "controls", class: "controls", hidden: true }, el("label", {}, "View ", view), el("label", {}, beside, "several side by side"), button("grid", grid, { id: "grid", class: "small", title: `The first ${MOST} maps beside each other` }),
    slider("threshold", "Threshold", 1, 95, 30, (value) => { look.threshold = value / 100; }, (value) => `${value} %`),
    slider("opacity", "Opacity", 0, 100, 85, (value) => { look.opacity = value / 100; }, (value) => `${value} %`),
    slider("window", "Colours end at", -20, 20, 0, (value) => { look.window = 10 ** (value / 20); }, (value) => `× ${short(10 ** (value / 20))}`),
    box("fade", "fade below the threshold", "fade"), box("symmetric", "both signs", "symmetric"), box("smooth", "smooth", "smooth"), box("outline", "prediction", "outline", true));
}

function settings() {
  const now = store.tables.run || {};
  const put = (key, value) => change((tables) => { const table = (tables.run ||= {}); if (value === undefined) delete table[key]; else table[key] = value; });
  const field = (key, label, type, help, more = {}) => {
    const input = el("input", { type, id: `run-${key}`, value: now[key] ?? "", step: "any", ...more });
    input.addEventListener("change", () => put(key, input.value === "" ? undefined : type === "number" ? Number(input.value) : input.value.trim()));
    return el("div", { class: "field" }, el("label", { for: `run-${key}` }, label), input, el("small", {}, help));
  };
  const baseline = options(el("select", { id: "run-baseline" }), [["", "none"], ...store.forms.baselines.map((one) => one.name)], typeof now.baseline === "string" ? now.baseline : now.baseline?.name ?? "");
  baseline.addEventListener("change", () => put("baseline", baseline.value || undefined));
  const precision = options(el("select", { id: "run-precision" }), ["float32", "bfloat16", "float16"], now.precision || "float32");
  precision.addEventListener("change", () => put("precision", precision.value === "float32" ? undefined : precision.value));
  const section = (name, label) => {
    const form = store.forms.sections[name], table = store.tables[name] || {};
    return el("details", {}, el("summary", {}, label), el("small", { class: "quiet" }, form.line), form.fields.map((one) => row(one, table[one.name], (value) => change((tables) => {
      const given = (tables[name] ||= {});
      if (value === undefined) delete given[one.name]; else given[one.name] = value;
      if (!Object.keys(given).length) delete tables[name];
    }))));
  };
  return el("details", {}, el("summary", {}, "Settings of the run"),
    field("output", "output", "text", "A folder below that of the page."), field("workers", "workers", "number", "Processes at once.", { min: 1, step: 1 }),
    field("deadline", "deadline", "number", "Seconds for each method.", { min: 0 }), field("memory", "memory", "text", "For each method, such as 8 GiB."),
    field("key", "key", "number", "Of everything that is random.", { step: 1 }),
    el("div", { class: "field" }, el("label", { for: "run-baseline" }, "baseline"), baseline, el("small", {}, "For every method that needs one and names none.")),
    el("div", { class: "field" }, el("label", { for: "run-precision" }, "precision"), precision, el("small", {}, "Reduced precision changes results.")),
    section("patches", "Patches"), section("output", "What is written"));
}

export function draw() {
  if (drawn) { $("run-settings").replaceChildren(settings()); head(); return; }
  drawn = true;
  const log = el("details", { id: "log-box" }, el("summary", {}, "Log"), el("pre", { id: "log", tabindex: "0" }));
  log.addEventListener("toggle", () => { if (log.open) showLog(); });
  $("run").replaceChildren(el("div", { class: "run-grid" },
    el("div", {},
      el("div", { class: "card" }, el("div", { class: "row" }, button("Run", () => start(), { id: "start", class: "main", title: "Key r" }), button("All again", () => start(false), { id: "anew", title: "Do everything again" }),
        button("Cancel all", () => cancel(["all"]), { id: "cancel-all" })), el("p", {}, el("progress", { id: "progress", "aria-label": "All jobs" })),
      el("p", { id: "run-state", "aria-live": "polite" }), el("ul", { id: "lacking", class: "faults bad", hidden: true }), el("div", { id: "run-settings" }, settings())),
      el("div", { class: "card" }, el("h2", {}, "Jobs"), el("div", { class: "wide jobs", tabindex: "0", role: "region", "aria-label": "Jobs" }, el("table", {}, el("tbody", { id: "jobs" }))), el("ul", { id: "failures", class: "faults bad", hidden: true }), log),
      el("div", { class: "card" }, el("h2", {}, "Maps"), el("p", { id: "no-maps", class: "quiet" }, "They appear as they are finished."), el("div", { id: "maps", class: "maps" }))),
    el("div", {}, el("p", { id: "no-screens", class: "placeholder" }, "Maps are shown here as soon as they are finished."), el("div", { id: "screens" }), el("p", { id: "where", "aria-live": "off" }), controls(), el("div", { id: "tables" }),
      el("p", {}, el("a", { id: "report", href: "api/report", download: "report.html", hidden: true }, "Download the report")))));
  head();
  rows();
  refresh();
}

on("replaced", draw);
on("checked", lacking);
