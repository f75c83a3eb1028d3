"use strict";

const settings = document.body.dataset;
const mostBytes = Number(settings.mostBytes);
const isPointed = settings.pointed === "yes";
const SVG = "http://www.w3.org/2000/svg";
const STATUSES = {
  chosen: "chosen",
  relaxed: "chosen within relaxed limits",
  box: "from a box around the image",
  identity: "no region found: the whole image",
  edited: "edited",
};
const STEP = 0.01; // of the keyboard's cross, as a share of the image's sides; five times with Shift

const all = document.getElementById("images");
const announcer = document.getElementById("status");
const input = document.getElementById("files");
const drop = document.getElementById("drop");
const forget = document.getElementById("forget");
let queue = Promise.resolve(); // sends images one after another
let count = 0;

const percent = (share) => (100 * share).toFixed(1) + "\u00a0%";

function say(text) { announcer.textContent = text; }

/** Send a request and return its JSON. Throws errors as {fault, fix}. */
async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw { fault: "The server does not answer.", fix: "Check that medfocus app is running, and start it again if needed." };
  }
  if (answer.status === 204) return null;
  const content = await answer.json().catch(() => null);
  if (!answer.ok && !(content && content.images)) {
    throw (content && content.error) || { fault: `The server responded with status ${answer.status}.`, fix: "Try again." };
  }
  return content;
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1).replace(/\.?$/, ".");

/** Return an error as a sentence, without the file's name, which the card shows. */
function fault(error, name) {
  if (!error.place || error.fault.startsWith("the ")) return sentence(error.fault);
  return sentence(`${error.place === name ? "this file" : error.place} ${error.fault}`);
}

/** One image: its card, its prediction and its points. */
class Card {
  constructor(file) {
    this.file = file;
    this.points = [];
    this.edits = 0; // number of mask edits
    this.cross = { x: 0.5, y: 0.5 };
    this.ways = {};
    this.root = document.getElementById("card").content.firstElementChild.cloneNode(true);
    const name = `card-${++count}`;
    this.find("h3").textContent = file.name;
    this.find("h3").id = name;
    this.root.setAttribute("aria-labelledby", name);
    this.find(".remove").setAttribute("aria-label", `Remove ${file.name}`);
    for (const radio of this.root.querySelectorAll(".kind input")) radio.name = `${name}-kind`;
    this.find(".remove").addEventListener("click", () => this.remove());
    all.append(this.root);
    forget.hidden = false;
    drop.classList.remove("empty");
  }

  find(selector) { return this.root.querySelector(selector); }

  fail(error) {
    this.find(".waiting").hidden = true;
    this.find(".error").hidden = false;
    this.find(".fault").textContent = fault(error, this.file.name);
    this.find(".fix").textContent = error.fix || "";
  }

  async send() {
    if (this.gone) return;
    if (this.file.size > mostBytes) {
      const most = Math.floor(mostBytes / 1e6);
      this.fail({ fault: `The file is larger than ${most} MB, the limit.`, fix: "Export a smaller image." });
      return;
    }
    try {
      await this.file.slice(0, 1).arrayBuffer();
    } catch {
      this.fail({ fault: "The browser cannot read this file.", fix: "Choose files, not a folder." });
      return;
    }
    this.find(".doing").textContent = "Reading";
    const form = new FormData();
    form.append("images", this.file, this.file.name);
    try {
      const [answer] = (await ask("/images", { method: "POST", body: form })).images;
      if (answer.error) throw answer.error;
      this.open(answer);
    } catch (error) {
      this.fail(error);
      say(`${this.file.name}: not read.`);
    }
    this.file = { name: this.file.name }; // let the browser free the bytes
  }

  open(answer) {
    if (this.gone) { ask(`/images/${answer.id}`, { method: "DELETE" }).catch(() => {}); return; }
    this.id = answer.id;
    this.first = answer.first;
    this.edited = null;
    this.find(".size").textContent = `${answer.width} × ${answer.height}`;
    const image = this.find(".image");
    const [width, height] = answer.shown.size;
    image.src = answer.shown.image;
    image.alt = `${this.file.name}, the uploaded image`;
    this.frame = this.find(".frame");
    this.frame.style.aspectRatio = `${width} / ${height}`;
    this.frame.style.maxWidth = `${Math.round(72 * width / height)}vh`;
    this.mask = this.find(".layer.mask");
    this.heat = this.find(".layer.attribution");
    this.slide(".mask-opacity", this.mask);
    this.slide(".attribution-opacity", this.heat);
    this.find(".tools").hidden = !isPointed;
    if (isPointed) this.startEditing(); else this.sayOff();
    this.show();
    this.find(".waiting").hidden = true;
    this.find(".result").hidden = false;
    say(`${this.file.name}: ${this.first.label}, ${percent(this.first.probabilities[this.first.label])}.`);
  }

  sayOff() {
    this.frame.removeAttribute("role");
    this.frame.removeAttribute("tabindex");
    this.find(".off").hidden = false;
    this.find(".off").textContent =
      `Points cannot edit this mask: it comes from ${settings.segmenter}, and points need SAM2.`;
  }

