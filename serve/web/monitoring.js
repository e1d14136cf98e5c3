"use strict";

// Everything that the service says is put in as text: a message may hold anything. The page's policy
// (require-trusted-types-for) makes the browser refuse any other way.

const REFRESH_MS = 30000;
// The service itself waits 30 s for its store.
const TIMEOUT_MS = 35000;
const KEY_ITEM = "dermray.key";
const ALARMS_PER_PAGE = 25;
const MAX_REPEATS = 200;
const SVG = "http://www.w3.org/2000/svg";

const $ = (id) => document.getElementById(id);

// ---------------------------------------------------------------- text and elements

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// An unchanged text stays as it is: a selection in it survives, and nothing is read out again.
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const two = (number) => String(number).padStart(2, "0");
const clock = (date) => [date.getHours(), date.getMinutes(), date.getSeconds()].map(two).join(":");

function when(text) {
  const date = new Date(text);
  const day = [date.getFullYear(), two(date.getMonth() + 1), two(date.getDate())].join("-");
  return make("time", { dateTime: text, title: text, textContent: `${day} ${clock(date).slice(0, 5)}` });
}

const count = (number) => number.toLocaleString("en");
const figure = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))) : String(value ?? "–"));
const share = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);
const plural = (number, one) => `${count(number)} ${one}${number === 1 ? "" : "s"}`;
const counts = (byName) => Object.entries(byName).map(([name, number]) => `${name} ${count(number)}`).join(", ") || "none";

// A cell; on a narrow screen, where rows are cards, it shows its column's name.
function cell(body, column, ...children) {
  const label = body.closest("table").querySelectorAll("th")[column];
  const element = make("td", { className: label.className }, ...children);
  element.setAttribute("role", "cell");
  element.dataset.label = label.textContent;
  return element;
}

function tableRow(body, columns) {
  const row = make("tr", {}, ...columns.map((children, column) => cell(body, column, ...[children].flat())));
  row.setAttribute("role", "row");
  return row;
}

// Rows without fields are made anew, but only if something changed: an opened detail stays open.
const shownRows = new Map();
function showRows(body, empty, items, columns) {
  const text = JSON.stringify(items);
  body.closest("table").hidden = items.length === 0;
  if (empty) empty.hidden = items.length > 0;
  if (shownRows.get(body) === text) return;
  shownRows.set(body, text);
  body.replaceChildren(...items.map((item) => tableRow(body, columns(item))));
}

// Rows with fields: one that is shown already stays where it is, with what is being typed in it.
class Rows {
  constructor(body, keyOf, View) {
    Object.assign(this, { body, keyOf, View, views: new Map() });
  }

  show(items) {
    const wanted = new Map(items.map((item) => [String(this.keyOf(item)), item]));
    for (const [key, view] of this.views) {
      if (wanted.has(key)) continue;
      if (view.busy()) {
        view.left();
        continue;
      }
      view.row.remove();
      this.views.delete(key);
    }
    let next = this.body.firstElementChild;
    for (const [key, item] of wanted) {
      let view = this.views.get(key);
      if (view === undefined) {
        view = new this.View(this.body, item);
        view.row.dataset.key = key;
        this.views.set(key, view);
        this.body.insertBefore(view.row, next);
      } else {
        // Rows that stayed though they are no longer listed. Moving one would take the focus from its field.
        while (next && !wanted.has(next.dataset.key)) next = next.nextElementSibling;
        if (view.row === next) next = next.nextElementSibling;
        else this.body.insertBefore(view.row, next);
      }
      view.update(item);
    }
    this.body.closest("table").hidden = this.views.size === 0;
  }

  clear() {
    this.views.clear();
    this.body.replaceChildren();
  }
}

// ---------------------------------------------------------------- requests

let key = sessionStorage.getItem(KEY_ITEM);

class Problem extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }

  // The service, or what stands before it, does not answer; anything else is an answer.
  get isOutage() {
    return this.status === 0 || this.status >= 500;
  }
}

