// Numbers of a token of an answer, or of a cell of a strip: on hover, on a tap, and by the arrow keys.
const popup = document.getElementById("popup");
const NUMBERS = ["forward KL", "reverse KL", "JSD"];

function percent(share) {
  if (share === null) return "–";
  if (share < 1e-5) return "below 0.001 %";
  return `${share < 1e-3 ? Number((100 * share).toPrecision(1)) : (100 * share).toFixed(1)} %`;
}

function tokenContent([text, forward, reverse, jsd, student, teacher, others]) {
  const numbers = [forward, reverse, jsd].map((value, i) => `${NUMBERS[i]} ${number(value)}`).join(", ");
  return {
    title: text,
    lines: [`${numbers} nats`, `student ${percent(student)}, teacher ${percent(teacher)}`],
    head: "the teacher's most likely",
    rows: others.map(([other, share]) => [other, percent(share)]),
  };
}

function cellContent(row, column) {
  const first = column * row.width + 1, last = (column + 1) * row.width;
  const values = [row.forward_kl, row.reverse_kl, row.jsd].map((means, i) => `${NUMBERS[i]} ${number(means[column])}`);
  return {
    title: `${row.label}, ${first === last ? `token ${first}` : `tokens ${first} to ${last}`}`,
    lines: [`${values.join(", ")} nats`, `mean of ${row.tokens[column]} tokens`],
    rows: [],
  };
}

let inspected = null; // whose cell the popup is about

// A group of cells that have numbers. One of them is current, and the popup is about it. `content(index)` is what the
// popup says; `place(index, key)` is where a key leads from there, or null.
class Inspected {
  constructor(group, cells, content, place) {
    Object.assign(this, { group, cells, content, place, current: -1 });
    group.addEventListener("pointerover", (event) => this.point(event.target));
    group.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") this.show(-1); });
    group.addEventListener("blur", () => this.show(-1));
    group.addEventListener("keydown", (event) => this.key(event));
  }

  point(target) {
    const index = this.cells.indexOf(target);
    if (index >= 0) this.show(index);
  }

  key(event) {
    if (event.key === "Escape") { this.show(-1); return; }
    const next = this.place(this.current, event.key);
    if (next === null) return;
    event.preventDefault();
    const index = Math.min(this.cells.length - 1, Math.max(0, next));
    this.cells[index].scrollIntoView({ block: "nearest" });
    this.show(index);
    const { title, lines, rows, head } = this.content(this.current);
    const others = rows.map((row) => row.join(" "));
    const words = [title, ...lines, ...(rows.length ? [head, ...others] : [])];
    document.getElementById("spoken").textContent = words.join(". ");
  }

  show(index) {
    if (index >= 0 && inspected !== this) {
      inspected?.show(-1);
      inspected = this;
    }
    if (index === this.current) return; // the late blur of a group that was left must not hide another's popup
    if (this.current >= 0) this.cells[this.current].classList.remove("current");
    this.current = index;
    popup.hidden = index < 0;
    if (index < 0) return;
    this.cells[index].classList.add("current");
    fillPopup(this.content(index));
    placePopup(this.cells[index].getClientRects()[0] ?? this.cells[index].getBoundingClientRect());
  }
}

function fillPopup({ title, lines, rows, head }) {
  popup.replaceChildren();
  element("b", { text: title }, popup);
  for (const line of lines) element("div", { text: line }, popup);
  if (!rows.length) return;
  const body = element("tbody", {}, element("table", {}, popup));
  element("th", { scope: "col", colspan: 2, text: head }, element("tr", {}, body));
  for (const [text, share] of rows) {
    const row = element("tr", {}, body);
    element("td", { text }, row);
    element("td", { class: "number", text: share }, row);
  }
}

// Below the thing, or above it where the window ends.
function placePopup(box) {
  const room = 8, { width, height } = popup.getBoundingClientRect();
  const left = Math.max(room, Math.min(box.left, document.documentElement.clientWidth - width - room));
  const below = box.bottom + room + height <= window.innerHeight;
  popup.style.left = `${left + window.scrollX}px`;
  popup.style.top = `${(below ? box.bottom + room : Math.max(room, box.top - room - height)) + window.scrollY}px`;
}

const STEPS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };

for (const group of document.querySelectorAll("[data-answer]")) {
  const tokens = data.answers[Number(group.dataset.answer)];
  const place = (now, key) => (key in STEPS ? now + STEPS[key] : null);
  new Inspected(group, [...group.querySelectorAll(".token")], (i) => tokenContent(tokens[i]), place);
}

for (const group of document.querySelectorAll("svg[data-strip]")) {
  const rows = data.strips[Number(group.dataset.strip)];
  const cells = [...group.querySelectorAll("rect")];
  const at = cells.map((cell) => [Number(cell.getAttribute("x")), Number(cell.getAttribute("y"))]);
  const places = new Map(at.map((place, index) => [String(place), index]));
  const place = (now, key) => {
    if (key in STEPS) return now + STEPS[key];
    const rise = { ArrowUp: -1, ArrowDown: 1 }[key];
    if (!rise) return null;
    const [column, row] = at[Math.max(0, now)];
    return places.get(String([column, row + rise])) ?? now;
  };
  new Inspected(group, cells, (i) => cellContent(rows[at[i][1]], at[i][0]), place);
}
