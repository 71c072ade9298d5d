// Draws the charts of a report, with the help of numbers.js, which comes before it in the same script element.
// What they show stands in #data; without a script the page has everything but curves.
const SVG = "http://www.w3.org/2000/svg";
const data = JSON.parse(document.getElementById("data").textContent);
const HEIGHT = 220;
const MARGIN = { left: 50, right: 8, top: 8, bottom: 24 };
const AXES = {
  step: { label: "step", show: (x) => `step ${Math.round(x).toLocaleString("en")}`, tick: compact },
  seconds: { label: "time in steps", show: duration, tick: duration },
  tokens: { label: "tokens scored", show: (x) => `${compact(x)} tokens`, tick: compact },
};
const FEW = 40; // points that are shown as dots too
const LONG = 100; // steps from which on noise hides the course; what was recorded stays visible behind
const longest = Math.max(...data.runs.map((run) => run.axes.steps.step.length));
const firstSmoothing = longest < LONG ? 0 : longest > 10 * LONG || data.runs.length > 1 ? 0.9 : 0.6;
const state = { axis: "step", smoothing: firstSmoothing, hidden: new Set(), range: null, cursor: null };
const charts = [];

function element(name, attributes = {}, parent = null) {
  const svg = ["svg", "g", "path", "line", "text", "circle", "rect"].includes(name);
  const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") made.textContent = value; else made.setAttribute(key, value);
  }
  if (parent) parent.append(made);
  return made;
}

// ---- a chart ----

class Chart {
  constructor(figure, spec) {
    this.figure = figure;
    this.spec = spec;
    this.own = new Set(); // lines hidden in this chart alone
    this.lines = spec.lines.map((line, place) => ({
      ...line, place, axes: data.runs[line.run].axes[line.axes], ys: data.runs[line.run].metrics[line.name],
    }));
    this.log = this.suggestsLog();
    const caption = figure.querySelector("figcaption");
    this.at = element("span", { class: "at" }, caption);
    if (spec.kind === "line" && this.canLog()) this.addLogButton(caption);
    this.addLegend();
    this.svg = element("svg", { class: "plot", role: "img", tabindex: "0", height: HEIGHT }, figure);
    this.svg.setAttribute("aria-label", this.spokenSummary());
    this.back = element("g", {}, this.svg);
    this.front = element("g", {}, this.svg);
    this.listen();
  }

  values() { return this.lines.flatMap((line) => line.ys.filter((y) => y !== null)); }

  canLog() { return this.lines.some((line) => line.ys.some((y) => y > 0)); }

  suggestsLog() {
    if (this.spec.kind !== "line") return false;
    let low = Infinity, high = 0;
    for (const y of this.values()) { low = Math.min(low, y); high = Math.max(high, y); }
    return low > 0 && high / low > 200;
  }

  addLogButton(caption) {
    const button = element("button", { type: "button", class: "tool", "aria-pressed": this.log, text: "log" }, caption);
    button.title = "Logarithmic scale";
    button.addEventListener("click", () => {
      this.log = !this.log;
      button.setAttribute("aria-pressed", this.log);
      this.draw();
    });
  }

  addLegend() {
    const list = element("ul", { class: "legend" }, this.figure);
    for (const line of this.lines) {
      const button = element("button", { type: "button", title: line.meaning }, element("li", {}, list));
      element("span", { class: `swatch c${line.colour}` }, button);
      button.append(line.label);
      line.value = element("b", {}, button);
      line.button = button;
      button.addEventListener("click", () => {
        if (this.spec.by_run) toggle(state.hidden, line.run); else toggle(this.own, line.place);
        if (this.spec.by_run) update(); else this.draw();
      });
    }
  }

  spokenSummary() {
    const parts = this.lines.map((line) => {
      const known = line.ys.filter((y) => y !== null);
      return `${line.label}: from ${number(known[0])} to ${number(known[known.length - 1])}`;
    });
    return `${this.spec.title}, ${this.spec.unit}. ${parts.join("; ")}`;
  }

  shown() { return this.lines.filter((line) => !state.hidden.has(line.run) && !this.own.has(line.place)); }