async function call(path, body) {
  const headers = { Accept: "application/json" };
  if (key !== null) headers["X-API-Key"] = key;
  const options = { headers, cache: "no-store", redirect: "error", signal: AbortSignal.timeout(TIMEOUT_MS) };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response, text;
  try {
    response = await fetch(path, options);
    text = await response.text();
  } catch (error) {
    throw new Problem(0, error.name === "TimeoutError" ? `no answer in ${TIMEOUT_MS / 1000} s` : "no connection to it");
  }
  const notice = response.headers.get("X-Dermray-Notice");
  if (notice) setText($("notice"), notice);
  let answer = null;
  try {
    answer = JSON.parse(text);
  } catch {
    // A proxy's page about an error.
    if (response.ok) throw new Problem(0, "what answers is not the service");
  }
  if (!response.ok) throw new Problem(response.status, answer?.detail ?? `HTTP status ${response.status}`);
  return answer;
}

const query = (path, parameters) => `${path}?${new URLSearchParams(parameters)}`;

function announce(text) {
  $("announcer").textContent = text;
}

// ---------------------------------------------------------------- forms within rows

let numForms = 0;

// A field and a button. What fails leaves the field as it is, and says why below it.
class Decision {
  constructor({ label, hint, button, required, maxLength, send }) {
    const id = `decision-${++numForms}`;
    this.input = make("input", { id, type: "text", maxLength, required, autocomplete: "off", placeholder: hint });
    this.button = make("button", { type: "submit", textContent: button });
    this.button.setAttribute("aria-label", label);
    this.problem = make("p", { className: "problem" });
    this.problem.setAttribute("role", "alert");
    this.form = make(
      "form",
      { className: "decision" },
      make("label", { htmlFor: id, className: "unseen", textContent: `${hint}: ${label}` }),
      this.input,
      this.button,
      this.problem,
    );
    this.form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const text = this.input.value.trim();
      if (this.sending || (required && text === "")) return;
      this.sending = true;
      // Not `disabled`, which would drop the focus.
      this.button.setAttribute("aria-disabled", "true");
      setText(this.problem, "");
      try {
        await send(text);
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        if (error.status === 401) askForKey(error.message);
        setText(this.problem, `Not done: ${error.message}`);
      } finally {
        this.sending = false;
        this.button.removeAttribute("aria-disabled");
      }
    });
  }

  busy() {
    return this.sending === true || this.input.value !== "" || this.form.contains(document.activeElement);
  }
}

// ---------------------------------------------------------------- alarms

const alarmPage = { filter: "open", cursors: [null], next: null };
const drafts = new Map();
let repeats = new Map();

class AlarmView {
  constructor(body, alarm) {
    this.severity = make("span", {});
    this.message = make("p", { className: "message", dir: "auto" });
    this.detail = make("pre", { tabIndex: 0 });
    this.detail.setAttribute("aria-label", `Details of alarm ${alarm.id}`);
    this.quiets = make("span", {});
    this.sent = make("span", {});
    this.seen = make("p", { className: "seen", tabIndex: -1, dir: "auto" });
    this.decision = new Decision({
      label: `Acknowledge alarm ${alarm.id}`,
      hint: "Comment (optional)",
      button: "Acknowledge",
      required: false,
      maxLength: 2000,
      send: (comment) => this.acknowledge(comment),
    });
    this.decision.input.value = drafts.get(alarm.id) ?? "";
    this.decision.input.addEventListener("input", () => drafts.set(alarm.id, this.decision.input.value));
    this.row = tableRow(body, [
      [this.severity, " ", make("span", { className: "whole", textContent: alarm.kind })],
      [when(alarm.raised_at), " ", make("span", { className: "quiet", textContent: `#${alarm.id}` })],
      alarm.model_version ?? "–",
      [this.message, make("details", {}, make("summary", { textContent: "Details" }), this.detail)],
      this.quiets,
      this.sent,
      [this.seen, this.decision.form],
    ]);
    this.acknowledgedHere = false;
  }