  slide(selector, layer) {
    const slider = this.find(selector);
    const set = () => {
      layer.style.opacity = slider.value / 100;
      slider.nextElementSibling.textContent = `${slider.value} %`;
      if (layer === this.heat && Number(slider.value) > 0) this.attribute();
    };
    slider.addEventListener("input", set);
    set();
  }

  get version() { return this.edited ? "edited" : "first"; }

  get now() { return this.edited || this.first; }

  /** Update everything that depends on the mask. */
  show() {
    this.mask.src = this.now.layers.mask;
    this.root.classList.toggle("edited", Boolean(this.edited));
    this.mask.alt = `Mask, ${percent(this.now.mask.coverage)} of the image`;
    this.showAnswer();
    this.showProbabilities();
    this.showMask();
    this.showViews();
    this.heat.hidden = true;
    this.find(".way").textContent = "";
    this.attributed = null;
    if (Number(this.find(".attribution-opacity").value) > 0) this.attribute();
  }

  showAnswer() {
    const { label, probabilities, set } = this.now;
    this.find(".label").textContent = label;
    this.find(".chance").textContent = percent(probabilities[label]);
    this.find(".set").hidden = !set.length;
    this.find(".set").textContent = set.length > 1 ? `Not sure: ${set.join(" or ")}` : `Set: ${set.join()}`;
    const change = this.find(".change");
    change.hidden = !this.edited;
    if (!this.edited) return;
    const before = this.first.probabilities[this.first.label];
    change.textContent = this.first.label === label
      ? `With the edited mask. Before: ${percent(before)}, the same class.`
      : `With the edited mask. Before: ${this.first.label}, ${percent(before)}.`;
  }

  showProbabilities() {
    for (const head of [".after-head", ".delta-head"]) this.find(head).hidden = !this.edited;
    this.find(".before-head").textContent = this.edited ? "first" : "probability";
    const rows = Object.entries(this.first.probabilities).map(([name, before]) => this.row(name, before));
    this.find(".chances tbody").replaceChildren(...rows);
  }

  row(name, before) {
    const row = document.createElement("tr");
    row.dataset.name = name;
    row.classList.toggle("top", name === this.now.label);
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    const cell = (text, kind) => {
      const data = document.createElement("td");
      data.className = `number ${kind}`;
      data.textContent = text;
      return data;
    };
    const bars = document.createElement("td");
    bars.className = "bars";
    row.append(head, bars, cell(percent(before), this.edited ? "before" : "before now"));
    if (!this.edited) {
      bars.append(drawBars([["now", before]]));
      return row;
    }
    const after = this.edited.probabilities[name];
    bars.append(drawBars([["first", before], ["now", after]]));
    const points = 100 * (after - before);
    const sign = points > 0.05 ? "+" : points < -0.05 ? "−" : "±";
    row.append(cell(percent(after), "after now"), cell(sign + Math.abs(points).toFixed(1), "delta"));
    return row;
  }

  showMask() {
    const { status, score, coverage } = this.now.mask;
    const facts = [["Mask", STATUSES[status]], ["Score", score.toFixed(2)], ["Covers", percent(coverage)]];
    if (this.edited) facts.push(["Before", `${STATUSES[this.first.mask.status]}, ${percent(this.first.mask.coverage)}`]);
    this.find(".mask-facts").replaceChildren(...facts.map(([name, value]) => {
      const pair = document.createElement("div");
      const term = document.createElement("dt");
      const description = document.createElement("dd");
      term.textContent = name;
      description.textContent = value;
      pair.append(term, description);
      return pair;
    }));
  }

  showViews() {
    const [before, after] = [this.find("figure.before img"), this.find("figure.after img")];
    before.src = this.first.layers.view;
    before.alt = `Input of CLIP for ${this.file.name}: the focus ${settings.focus} with the first mask`;
    this.find("figure.after").hidden = !this.edited;
    this.find("figure.before figcaption").textContent = this.edited ? "Input of CLIP: first mask" : "Input of CLIP";
    if (!this.edited) return;
    after.src = this.edited.layers.view;
    after.alt = `Input of CLIP for ${this.file.name} with the edited mask`;
  }

  async attribute() {
    const key = this.edits;
    if (this.attributed === key) return;
    this.attributed = key;
    const label = this.now.label;
    this.find(".way").textContent = "Computing the attribution …";
    try {
      const { way, inside, layer } = await ask(`/images/${this.id}/${this.version}/attribution`);
      if (this.attributed !== key) return;
      this.heat.src = layer;
      this.heat.alt = `Attribution of ${label} by ${way}`;
      this.heat.hidden = false;
      const share = inside === null ? "" : ` ${percent(inside)} of it lies inside the mask.`;
      this.find(".way").textContent = `Attribution of ${label}: ${way}.${share}`;
    } catch (error) {
      if (this.attributed === key) this.find(".way").textContent = `${fault(error, this.file.name)} ${error.fix}`;
    }
  }