  draw() {
    for (const line of this.lines) {
      const visible = !state.hidden.has(line.run) && !this.own.has(line.place);
      line.button.setAttribute("aria-pressed", visible);
    }
    const alone = !this.spec.by_run && this.lines.every((line) => state.hidden.has(line.run));
    this.figure.classList.toggle("hidden", alone);
    const width = this.svg.clientWidth;
    if (!width) return;
    this.width = width;
    this.back.replaceChildren();
    this.front.replaceChildren();
    this.toX = this.toY = null;
    const lines = this.shown().map((line) => ({ ...line, xs: line.axes[state.axis] }));
    this.scaleX(lines);
    const paint = this.spec.kind === "stack" ? this.stack(lines) : this.curves(lines);
    if (!paint) {
      element("text", { class: "nothing", x: width / 2, y: HEIGHT / 2, text: "nothing to show" }, this.back);
    } else {
      this.grid();
      const view = [MARGIN.left - 4, 0, this.toX.width + 8, HEIGHT]; // a zoomed line ends at the edge
      const [x, y, inner, height] = view;
      this.inner = element("svg", { x, y, width: inner, height, viewBox: view.join(" ") }, this.back);
      paint();
      const dot = (line) => element("circle", { class: `dot hidden c${line.colour}`, r: 4 }, this.front);
      this.dots = lines.map((line) => ({ line, dot: dot(line) }));
      this.rule = element("line", { class: "cursor hidden", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }, this.front);
      const area = { y: MARGIN.top, height: HEIGHT - MARGIN.top - MARGIN.bottom };
      this.zoomed = element("rect", { class: "zoom hidden", ...area }, this.front);
    }
    this.read();
  }

  scaleX(lines) {
    let [low, high] = state.range || [Infinity, -Infinity];
    if (!state.range) {
      for (const { xs } of lines) { low = Math.min(low, xs[0]); high = Math.max(high, xs[xs.length - 1]); }
    }
    if (!(high > low)) [low, high] = Number.isFinite(low) ? [low - 0.5, low + 0.5] : [0, 1];
    const span = this.width - MARGIN.left - MARGIN.right;
    this.domain = [low, high];
    this.toX = (x) => MARGIN.left + ((x - low) / (high - low)) * span;
    this.toX.width = span;
    this.fromX = (px) => low + ((px - MARGIN.left) / span) * (high - low);
  }

  // The indexes to draw: those in the domain and one more on each side, which the edge cuts.
  window(xs) {
    const [low, high] = this.domain;
    return [Math.max(0, lowerBound(xs, low) - 1), Math.min(xs.length, lowerBound(xs, high) + 2)];
  }