  update(alarm) {
    this.alarm = alarm;
    setText(this.severity, alarm.severity);
    this.severity.className = `badge ${["critical", "warning"].includes(alarm.severity) ? alarm.severity : "info"}`;
    setText(this.message, alarm.message);
    setText(this.detail, JSON.stringify(alarm.detail, null, 2));
    setText(this.quiets, this.quietText());
    setText(this.sent, Object.entries(alarm.deliveries).map(([name, state]) => `${name}: ${state}`).join(", ") || "–");
    this.sent.className = Object.values(alarm.deliveries).includes("failed") ? "problem" : "";
    const open = alarm.acknowledged_at === null;
    this.seen.hidden = open;
    if (!open) {
      const comment = alarm.detail.acknowledgement;
      const said = comment === undefined ? "" : `: ${comment}`;
      setText(this.seen, "");
      this.seen.append(`${alarm.acknowledged_by ?? "someone"}, `, when(alarm.acknowledged_at), said);
    }
    // What someone types when another person is faster stays readable.
    this.decision.form.hidden = !open && !this.decision.busy();
  }

  quietText() {
    if (this.alarm.quieted_by !== null) return `repeats #${this.alarm.quieted_by}`;
    const ids = repeats.get(this.alarm.id) ?? [];
    if (ids.length === 0) return "–";
    const named = ids.slice(0, 5).map((id) => `#${id}`).join(", ");
    return ids.length > 5 ? `${named} and ${count(ids.length - 5)} more` : named;
  }

  async acknowledge(comment) {
    // A page of alarms that was asked for before must not show this one as open again.
    ++alarmSection.turn;
    const body = comment === "" ? {} : { comment };
    const alarm = await call(`v1/alarms/${this.alarm.id}/acknowledge`, body);
    const hadFocus = this.row.contains(document.activeElement);
    this.acknowledgedHere = true;
    this.decision.input.value = "";
    drafts.delete(alarm.id);
    this.update(alarm);
    this.decision.form.hidden = true;
    if (hadFocus) this.seen.focus();
    const kept = comment === "" || alarm.detail.acknowledgement === comment;
    const lost = kept ? "" : " before; your comment was not kept";
    announce(`Alarm ${alarm.id} was acknowledged by ${alarm.acknowledged_by}${lost}.`);
    if (lost) this.seen.append(" (acknowledged before yours, whose comment was not kept)");
    // Its repeats are acknowledged with it, and the counts changed.
    refreshOne(alarmSection);
    refreshOne(summarySection);
  }

  busy() {
    return this.acknowledgedHere || this.decision.busy();
  }

  left() {
    if (!this.acknowledgedHere) setText(this.decision.problem, "No longer listed here: acknowledged elsewhere, or moved.");
  }
}

const alarmRows = new Rows($("alarm-rows"), (alarm) => alarm.id, AlarmView);

async function loadAlarms() {
  const wanted = { limit: ALARMS_PER_PAGE };
  if (alarmPage.filter === "open") Object.assign(wanted, { unacknowledged: true, quieted: false });
  if (alarmPage.filter === "quieted") wanted.quieted = true;
  const cursor = alarmPage.cursors.at(-1);
  if (cursor !== null) wanted.cursor = cursor;
  const quiet = { unacknowledged: true, quieted: true, limit: MAX_REPEATS };
  return Promise.all([call(query("v1/alarms", wanted)), call(query("v1/alarms", quiet))]);
}

