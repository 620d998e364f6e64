"use strict";
(() => {
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // ---- tables: a title sorts its column, again turns it round
  for (const table of all("table.sortable")) {
    const titles = all("thead th", table), body = one("tbody", table);
    titles.forEach((title, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...title.childNodes);
      title.append(button);
      button.addEventListener("click", () => {
        const falls = title.getAttribute("aria-sort") !== "descending";
        titles.forEach((each) => each.removeAttribute("aria-sort"));
        title.setAttribute("aria-sort", falls ? "descending" : "ascending");
        const value = (row) => row.cells[column].dataset.v ?? (column ? "" : row.cells[column].textContent);
        const order = (a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === "" || y === "") return (x === "") - (y === "");  // what is not known comes last
          const rises = column ? Number(x) - Number(y) : x.localeCompare(y);
          return falls ? -rises : rises;
        };
        body.append(...[...body.rows].sort(order));
      });
    });
  }

  // ---- charts: values under the pointer
  const numbers = (text) => text.split(" ").map(Number);
  for (const figure of all(".plot")) {
    const svg = one("svg", figure), box = svg.viewBox.baseVal;
    let lines = null, tip = null, hair = null;  // lines: what was drawn, and where
    const hide = () => { tip?.remove(); hair?.remove(); tip = hair = null; };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      lines ??= all("path[data-x]", svg).map((path) => {
        const pixels = numbers(path.getAttribute("d").replace(/[ML]/g, " ").trim());
        return { label: path.dataset.label, x: numbers(path.dataset.x), y: numbers(path.dataset.y), px: pixels.filter((_, i) => i % 2 === 0) };
      });
      const frame = svg.getBoundingClientRect();
      const at = ((event.clientX - frame.left) / frame.width) * box.width;
      let nearest = null, place = 0;
      for (const line of lines) line.px.forEach((px, i) => {
        if (nearest === null || Math.abs(px - at) < Math.abs(nearest - at)) [nearest, place] = [px, line.x[i]];
      });
      if (nearest === null) return;
      if (!tip) {
        tip = document.createElement("div");
        tip.className = "tip";
        figure.append(tip);
        hair = document.createElementNS("http://www.w3.org/2000/svg", "path");
        hair.setAttribute("class", "hair");
        svg.append(hair);
      }
      hair.setAttribute("d", `M${nearest} 8V204`);
      tip.replaceChildren();
      const say = (text, name) => { const p = document.createElement("p"); p.textContent = text; p.className = name; tip.append(p); };
      say(String(place), "at");
      lines.forEach((line) => {
        const index = line.x.indexOf(place);
        if (index >= 0) say(`${line.label}: ${line.y[index]}`, "value");
      });
      const inside = figure.getBoundingClientRect(), pointer = event.clientX - inside.left;
      tip.style.top = `${frame.top - inside.top + 4}px`;
      const left = pointer > inside.width / 2 ? pointer - tip.offsetWidth - 14 : pointer + 14;
      tip.style.left = `${Math.max(4, Math.min(left, inside.width - tip.offsetWidth - 4))}px`;
    });
  }

  // ---- clips: one clock for all
  const gallery = one(".gallery");
  if (!gallery) return;
  const fps = Number(gallery.dataset.fps), length = Number(gallery.dataset.seconds), half = 0.5 / fps;
  const count = Math.max(1, Math.round(length * fps));
  const cards = all(".card", gallery), videos = all("video", gallery);
  const [play, scrub, shown, speed, loop] = ["play", "scrub", "frame", "speed", "loop"].map((id) => document.getElementById(id));
  const sources = new Map(videos.map((video) => [video, video.getAttribute("src")]));
  const visible = new Set();
  let clock = 0, playing = false, last = 0, heard = null;

  const place = (video) => Math.min(Math.floor(clock * fps + 1e-6) / fps + half, Number(video.dataset.seconds) - half);
  const seek = (video) => { if (video.readyState > 0 && Math.abs(video.currentTime - place(video)) > half / 2) video.currentTime = place(video); };
  const start = (video) => {
    video.playbackRate = Number(speed.value);
    if (clock < Number(video.dataset.seconds) - half) video.play().catch(() => {});  // scrolled away meanwhile
  };
  const tell = () => {
    const frame = Math.min(count - 1, Math.floor(clock * fps + 1e-6));
    scrub.value = String(frame);
    scrub.setAttribute("aria-valuetext", `frame ${frame + 1} of ${count}`);
    shown.textContent = `${frame + 1} / ${count}`;
  };
  const go = (frame) => {
    clock = Math.max(0, Math.min(count - 1, frame)) / fps;
    visible.forEach(seek);
    tell();
  };
  const tick = (now) => {
    if (!playing) return;
    clock += ((now - last) / 1000) * Number(speed.value);
    last = now;
    // What is heard leads: hurrying it would be heard.
    if (heard && heard.readyState >= 2 && !heard.seeking && !heard.paused) clock = heard.currentTime;
    if (clock >= length) {
      if (!loop.checked) { setPlaying(false); go(count - 1); return; }
      clock %= length;
      visible.forEach((video) => { video.currentTime = clock; start(video); });
    }
    for (const video of visible) {
      const late = Math.min(clock, Number(video.dataset.seconds)) - video.currentTime;
      if (video.readyState < 2 || video.seeking) continue;
      if (Math.abs(late) > 3 / fps) video.currentTime = Math.max(0, video.currentTime + late);
      const hurry = Math.abs(late) < 0.2 / fps ? 1 : Math.max(0.5, Math.min(2, 1 + Math.round(late * 40) / 20));
      if (video.playbackRate !== hurry * Number(speed.value)) video.playbackRate = hurry * Number(speed.value);
    }
    tell();
    requestAnimationFrame(tick);
  };
  const setPlaying = (wanted) => {
    playing = wanted;
    play.classList.toggle("playing", playing);
    play.setAttribute("aria-label", playing ? "Pause" : "Play");
    if (playing) {
      if (clock >= length - 1.5 / fps) go(0);
      last = performance.now();
      visible.forEach(start);
      requestAnimationFrame(tick);
    } else {
      visible.forEach((video) => video.pause());
      go(Math.floor(clock * fps + 1e-6));
    }
  };
  const step = (by) => { const frame = Math.floor(clock * fps + 1e-6) + by; if (playing) setPlaying(false); go((frame + count) % count); };

  // ---- sound: of one clip at a time, of none at first
  const switches = all(".sound", gallery);
  const hear = (video) => {
    heard = video;
    videos.forEach((each) => { each.muted = each !== heard; });
    switches.forEach((each) => each.setAttribute("aria-pressed", String(heard !== null && each.parentNode.contains(heard))));
    if (heard && !playing) setPlaying(true);
  };
  for (const each of switches) {
    const video = one("video", each.parentNode);
    each.hidden = false;
    each.addEventListener("click", () => hear(video === heard ? null : video));
  }

  // Only what is in view holds a decoder.
  const watcher = new IntersectionObserver((entries) => {
    for (const { target: video, isIntersecting } of entries) {
      if (isIntersecting && !visible.has(video)) {
        visible.add(video);
        video.src = sources.get(video);
        video.load();
      } else if (!isIntersecting && visible.delete(video)) {
        if (video === heard) hear(null);
        video.removeAttribute("src");
        video.load();
      }
    }
  }, { rootMargin: "150px" });
  for (const video of videos) {
    video.removeAttribute("src");
    video.removeAttribute("controls");
    video.preload = "auto";
    video.muted = true;
    video.addEventListener("loadeddata", () => { seek(video); if (playing) start(video); });
    video.addEventListener("click", () => setPlaying(!playing));
    watcher.observe(video);
  }
  one(".toolbar").hidden = false;
  loop.checked = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  play.addEventListener("click", () => setPlaying(!playing));
  document.getElementById("back").addEventListener("click", () => step(-1));
  document.getElementById("forward").addEventListener("click", () => step(1));
  scrub.addEventListener("input", () => { const frame = Number(scrub.value); if (playing) setPlaying(false); go(frame); });

  // ---- filter and sort
  const filter = document.getElementById("filter"), sort = document.getElementById("sort");
  const prompt = new Map(cards.map((card) => [card, one("h3", card).textContent]));
  const sift = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    cards.forEach((card) => { card.hidden = !words.every((word) => prompt.get(card).toLowerCase().includes(word)); });
    const left = cards.filter((card) => !card.hidden).length;
    document.getElementById("count").textContent = `${left} of ${cards.length} prompts`;
    one(".empty").hidden = left > 0;
  };
  const arrange = () => {
    const by = sort.value, sign = by[0] === "-" ? -1 : 1;
    const key = (card) => Number(card.getAttribute(`data-k${by.slice(1)}`) ?? NaN);
    const order = by === "place" ? () => 0
      : by === "prompt" ? (a, b) => prompt.get(a).localeCompare(prompt.get(b))
      : (a, b) => {
        const [x, y] = [key(a), key(b)];
        return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : sign * (x - y);
      };
    gallery.append(...[...cards].sort(order));
  };
  filter.addEventListener("input", sift);
  sort.addEventListener("change", arrange);
  filter.value = "";
  sort.value = "place";
  sift();
  tell();

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (event.target === filter) {
      if (event.key === "Escape") { filter.value = ""; sift(); filter.blur(); }
      return;
    }
    if (event.key === "/") { event.preventDefault(); filter.focus(); filter.scrollIntoView({ block: "nearest" }); return; }
    if (event.target.closest("input[type=search], select, .scroll")) return;
    if (event.key === " " && !event.target.closest("button, summary, a, input[type=checkbox]")) { event.preventDefault(); setPlaying(!playing); }
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && event.target !== scrub) { event.preventDefault(); step(by); }
  });
})();