  scaleY(low, high) {
    const span = HEIGHT - MARGIN.top - MARGIN.bottom;
    if (this.logNow) {
      [low, high] = high / low > 1.001 ? [Math.log(low), Math.log(high)] : [Math.log(low) - 0.5, Math.log(high) + 0.5];
      const room = (high - low) * 0.05;
      this.yDomain = [Math.exp(low - room), Math.exp(high + room)];
      this.toY = (y) => (y > 0 ? MARGIN.top + ((high + room - Math.log(y)) / (high - low + 2 * room)) * span : NaN);
      return;
    }
    if (high - low < 1e-12 * Math.max(1, Math.abs(high))) {
      const room = Math.abs(high) * 0.1 || 1;
      [low, high] = [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
    } else if (this.spec.kind === "line") {
      const room = (high - low) * 0.06;
      [low, high] = [low >= 0 && low < (high - low) * 0.35 ? 0 : low - room, high + room];
    }
    this.yDomain = [low, high];
    this.toY = (y) => MARGIN.top + ((high - y) / (high - low)) * span;
  }

  curves(lines) {
    this.logNow = this.log;
    let low = Infinity, high = -Infinity;
    for (const line of lines) {
      const [start, end] = this.window(line.xs);
      line.smooth = state.smoothing && !this.spec.exact ? smoothed(line.ys, state.smoothing) : null;
      for (let i = start; i < end; i++) {
        const y = line.ys[i];
        if (y === null || (this.logNow && y <= 0)) continue;
        low = Math.min(low, y);
        high = Math.max(high, y);
      }
    }
    if (low > high) return null;
    this.scaleY(low, high);
    return () => lines.forEach((line) => this.curve(line));
  }

  curve(line) {
    const [start, end] = this.window(line.xs);
    const look = `line c${line.colour} dash${Math.floor((this.spec.by_run ? line.run : line.place) / 8) % 3}`;
    const path = (ys, classes) => {
      const d = linePath(line.xs, ys, thinned(line.xs, ys, start, end, this.toX), this.toX, this.toY);
      element("path", { class: classes, d }, this.inner);
    };
    path(line.ys, line.smooth ? `${look} faint` : look);
    if (line.smooth) path(line.smooth, look);
    if (end - start > FEW || line.smooth) return;
    for (let i = start; i < end; i++) {
      const x = line.xs[i], y = line.ys[i] === null ? NaN : this.toY(line.ys[i]);
      if (Number.isFinite(y) && x >= this.domain[0] && x <= this.domain[1]) {
        element("circle", { class: `dot c${line.colour}`, r: 3, cx: this.toX(x), cy: y }, this.inner);
      }
    }
  }

  // Areas on top of one another; where a pixel stands for several steps, their mean.
  stack(lines) {
    this.logNow = false;
    if (!lines.length) return null;
    const xs = lines[0].xs;
    const columns = this.columns(xs);
    let floor = columns.map(() => 0), high = 0;
    for (const line of lines) {
      const ys = state.smoothing ? smoothed(line.ys, state.smoothing) : line.ys;
      line.floor = floor;
      line.ceiling = floor = columns.map(([start, end], c) => {
        let sum = 0;
        for (let i = start; i < end; i++) sum += ys[i] ?? 0;
        return line.floor[c] + sum / (end - start);
      });
      for (const y of floor) high = Math.max(high, y);
    }
    this.scaleY(0, high || 1);
    const places = columns.map(([start, end]) => this.toX((xs[start] + xs[end - 1]) / 2));
    if (places.length === 1) { // one step: as wide as the chart
      places.splice(0, 1, this.toX(this.domain[0]), this.toX(this.domain[1]));
      for (const line of lines) {
        line.floor = [line.floor[0], line.floor[0]];
        line.ceiling = [line.ceiling[0], line.ceiling[0]];
      }
    }
    const point = (ys) => (x, c) => `${x.toFixed(1)} ${this.toY(ys[c]).toFixed(1)}`;
    return () => lines.forEach((line) => {
      const upper = places.map(point(line.ceiling)), lower = places.map(point(line.floor)).reverse();
      element("path", { class: `area c${line.colour}`, d: `M${[...upper, ...lower].join("L")}Z` }, this.inner);
    });
  }

  columns(xs) {
    const [start, end] = this.window(xs);
    const most = Math.max(1, Math.floor(this.toX.width / 2));
    const count = Math.min(most, end - start);
    const cut = (c) => start + Math.round((c * (end - start)) / count);
    return Array.from({ length: count }, (_, c) => [cut(c), cut(c + 1)]);
  }

  grid() {
    const [low, high] = this.yDomain;
    const bottom = HEIGHT - MARGIN.bottom;
    const rows = this.logNow ? logTicks(low, high) : ticks(low, high, 5);
    const shownRows = rows.length > 1 || !this.logNow ? rows : ticks(low, high, 5);
    for (const y of shownRows) {
      const at = this.toY(y);
      if (!(at >= MARGIN.top - 1 && at <= bottom + 1)) continue;
      element("line", { class: "grid", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: at, y2: at }, this.back);
      element("text", { x: MARGIN.left - 6, y: at + 4, "text-anchor": "end", text: tickLabel(y) }, this.back);
    }
    const axis = AXES[state.axis];
    const steps = state.axis === "seconds" ? SECOND_STEPS : null;
    const whole = (x) => state.axis !== "step" || Number.isInteger(x);
    for (const x of ticks(...this.domain, Math.max(2, this.toX.width / 90), steps).filter(whole)) {
      const at = this.toX(x);
      element("line", { class: "grid", x1: at, x2: at, y1: bottom, y2: bottom + 4 }, this.back);
      const anchor = at > this.width - 40 ? "end" : "middle";
      const place = { x: Math.min(at, this.width - 2), y: bottom + 17, "text-anchor": anchor };
      element("text", { ...place, text: axis.tick(x) }, this.back);
    }
    const ends = { x1: MARGIN.left, x2: this.width - MARGIN.right };
    element("line", { class: "grid", ...ends, y1: bottom, y2: bottom }, this.back);
  }

  // ---- the read-out: values at the cursor, or the last ones ----

  read() {
    const cursor = state.cursor;
    const inside = cursor !== null && this.toY && cursor >= this.domain[0] && cursor <= this.domain[1];
    let total = 0, at = null;
    for (const line of this.lines) {
      const xs = line.axes[state.axis];
      let i = line.ys.length - 1;
      if (inside) i = nearest(xs, cursor); else while (i > 0 && line.ys[i] === null) i--;
      line.value.textContent = number(line.ys[i]);
      total += line.ys[i] ?? 0;
      at = xs[i];
      const marked = this.toY && this.dots?.find((d) => d.line.place === line.place);
      if (marked) this.mark(marked.dot, inside && this.spec.kind === "line", xs[i], line.ys[i]);
    }
    if (this.toY) {
      this.rule.classList.toggle("hidden", !inside);
      const px = this.toX(this.lines.length === 1 ? at : cursor ?? 0);
      for (const end of ["x1", "x2"]) this.rule.setAttribute(end, px);
    }
    const together = this.spec.kind === "stack" && this.spec.unit === "s" ? `${number(total)} s · ` : "";
    this.at.textContent = inside ? together + AXES[state.axis].show(at) : "";
  }

  mark(dot, wanted, x, y) {
    const level = y === null ? NaN : this.toY(y);
    const visible = wanted && Number.isFinite(level) && x >= this.domain[0] && x <= this.domain[1];
    dot.classList.toggle("hidden", !visible);
    if (visible) { dot.setAttribute("cx", this.toX(x)); dot.setAttribute("cy", level); }
  }

  listen() {
    const place = (event) => event.clientX - this.svg.getBoundingClientRect().left;
    let from = null;
    this.svg.addEventListener("pointermove", (event) => {
      if (!this.toY) return;
      const px = place(event);
      setCursor(this.fromX(px));
      if (from === null) return;
      this.zoomed.classList.toggle("hidden", Math.abs(px - from) < 6);
      this.zoomed.setAttribute("x", Math.min(px, from));
      this.zoomed.setAttribute("width", Math.abs(px - from));
    });
    this.svg.addEventListener("pointerleave", () => setCursor(null));
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse" || event.button !== 0 || !this.toY) return;
      from = place(event);
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const ends = [from, place(event)].sort((a, b) => a - b);
      from = null;
      const within = (x) => Math.min(Math.max(x, this.domain[0]), this.domain[1]);
      if (ends[1] - ends[0] >= 6) zoom(ends.map((px) => within(this.fromX(px))));
    });
    this.svg.addEventListener("pointercancel", () => { from = null; });
    this.svg.addEventListener("dblclick", () => zoom(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.svg.addEventListener("blur", () => setCursor(null));
  }

  key(event) {
    const line = this.shown()[0];
    if (event.key === "Escape") { setCursor(null); zoom(null); return; }
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!line || !(event.key in moves)) return;
    event.preventDefault();
    const xs = line.axes[state.axis], last = xs.length - 1;
    const stride = event.shiftKey ? Math.max(1, Math.round(last / 20)) : 1;
    const now = state.cursor === null ? last : nearest(xs, state.cursor);
    const next = Math.min(last, Math.max(0, now + moves[event.key] * stride));
    setCursor(xs[next]);
    const value = (each) => each.ys[nearest(each.axes[state.axis], xs[next])];
    const values = this.shown().map((each) => `${each.label} ${number(value(each))}`);
    document.getElementById("spoken").textContent = `${AXES[state.axis].show(xs[next])}: ${values.join(", ")}`;
  }
}