function showAlarms([page, quiet]) {
  repeats = new Map();
  for (const alarm of quiet.items) {
    repeats.set(alarm.quieted_by, [...(repeats.get(alarm.quieted_by) ?? []), alarm.id]);
  }
  alarmRows.show(page.items);
  alarmPage.next = page.next_cursor;
  const empty = { open: "No open alarm.", all: "No alarm was ever raised.", quieted: "No alarm is quieted." };
  $("no-alarms").hidden = alarmRows.views.size > 0;
  setText($("no-alarms"), alarmPage.cursors.length > 1 ? "No older alarm." : empty[alarmPage.filter]);
  const captions = { open: "Open alarms", all: "All alarms", quieted: "Alarms that repeat an earlier one" };
  setText($("alarms-caption"), `${captions[alarmPage.filter]}, newest first`);
  setText($("alarm-page"), `Page ${alarmPage.cursors.length}`);
  $("older-alarms").disabled = alarmPage.next === null;
  $("newer-alarms").disabled = alarmPage.cursors.length === 1;
}

function turnPage(cursors) {
  alarmPage.cursors = cursors;
  alarmRows.clear();
  return refreshOne(alarmSection);
}

// ---------------------------------------------------------------- predictions, labels, drift, shadow

let numOpen = null;

function showSummary(summary) {
  const open = Object.values(summary.unacknowledged_alarms).reduce((sum, number) => sum + number, 0);
  setText($("alarm-counts"), open ? `${plural(open, "open alarm")}: ${counts(summary.unacknowledged_alarms)}` : "");
  document.title = `${open ? `(${open}) ` : ""}dermray monitoring`;
  if (numOpen !== null && open > numOpen) announce(`${plural(open, "open alarm")} now.`);
  numOpen = open;

  const { predictions, abstained, total_ms: times } = summary;
  const figures = [
    ["Predictions", count(predictions)],
    ["Abstained", predictions ? `${count(abstained)} (${share(abstained / predictions)})` : "0"],
    ["Reasons to abstain", counts(summary.abstention_reasons)],
    ["Bands", counts(summary.by_band)],
    ["Models", Object.entries(summary.by_model_version).map(([version, n]) => `${version}: ${count(n)}`).join(", ") || "none"],
    ["Time, median and 95 %", times ? `${figure(times.median)} and ${figure(times.p95)} ms` : "–"],
    ["Labels", count(summary.labels)],
    ["Missed cancers", count(summary.missed_cancers)],
  ];
  const list = $("figures");
  if (list.childElementCount === 0) {
    list.append(...figures.map(([name]) => make("div", {}, make("dt", { textContent: name }), make("dd"))));
  }
  figures.forEach(([, text], index) => setText(list.children[index].lastElementChild, text));
  list.lastElementChild.classList.toggle("missed", summary.missed_cancers > 0);

  showChart(summary);
  const hours = summary.per_hour.filter((hour) => hour.predictions > 0).reverse();
  showRows($("hour-rows"), null, hours, (hour) => [when(hour.start), count(hour.predictions), count(hour.abstained)]);
  showRows($("drift-rows"), $("no-drift"), summary.drift, (drift) => [
    drift.model_version,
    [when(drift.window_start), " to ", when(drift.window_end)],
    make("span", { className: drift.alarm ? "badge warning" : "", textContent: drift.status }),
    drift.drifted.join(", ") || "–",
  ]);
  showRows($("shadow-rows"), $("no-shadow"), summary.shadow, (pair) => [
    pair.champion_version,
    pair.shadow_version,
    count(pair.pairs),
    share(pair.same_band),
    share(pair.raised),
    share(pair.lowered),
    figure(pair.mean_abs_difference),
    figure(pair.rank_correlation),
    `${count(pair.champion_abstained)}, ${count(pair.shadow_abstained)}`,
  ]);
}

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// Bars per hour: answered below, abstained on top. The axis is HTML, so that its text stays readable at any width.
function showChart({ per_hour: hours, predictions, abstained, start, end }) {
  const top = Math.max(1, ...hours.map((hour) => hour.predictions));
  const chart = svg("svg", { viewBox: `0 0 ${hours.length} 100`, preserveAspectRatio: "none", role: "img" });
  chart.setAttribute(
    "aria-label",
    `${plural(predictions, "prediction")} in ${hours.length} hours, ${count(abstained)} abstained; at most ${count(top)} an hour`,
  );
  hours.forEach((hour, index) => {
    const whole = (100 * hour.predictions) / top;
    const refused = (100 * hour.abstained) / top;
    const bar = svg("g", {});
    const title = svg("title", {});
    title.textContent = `${when(hour.start).textContent}: ${count(hour.predictions)}, ${count(hour.abstained)} abstained`;
    const place = { x: index + 0.1, width: 0.8 };
    bar.append(
      title,
      svg("rect", { ...place, class: "answered", y: 100 - whole + refused, height: whole - refused }),
      svg("rect", { ...place, class: "abstained", y: 100 - whole, height: refused }),
    );
    chart.append(bar);
  });
  $("chart").replaceChildren(chart);
  setText($("chart-max"), predictions ? `highest bar: ${count(top)}` : "none in this window");
  $("chart-start").replaceChildren(when(start));
  $("chart-end").replaceChildren(when(end));
}

