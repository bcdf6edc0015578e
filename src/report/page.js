"use strict";
(() => {
  // Images are stored once, by name; an episode's are set when it is first opened.
  const images = JSON.parse(document.getElementById("images").textContent);
  const fill = root => {
    for (const img of root.querySelectorAll("img[data-i]")) {
      img.src = images[img.dataset.i];
      img.removeAttribute("data-i");
    }
  };
  for (const ask of document.querySelectorAll(".ask")) fill(ask);
  for (const episode of document.querySelectorAll("details.episode")) {
    if (episode.open) fill(episode);
    episode.addEventListener("toggle", () => fill(episode));
  }

  // One bucket of episodes (phase and step) at a time.
  const buckets = [...document.querySelectorAll(".bucket")];
  const controls = document.getElementById("controls");
  const show = chosen => {
    for (const b of buckets) b.hidden = b !== chosen;
    for (const b of controls.querySelectorAll("button")) b.setAttribute("aria-pressed", b.dataset.bucket === chosen.id);
  };
  const picks = new Map();
  for (const bucket of buckets) {
    const phase = bucket.dataset.phase;
    if (!picks.has(phase)) {
      const pick = document.createElement("div");
      pick.className = "pick";
      const label = document.createElement("span");
      label.textContent = phase;
      pick.append(label);
      controls.insertBefore(pick, controls.querySelector("label"));
      picks.set(phase, pick);
    }
    const button = document.createElement("button");
    button.textContent = bucket.dataset.step || "all";
    button.dataset.bucket = bucket.id;
    button.addEventListener("click", () => show(bucket));
    picks.get(phase).append(button);
  }
  if (buckets.length) {
    controls.hidden = false;
    const named = id => buckets.find(b => b.id === id);
    show(named(location.hash.slice(1)) ?? named("ends") ?? buckets[buckets.length - 1]);
    const toggle = document.getElementById("lp");
    const colour = () => document.body.classList.toggle("lp", toggle.checked);
    toggle.addEventListener("change", colour);
    colour();
  }

  // Tooltips on the curves: the nearest logged step under the pointer.
  const SVG = "http://www.w3.org/2000/svg";
  const text = (v, percent) => percent ? (v * 100).toFixed(1) + "%" : String(+v.toPrecision(4));
  for (const svg of document.querySelectorAll("svg[data-series]")) {
    const series = JSON.parse(svg.dataset.series);
    const [left, right, top, bottom, x0, x1, y0, y1] = svg.dataset.frame.split(" ").map(Number);
    const {width, height} = svg.viewBox.baseVal;
    const percent = svg.dataset.percent === "1";
    const px = x => left + (x - x0) / (x1 - x0) * (width - left - right);
    const py = y => height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom);
    const steps = [...new Set(series.flatMap(s => s[2].map(p => p[0])))].sort((a, b) => a - b);
    const marks = document.createElementNS(SVG, "g");
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    svg.append(marks);
    svg.parentNode.append(tip);
    svg.addEventListener("pointermove", e => {
      const box = svg.getBoundingClientRect();
      const x = x0 + ((e.clientX - box.left) / box.width * width - left) / (width - left - right) * (x1 - x0);
      const step = steps.reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a);
      marks.replaceChildren();
      const line = document.createElementNS(SVG, "path");
      line.setAttribute("class", "cross");
      line.setAttribute("d", `M${px(step)} ${top}V${height - bottom}`);
      marks.append(line);
      const lines = ["step " + step];
      for (const [label, hue, points] of series) {
        for (const [px_, y] of points.filter(p => p[0] === step)) {
          const dot = document.createElementNS(SVG, "circle");
          dot.setAttribute("class", "h" + hue);
          dot.setAttribute("cx", px(px_));
          dot.setAttribute("cy", py(y));
          dot.setAttribute("r", 3.5);
          marks.append(dot);
          lines.push((series.length > 1 ? label + " " : "") + text(y, percent));
        }
      }
      tip.textContent = lines.join("  ·  ");
      tip.hidden = false;
      const parent = svg.parentNode.getBoundingClientRect();
      const at = px(step) / width * box.width + box.left - parent.left;
      tip.style.left = Math.max(4, Math.min(at - tip.offsetWidth / 2, parent.width - tip.offsetWidth - 4)) + "px";
      tip.style.top = box.top - parent.top - 4 + "px";
    });
    svg.addEventListener("pointerleave", () => {
      marks.replaceChildren();
      tip.hidden = true;
    });
  }
})();
