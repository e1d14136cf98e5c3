"use strict";

// Keys of the review page: 1 to 9 choose a class, Enter saves, s puts the lesion off, u goes back, z zooms. In the
// comment they are text, but for Control and Enter.

const press = (selector) => document.querySelector(selector)?.click();

document.addEventListener("keydown", (event) => {
  const writing = event.target.matches("textarea");
  if (writing && event.key === "Enter" && (event.ctrlKey || event.metaKey)) press("button[value=label]");
  if (writing || event.ctrlKey || event.metaKey || event.altKey) return;
  const choice = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (choice) {
    choice.checked = true;
    choice.focus();
  } else if (event.key === "Enter" && !event.target.matches("a, button")) press("button[value=label]");
  else if (event.key === "s") press("#skip");
  else if (event.key === "u") press("#undo");
  else if (event.key === "z") press("#zoom");
  else return;
  event.preventDefault();
});

document.getElementById("zoom")?.addEventListener("click", (event) => {
  event.preventDefault();
  event.currentTarget.classList.toggle("zoomed");
});