// ---------------------------------------------------------------- retraining and candidates

let gates = new Map();

const rule = ({ rule: name, context, value, limit, detail }) =>
  `${name}${context ? ` (${context})` : ""}: ${figure(value)}, expected ${limit}${detail ? `; ${detail}` : ""}`;

function showRetrainings(page) {
  gates = new Map();
  for (const { detail } of page.items) {
    const gate = detail.stages?.gate;
    if (gate?.bundle_digest && !gates.has(gate.bundle_digest)) gates.set(gate.bundle_digest, gate);
  }
  candidateRows.views.forEach((view) => view.showGate());
  showRows($("retraining-rows"), $("no-retrainings"), page.items, (request) => [
    when(request.requested_at),
    request.requested_by,
    request.trigger,
    make("span", { dir: "auto", textContent: request.reason }),
    [
      make("span", {
        className: request.state === "failed" ? "badge critical" : "",
        textContent: request.stage === null ? request.state : `${request.state}: ${request.stage}`,
      }),
      request.attempt > 1 ? ` (attempt ${request.attempt})` : null,
      request.error === null ? null : make("p", { className: "problem", textContent: request.error }),
    ],
    request.model_version ?? "–",
  ]);
}

class CandidateView {
  constructor(body, candidate) {
    this.state = make("span", { className: "whole" });
    this.figures = make("div", {});
    this.gate = make("div", {});
    this.approvals = make("ul", { tabIndex: -1 });
    this.decision = new Decision({
      label: `Approve model ${candidate.model_version}`,
      hint: "Reason",
      button: "Approve",
      required: true,
      maxLength: 1000,
      send: (reason) => this.approve(reason),
    });
    const digest = make("code", { className: "whole", title: candidate.digest, textContent: candidate.digest.slice(0, 12) });
    this.row = tableRow(body, [
      [make("strong", { textContent: candidate.model_version }), " ", digest],
      when(candidate.created_at),
      this.state,
      this.figures,
      this.gate,
      [this.approvals, this.decision.form],
    ]);
  }

  update(candidate) {
    this.candidate = candidate;
    setText(this.state, candidate.state);
    const lines = Object.entries(candidate.gate_metrics).map(([context, metrics]) => {
      const shown = Object.entries(metrics).map(([name, value]) => {
        if (value === null || typeof value !== "object") return `${name} ${figure(value)}`;
        const interval = typeof value.low === "number" ? ` (${figure(value.low)} to ${figure(value.high)})` : "";
        return `${name} ${figure(value.value)}${interval}`;
      });
      return `${context}: ${shown.join(", ")}`;
    });
    this.setLines(this.figures, lines);
    this.showGate();
    const approved = candidate.approvals.map((approval) => `${approval.approver}: ${approval.reason}`);
    const items = approved.map((text) => make("li", { dir: "auto", textContent: text }));
    if (this.shownApprovals !== approved.join("\n")) this.approvals.replaceChildren(...items);
    this.shownApprovals = approved.join("\n");
    this.decision.form.hidden = candidate.state !== "candidate" && !this.decision.busy();
  }

