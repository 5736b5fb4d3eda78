"use strict";
// Texts of marks under the pointer
const tip = document.getElementById("tip");
document.addEventListener("pointermove", (event) => {
  const mark = event.target.closest("[data-tip]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const box = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - box.width - 6);
  const top = event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18;
  tip.style.transform = `translate(${Math.max(6, left)}px, ${top}px)`;
});
// Commands to the clipboard, or at least selected
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const code = button.previousElementSibling;
    getSelection().selectAllChildren(code);
    let done = false;
    try { await navigator.clipboard.writeText(code.textContent); done = true; } catch { done = document.execCommand("copy"); }
    button.textContent = done ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
}
// Noise on its way to the latents
for (const mover of document.querySelectorAll(".mover")) {
  const flow = mover.parentElement.querySelector(".flow");
  const slider = mover.querySelector("input");
  const play = mover.querySelector("button");
  let frame = 0;
  const show = () => flow.style.setProperty("--t", slider.value);
  const stop = () => { cancelAnimationFrame(frame); frame = 0; play.textContent = "Play"; };
  slider.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (frame) return stop();
    const from = Number(slider.value) >= 1 ? 0 : Number(slider.value);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
      slider.value = Number(slider.value) < 1 ? 1 : 0;
      return show();
    }
    let began = 0;
    const step = (now) => {
      began ||= now;
      const t = Math.min(1, from + (now - began) / 3200);
      slider.value = t * t * (3 - 2 * t);
      show();
      if (t < 1) frame = requestAnimationFrame(step); else stop();
    };
    play.textContent = "Pause";
    frame = requestAnimationFrame(step);
  });
}
