"use strict";

// htmx renews the parts of the page; this keeps what a person is doing there: a comment being written, a text being
// marked, a table that is open. And it says when what is shown is no longer of now.

const $ = (id) => document.getElementById(id);
const failing = new Set();
const open = new Set();
const scrolled = new Map();
let since = null;
let told = news();

function news() {
  return [...document.querySelectorAll("#now-title, #findings li")].map((found) => found.textContent.trim()).join(" ");
}

function busy(part) {
  const fields = [...part.querySelectorAll("input:not([type=hidden])")];
  const selection = getSelection();
  return (
    fields.some((field) => field === document.activeElement || field.value !== field.defaultValue) ||
    (!selection.isCollapsed && part.contains(selection.anchorNode))
  );
}

function fails(part, why) {
  failing.add(part.id);
  since ??= new Date();
  $("stale").textContent = `${why} What is below may be older than ${since.toISOString().slice(11, 16)} UTC.`;
  $("stale").hidden = false;
}

document.addEventListener("htmx:beforeRequest", (event) => {
  // Nobody looks.
  if (document.hidden) event.preventDefault();
});

document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  for (const part of document.querySelectorAll("[hx-get]")) htmx.trigger(part, "refresh");
});

document.addEventListener("htmx:beforeSwap", (event) => {
  const { target, xhr } = event.detail;
  const here = new URL(xhr.responseURL).pathname.startsWith("/monitoring");
  if (!here || xhr.status !== 200) {
    event.detail.shouldSwap = false;
    fails(target, here ? "The service does not answer in full." : "The session is over: reload the page to sign in.");
    return;
  }
  failing.delete(target.id);
  if (failing.size === 0) {
    since = null;
    $("stale").hidden = true;
  }
  if (busy(target)) {
    event.detail.shouldSwap = false;
    return;
  }
  for (const details of target.querySelectorAll("details")) (details.open ? open.add : open.delete).call(open, details.id);
  for (const region of target.querySelectorAll(".scroll")) scrolled.set(region.id, [region.scrollLeft, region.scrollTop]);
});

for (const name of ["htmx:sendError", "htmx:timeout"]) {
  document.addEventListener(name, (event) => fails(event.detail.target, "The service does not answer."));
}

document.addEventListener("htmx:afterSettle", () => {
  for (const id of open) if ($(id)) $(id).open = true;
  for (const [id, [left, top]] of scrolled) $(id)?.scrollTo(left, top);
  scrolled.clear();
  // Read out when it is another, not every half a minute.
  const now = news();
  if (told !== now) $("announcer").textContent = now;
  told = now;
});