  showGate() {
    const gate = gates.get(this.candidate.digest);
    if (gate === undefined) {
      this.setLines(this.gate, ["–"]);
      return;
    }
    const failed = gate.results.filter((result) => !result.passed);
    const verdict = gate.passed
      ? `passed, ${plural(gate.results.length, "rule")}`
      : `refused by ${failed.length} of ${plural(gate.results.length, "rule")}`;
    this.setLines(this.gate, [verdict, ...failed.map(rule)]);
    this.gate.firstElementChild.className = gate.passed ? "" : "problem";
  }

  setLines(element, lines) {
    const shown = [...element.children].map((line) => line.textContent);
    if (shown.join("\n") !== lines.join("\n")) {
      element.replaceChildren(...lines.map((textContent) => make("p", { textContent })));
    }
  }

  async approve(reason) {
    ++candidateSection.turn;
    const approval = await call(`v1/candidates/${encodeURIComponent(this.candidate.model_version)}/approve`, { reason });
    const others = this.candidate.approvals.filter(({ approver }) => approver !== approval.approver);
    this.decision.input.value = "";
    this.update({ ...this.candidate, approvals: [...others, approval] });
    announce(`Model ${approval.model_version} was approved by ${approval.approver}.`);
    this.approvals.focus();
    refreshOne(candidateSection);
  }

  busy() {
    return this.decision.busy();
  }

  left() {
    setText(this.decision.problem, "No longer listed.");
  }
}

const candidateRows = new Rows($("candidate-rows"), (candidate) => `${candidate.model_version}/${candidate.digest}`, CandidateView);

function showCandidates(candidates) {
  candidateRows.show(candidates);
  $("no-candidates").hidden = candidateRows.views.size > 0;
}

// ---------------------------------------------------------------- sections and their refresh

function section(name, problem, content, load, show) {
  return { name, problem, content, load, show, turn: 0, failure: null, forbidden: false };
}

const alarmSection = section("alarms", $("alarms-problem"), $("alarms-content"), loadAlarms, showAlarms);
const summarySection = section(
  "predictions and labels",
  $("summary-problem"),
  $("summary-content"),
  () => call(query("v1/monitoring/summary", { hours: $("hours").value })),
  showSummary,
);
const retrainingSection = section(
  "retraining",
  $("retrainings-problem"),
  $("retrainings-content"),
  () => call(query("v1/retrain", { limit: 20 })),
  showRetrainings,
);
const candidateSection = section(
  "candidates",
  $("candidates-problem"),
  $("candidates-content"),
  () => call("v1/candidates"),
  showCandidates,
);
const sections = [alarmSection, summarySection, retrainingSection, candidateSection];
// Shown only once there is something in them.
for (const { content } of sections) content.hidden = true;

let lastAnswer = null;
let outageBegan = null;

async function refreshSection(part) {
  // Each refusal counts among the service's problems: what needs a higher role is asked again on request alone.
  if (part.forbidden || !$("sign-in").hidden) return;
  const turn = ++part.turn;
  const asked = new Date();
  try {
    const answer = await part.load();
    if (turn !== part.turn) return;
    $("main").hidden = false;
    part.show(answer);
    part.content.hidden = false;
    part.failure = null;
    setText(part.problem, "");
    lastAnswer = new Date();
    setText($("updated"), `As of ${clock(lastAnswer)}`);
  } catch (error) {
    if (turn !== part.turn) return;
    if (error.status === 401) {
      part.failure = null;
      askForKey(error.message);
      return;
    }
    $("main").hidden = false;
    part.failure = error instanceof Problem && error.isOutage ? { at: asked, detail: error.message } : null;
    part.forbidden = error.status === 403;
    if (part.forbidden) part.content.hidden = true;
    setText(part.problem, part.failure ? `Not up to date: ${error.message}` : error.message);
    if (!(error instanceof Problem)) throw error;
  }
}

