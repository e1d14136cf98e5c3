"use strict";

// What the Analyse page does beyond its form: pictures by drag and drop, the body figure, progress, and the slider over a
// result. Everything works without it.

const SECONDS_A_PICTURE = 0.05;

function whenShown(selector, act) {
  for (const element of document.querySelectorAll(selector)) {
    if (element.dataset.ready) continue;
    element.dataset.ready = "yes";
    act(element);
  }
}

function showChosen(input) {
  const list = document.getElementById("chosen");
  for (const image of list.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  list.replaceChildren(
    ...[...input.files].slice(0, 12).map((file) => {
      const item = document.createElement("li");
      const image = document.createElement("img");
      image.src = URL.createObjectURL(file);
      image.alt = file.name;
      item.append(image);
      return item;
    }),
  );
  if (input.files.length > 12) {
    const more = document.createElement("li");
    more.textContent = `and ${input.files.length - 12} more`;
    list.append(more);
  }
  if (input.files.length) for (const sample of document.querySelectorAll("[name=sample]")) sample.checked = false;
}

function setUpDrop(zone) {
  const input = zone.querySelector("input[type=file]");
  document.getElementById("drop-hint").hidden = false;
  input.addEventListener("change", () => showChosen(input));
  zone.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    input.files = event.dataTransfer.files;
    showChosen(input);
  });
}

function setUpFigure(figure) {
  const select = document.querySelector("[data-body-site]");
  const regions = figure.querySelectorAll("[data-site]");
  const mark = () => {
    for (const region of regions) region.classList.toggle("chosen", region.dataset.site === select.value);
  };
  for (const region of regions) {
    region.addEventListener("click", () => {
      select.value = select.value === region.dataset.site ? "" : region.dataset.site;
      mark();
    });
  }
  select.addEventListener("change", mark);
  mark();
}

function setUpSlider(slider) {
  const over = document.querySelector(".layers .over");
  const set = () => (over.style.opacity = slider.value / 100);
  slider.hidden = false;
  slider.addEventListener("input", set);
  set();
}

// First the upload, as far as it is; then the scoring, as far as so many pictures should be.
function setUpProgress(form) {
  const bar = document.getElementById("progress");
  const text = document.getElementById("progress-text");
  let timer = 0;
  form.addEventListener("htmx:beforeRequest", () => {
    bar.hidden = false;
    bar.removeAttribute("value");
    text.textContent = "Sending";
    document.getElementById("form-problem").textContent = "";
  });
  form.addEventListener("htmx:xhr:progress", (event) => {
    if (timer || !event.detail.lengthComputable || !event.detail.total) return;
    bar.value = (50 * event.detail.loaded) / event.detail.total;
    if (event.detail.loaded < event.detail.total) return;
    const number = Math.max(1, document.getElementById("images").files.length);
    text.textContent = number > 1 ? `Looking at ${number} pictures` : "Looking at the picture";
    const begun = performance.now();
    timer = setInterval(() => {
      const expected = 1000 * (0.5 + number * SECONDS_A_PICTURE);
      bar.value = 50 + 50 * (1 - Math.exp((begun - performance.now()) / expected));
    }, 100);
  });
  form.addEventListener("htmx:afterRequest", (event) => {
    clearInterval(timer);
    timer = 0;
    bar.hidden = true;
    text.textContent = "";
    if (!event.detail.xhr.status) document.getElementById("form-problem").textContent = "The service does not answer. Try again.";
  });
}

// A refused form stays as it is, with the pictures that were chosen, and says why; so it does when something answers
// that is no page of ours.
function keepForm(event) {
  const answer = new DOMParser().parseFromString(event.detail.serverResponse ?? "", "text/html");
  const { status } = event.detail.xhr;
  if (status < 400 && answer.getElementById("main")) return;
  event.detail.shouldSwap = false;
  const problem = answer.querySelector(".problem")?.textContent.trim();
  document.getElementById("form-problem").textContent = problem || `The service did not answer as expected (${status}). Try again.`;
  for (const name of ["csrf_token", "key"]) {
    const fresh = answer.querySelector(`#analyse [name=${name}]`);
    if (fresh) document.querySelector(`#analyse [name=${name}]`).value = fresh.value;
  }
  document.getElementById("form-problem").scrollIntoView({ block: "center" });
}

function setUp() {
  whenShown("#drop", setUpDrop);
  whenShown(".body-figure", setUpFigure);
  whenShown("#opacity", setUpSlider);
  whenShown("#analyse", setUpProgress);
  whenShown("[data-address]", (result) => {
    shown = result.dataset.address;
    if (location.pathname + location.search !== shown) history.pushState({}, "", shown);
  });
}

// A fragment, such as that of the skip link, is the same page.
let shown = location.pathname + location.search;
addEventListener("popstate", () => {
  if (location.pathname + location.search !== shown) location.reload();
});
document.addEventListener("htmx:beforeSwap", keepForm);
document.addEventListener("DOMContentLoaded", setUp);
document.addEventListener("htmx:afterSwap", () => {
  setUp();
  document.getElementById("main").focus();
});
