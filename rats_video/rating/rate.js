"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const videos = [at("clip1"), at("clip2")], images = [at("image1"), at("image2")], buttons = [...document.querySelectorAll("#choices button")];
  const NAME = "rats-video-person", CHOICES = { 1: "left", 2: "right", 0: "same" };
  let person = "", trial = null, busy = false;
  let sound = false, heard = 0;  // whether the pair has sound; the side whose is heard
  const listened = new Set();  // the sides that were heard

  const ask = async (path, body) => {
    const answer = await fetch(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.error);
    return content;
  };
  const load = async (url) => {
    const answer = await fetch(url);
    if (!answer.ok) throw new Error("a clip is missing");
    const content = await answer.blob();
    return { url: URL.createObjectURL(content), still: content.type === "image/png" };
  };
  const figures = [...document.querySelectorAll("figure")];
  const unmark = () => figures.forEach((figure) => figure.classList.remove("chosen"));
  const complain = (text) => { at("alert").textContent = text; at("alert").hidden = !text; };
  const canChoose = () => trial && (!sound || listened.size === 2);
  const enable = () => {
    busy = false;
    for (const button of buttons) button.disabled = button.id === "undo" ? at("progress").dataset.done === "0" : !canChoose();
  };

  // Both begin together, and again once both have ended; of clips with sound, then the other one's is heard.
  const play = () => videos.forEach(async (video, side) => {
    const audible = sound && side === heard;
    video.currentTime = 0;
    video.muted = !audible;
    figures[side].classList.toggle("heard", audible);
    try {
      await video.play();
    } catch (error) {
      if (error.name !== "NotAllowedError") return;  // the next pair came meanwhile
      video.muted = true;  // this browser wants a click on the clip first
      figures[side].classList.remove("heard");
      video.play().catch(() => {});
      return;
    }
    if (!audible) return;
    listened.add(side);
    if (!busy) enable();
  });
  const hear = (side) => { if (sound && trial) { heard = side; play(); } };
  videos.forEach((video, side) => {
    video.addEventListener("ended", () => {
      if (!videos.every((each) => each.ended)) return;
      if (sound) heard = 1 - heard;
      play();
    });
    video.addEventListener("click", () => hear(side));
  });
  const ready = (side, { url, still }) => new Promise((resolve, reject) => {
    const [shown, other] = still ? [images[side], videos[side]] : [videos[side], images[side]];
    other.hidden = true;
    shown.hidden = false;
    URL.revokeObjectURL(shown.src);
    shown.oncanplaythrough = shown.onload = resolve;
    shown.onerror = () => reject(new Error("this browser cannot show the clips"));
    shown.src = url;
  });

  const show = async (state) => {
    trial = null;
    at("progress").textContent = `${person}: ${state.done} of ${state.total}`;
    at("progress").dataset.done = state.done;
    at("start").hidden = true;
    at("choices").hidden = false;
    at("trial").hidden = !state.trial;
    at("end").hidden = Boolean(state.trial);
    at("end").textContent = `Thank you, ${person}: all ${state.total} are done.`;
    if (!state.trial) { videos.forEach((video) => video.pause()); return; }
    at("prompt").textContent = state.trial.prompt;
    const clips = await Promise.all([1, 2].map((side) => load(`/clip/${state.trial.name}/${side}`)));
    await Promise.all(clips.map((clip, side) => ready(side, clip)));
    unmark();
    trial = state.trial.name;
    [sound, heard] = [state.sound, 0];
    listened.clear();
    at("hint").hidden = !sound;
    play();
  };

  // What cannot be sent is not lost: the pair stays, and the same key sends it again.
  const step = async (path, body) => {
    if (busy) return;
    busy = true;
    buttons.forEach((button) => { button.disabled = true; });
    const before = trial;
    try {
      const state = await ask(path, { person, ...body });
      complain("");
      await show(state);
    } catch (error) {
      trial ??= before;
      unmark();
      complain(error instanceof TypeError ? "The server does not answer. Your votes are saved: start it again, then go on here." : error.message);
    }
    enable();
  };
  const choose = (choice) => {
    if (!canChoose() || busy) return;
    if (choice !== "right") figures[0].classList.add("chosen");
    if (choice !== "left") figures[1].classList.add("chosen");
    step("/vote", { trial, choice });
  };
  const undo = () => { if (person) step("/undo", {}); };

  at("person").value = localStorage.getItem(NAME) ?? "";
  at("start").addEventListener("submit", (event) => {
    event.preventDefault();
    person = at("person").value.trim().replace(/\s+/g, " ");
    if (!person) return;
    localStorage.setItem(NAME, person);
    step("/next", {});
  });
  for (const button of buttons) button.addEventListener("click", () => button.id === "undo" ? undo() : choose(button.dataset.choice));
  document.addEventListener("keydown", (event) => {
    if (!at("start").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in CHOICES) choose(CHOICES[event.key]);
    else if (event.key.toLowerCase() === "u") undo();
    else if (event.key.toLowerCase() === "s") hear(1 - heard);
  });
})();