async function refreshOne(part) {
  await refreshSection(part);
  showOutage();
}

function showOutage() {
  const failing = sections.filter((part) => part.failure !== null);
  const banner = $("outage");
  if (failing.length === 0) {
    if (outageBegan !== null) announce("The service answers again.");
    outageBegan = null;
    banner.hidden = true;
    setText(banner, "");
    return;
  }
  outageBegan ??= failing[0].failure.at;
  const all = failing.length === sections.filter((part) => !part.forbidden).length;
  const what = all ? "The service" : `A part of the service (${failing.map((part) => part.name).join(", ")})`;
  const shown = lastAnswer === null ? "" : all ? ` What is shown is of ${clock(lastAnswer)}.` : "";
  setText(
    banner,
    `${what} has not answered since ${clock(outageBegan)}: ${failing[0].failure.detail}.${shown} ` +
      `It is asked again every ${REFRESH_MS / 1000} s.`,
  );
  banner.hidden = false;
}

let timer;

async function refresh() {
  clearTimeout(timer);
  try {
    // Without a key, one request finds out whether the service asks for one.
    if (key === null && lastAnswer === null) await refreshSection(summarySection);
    await Promise.all(sections.map(refreshSection));
  } finally {
    // Once all have answered or failed: one sentence, read out once.
    showOutage();
    clearTimeout(timer);
    timer = setTimeout(refresh, REFRESH_MS);
  }
}

function refreshAll() {
  for (const part of sections) part.forbidden = false;
  return refresh();
}

// ---------------------------------------------------------------- the key

function askForKey(detail) {
  if (!$("sign-in").hidden) return;
  $("main").hidden = true;
  $("forget-key").hidden = true;
  $("sign-in").hidden = false;
  setText($("key-problem"), key === null ? "" : detail);
  key = null;
  sessionStorage.removeItem(KEY_ITEM);
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("key").value.trim();
  if (!/^[!-~]+$/.test(text)) {
    setText($("key-problem"), "An API key has letters, digits and signs without blanks or accents.");
    return;
  }
  key = text;
  sessionStorage.setItem(KEY_ITEM, key);
  $("key").value = "";
  $("sign-in").hidden = true;
  $("forget-key").hidden = false;
  setText($("key-problem"), "");
  refreshAll();
});

// A fresh page: nothing that the key let someone see stays behind.
$("forget-key").addEventListener("click", () => {
  sessionStorage.removeItem(KEY_ITEM);
  location.reload();
});

// ---------------------------------------------------------------- start

for (const table of document.querySelectorAll("table")) {
  // Rows that are shown as cards are no table to some screen readers without these.
  table.setAttribute("role", "table");
  for (const part of table.querySelectorAll("thead, tbody")) part.setAttribute("role", "rowgroup");
  for (const row of table.querySelectorAll("tr")) row.setAttribute("role", "row");
  for (const head of table.querySelectorAll("th")) head.setAttribute("role", "columnheader");
}
for (const filter of [$("filter-open"), $("filter-all"), $("filter-quieted")]) {
  filter.checked = filter.value === alarmPage.filter;
  filter.addEventListener("change", () => {
    alarmPage.filter = filter.value;
    turnPage([null]);
  });
}
$("older-alarms").addEventListener("click", () => turnPage([...alarmPage.cursors, alarmPage.next]));
$("newer-alarms").addEventListener("click", () => turnPage(alarmPage.cursors.slice(0, -1)));
$("hours").addEventListener("change", () => refreshOne(summarySection));
$("refresh").addEventListener("click", refreshAll);
$("forget-key").hidden = key === null;
setText($("zone"), Intl.DateTimeFormat().resolvedOptions().timeZone);
refresh();
