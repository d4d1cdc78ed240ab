// The state of the page is the configuration that the server keeps in a file: here is a copy of it.
import * as api from "./api.js";
import { say, unsay } from "./dom.js";

export const store = { tables: {}, mark: "", forms: {}, trial: {}, problems: [], costs: {}, about: {} };
const listeners = {};
let timer = null;
let saving = false;
let again = false;

export const on = (event, act) => (listeners[event] ||= []).push(act);
export const tell = (event, what) => (listeners[event] || []).forEach((act) => act(what));

export async function load() {
  const found = await api.get("api/state");
  store.tables = found.tables;
  store.mark = found.mark;
  store.about = found;
  if (found.fault) say(found.fault, true);
  tell("replaced");
  check();
}

// Change the tables here at once, and in the file a moment later.
export function change(act, quietly = true) {
  if (store.about.finished) {
    say("This is a finished run: its configuration can be downloaded and opened in another folder.", true);
    return;
  }
  unsay();
  act(store.tables);
  tell("changed");
  if (!quietly) tell("replaced");
  clearTimeout(timer);
  timer = setTimeout(save, 200);
}

export async function saved() {
  clearTimeout(timer);
  if (timer !== null || saving) await save();
}

async function save() {
  if (saving) { again = true; return; }
  timer = null;
  saving = true;
  try {
    const found = await api.send("api/state", { tables: store.tables, mark: store.mark }, "PUT");
    store.mark = found.mark;
    document.documentElement.dataset.mark = found.mark;
  } catch (error) {
    say(error.status === 409 ? "Another page has changed the configuration: this is how it is now." : error.message, true);
    if (error.status === 409) { again = false; saving = false; await load(); return; }
  }
  saving = false;
  if (again) { again = false; await save(); return; }
  check();
}

// Somebody else may have changed the file.
export async function heard(mark) {
  if (mark !== store.mark && timer === null && !saving) await load();
}

async function check() {
  try {
    const found = await api.get("api/problems");
    store.problems = found.problems;
    store.costs = found.costs;
    document.documentElement.dataset.problems = found.problems.length;
    tell("checked");
  } catch (error) { say(error.message, true); }
}

export async function lookAtTrial() {
  store.trial = await api.get("api/trial");
  tell("tried");
}

// What a page that has just been opened lacks, said as a step of the page and not as a table of the configuration.
const LACKING = [
  [/^model: expected a table, got nothing/, "Choose a network, in step 1."],
  [/^input: expected a table, got nothing/, "Choose an image, in step 1."],
  [/^targets: expected tables .*, got nothing/, "Add a target, which says what is explained, in step 1."],
  [/^methods: expected tables .*, got nothing/, "Add a method, or a preset, in step 2."],
];

export const worded = (problem) => LACKING.find(([form]) => form.test(problem))?.[1] || problem;

export const list = (name) => (store.tables[name] ||= []);