// ---- the page ----

let waiting = false;
function setCursor(x) {
  state.cursor = x;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    for (const chart of charts) chart.read();
  });
}

function toggle(set, value) { if (!set.delete(value)) set.add(value); }

function zoom(range) {
  state.range = range;
  update();
}

function update() {
  for (const chart of charts) chart.draw();
  document.querySelectorAll(".chip").forEach((chip, run) => chip.setAttribute("aria-pressed", !state.hidden.has(run)));
  document.getElementById("unzoom").classList.toggle("hidden", !state.range);
}

function addChoice(bar, label, choices, chosen, change) {
  const select = element("select", {}, element("label", { text: label }, bar));
  for (const [value, text] of choices) element("option", { value, text }, select);
  select.value = chosen;
  select.addEventListener("change", () => change(select.value));
}

function addToolbar() {
  const bar = document.getElementById("toolbar");
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "All charts");
  if (data.runs.length > 1) {
    const chips = element("div", { class: "runs" }, bar);
    data.runs.forEach((run, place) => {
      const chip = element("button", { type: "button", class: "chip", "aria-pressed": "true" }, chips);
      element("span", { class: `swatch c${place % 8}` }, chip);
      chip.append(run.label);
      chip.addEventListener("click", () => { toggle(state.hidden, place); update(); });
    });
  }
  const axes = Object.entries(AXES).map(([name, axis]) => [name, axis.label]);
  addChoice(bar, "over", axes, state.axis, (name) => { state.axis = name; state.cursor = null; zoom(null); });
  const strengths = [["0", "off"], ["0.6", "light"], ["0.9", "medium"], ["0.98", "strong"]];
  addChoice(bar, "smoothing", strengths, String(state.smoothing), (keep) => {
    state.smoothing = Number(keep);
    update();
  });
  const back = element("button", { type: "button", id: "unzoom", class: "hidden", text: "whole run" }, bar);
  back.addEventListener("click", () => zoom(null));
  element("span", { class: "hint", text: "drag in a chart to zoom, double-click to go back" }, bar);
  bar.hidden = false;
}

addToolbar();
for (const figure of document.querySelectorAll("figure.chart")) {
  charts.push(new Chart(figure, data.charts[Number(figure.dataset.chart)]));
}
let width = 0;
new ResizeObserver(() => {
  const now = document.body.clientWidth;
  if (now === width) return;
  width = now;
  requestAnimationFrame(update);
}).observe(document.body);