  startEditing() {
    const frame = this.frame;
    frame.classList.add("editable");
    frame.setAttribute("aria-label", "The image with its mask. Arrow keys move a cross, Enter sets a point inside, " +
      "Shift and Enter a point outside, Backspace removes the last point.");
    const place = (event) => {
      const box = frame.getBoundingClientRect();
      const share = (value, from, size) => Math.min(1, Math.max(0, (value - from) / size));
      return { x: share(event.clientX, box.left, box.width), y: share(event.clientY, box.top, box.height) };
    };
    frame.addEventListener("click", (event) => this.add({ ...place(event), inside: this.isInside(event) }));
    frame.addEventListener("contextmenu", (event) => {
      event.preventDefault();
      this.add({ ...place(event), inside: false });
    });
    frame.addEventListener("keydown", (event) => this.key(event));
    frame.addEventListener("focus", () => { if (frame.matches(":focus-visible")) this.moveCross(0, 0); });
    frame.addEventListener("blur", () => { this.find(".cursor").hidden = true; });
    this.find(".undo").addEventListener("click", () => { this.points.pop(); this.edit(); });
    this.find(".clear").addEventListener("click", () => { this.points = []; this.edit(); });
  }

  isInside(event) { return !event.shiftKey && this.find(".kind input:checked").value === "inside"; }

  key(event) {
    const step = STEP * (event.shiftKey ? 5 : 1);
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) this.moveCross(...moves[event.key]);
    else if (event.key === "Enter") this.add({ ...this.cross, inside: this.isInside(event) });
    else if (event.key === "Backspace" && this.points.length) { this.points.pop(); this.edit(); }
    else return;
    event.preventDefault();
  }

  moveCross(x, y) {
    const bound = (value) => Math.min(1, Math.max(0, value));
    this.cross = { x: bound(this.cross.x + x), y: bound(this.cross.y + y) };
    const cursor = this.find(".cursor");
    cursor.hidden = false;
    cursor.style.left = `${100 * this.cross.x}%`;
    cursor.style.top = `${100 * this.cross.y}%`;
  }

  add(point) {
    this.points.push(point);
    this.edit();
  }

  /** Request the mask for all points; points set in the meantime go into one further request. */
  async edit() {
    this.mark();
    this.isStale = true;
    if (this.isEditing) return;
    this.isEditing = true;
    this.find(".working").hidden = false;
    while (this.isStale && !this.gone) {
      this.isStale = false;
      await this.requestMask();
    }
    this.find(".working").hidden = true;
    this.isEditing = false;
  }

  async requestMask() {
    const points = [...this.points];
    this.find(".error").hidden = true;
    try {
      const answer = await ask(`/images/${this.id}/points`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ points }),
      });
      this.edits += 1;
      this.edited = answer.edited;
      this.show();
      this.report(points.length - answer.followed, points.length);
    } catch (error) {
      this.fail(error);
    }
  }

  report(missed, count) {
    if (!this.edited) { say("The first mask is back."); return; }
    const warning = missed ? ` The mask does not follow ${missed} of ${count} points.` : "";
    this.find(".change").textContent += warning;
    say(`Edited: ${this.edited.label}, ${percent(this.edited.probabilities[this.edited.label])}.${warning}`);
  }

  mark() {
    for (const mark of this.root.querySelectorAll(".mark")) mark.remove();
    for (const point of this.points) {
      const mark = document.createElement("span");
      mark.className = `mark ${point.inside ? "in" : "out"}`;
      mark.style.left = `${100 * point.x}%`;
      mark.style.top = `${100 * point.y}%`;
      this.frame.append(mark);
    }
    for (const name of [".undo", ".clear"]) this.find(name).disabled = !this.points.length;
  }

  remove() {
    this.gone = true;
    if (this.id) ask(`/images/${this.id}`, { method: "DELETE" }).catch(() => {});
    const next = this.root.nextElementSibling || this.root.previousElementSibling;
    this.root.remove();
    (next ? next.querySelector(".remove") : input).focus();
    cards.delete(this);
    forget.hidden = !cards.size;
    drop.classList.toggle("empty", !cards.size);
  }
}

/** Draw bars on a width of 100, one above another. */
function drawBars(bars) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 16");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const height = bars.length === 1 ? 10 : 6;
  bars.forEach(([kind, share], i) => {
    const top = bars.length === 1 ? 3 : 1 + 8 * i;
    for (const [name, width] of [["ground", 100], [kind, 100 * share]]) {
      const bar = document.createElementNS(SVG, "rect");
      bar.setAttribute("class", name);
      bar.setAttribute("y", top);
      bar.setAttribute("height", height);
      bar.setAttribute("width", width);
      svg.append(bar);
    }
  });
  return svg;
}

const cards = new Set();

function take(files) {
  for (const file of files) {
    const card = new Card(file);
    cards.add(card);
    queue = queue.then(() => card.send());
  }
}

input.addEventListener("change", () => { take(input.files); input.value = ""; });
forget.addEventListener("click", () => { for (const card of [...cards]) card.remove(); });
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files);
  });
}
