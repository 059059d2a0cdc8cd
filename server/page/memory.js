// The memory panel: capacity, legend, page map, rates and figures, drawn once a frame.

import { Chart } from "./chart.js";
import { bytes, count, percent, rate } from "./format.js";
import { fit, KINDS, Painter } from "./kinds.js";
import { PageMapView } from "./page_map.js";

const find = (id) => document.getElementById(id);

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

/** Pages of a kind, each once for every slot that has it. */
function placesOf(map, kind) {
  let places = 0;
  for (const slot of map.slots) {
    for (const region of slot.runs) {
      for (const [name, numPages] of region) places += name === kind ? numPages : 0;
    }
  }
  return places;
}

/** Bytes by kind, each physical page once; `shared` by the first place of each such page. */
function bytesByKind(map, totals) {
  const shared = (placesOf(map, "shared") - map.shared_refs) * map.page_bytes;
  return {
    live: Math.max(0, totals.committed_bytes - shared),
    shared,
    ahead: totals.ahead_bytes,
    parked: totals.parked_bytes,
    cached: totals.cached_bytes,
    retired: totals.retired_pages * map.page_bytes,
  };
}

/** The frame with the map and the figures of one rank; of all for null, or a rank that is not there. */
function ofRank(frame, rank) {
  const chosen = frame.ranks.find((one) => one.rank === rank);
  return chosen ? { ...frame, map: chosen.map, totals: { ...frame.totals, ...chosen.totals } } : frame;
}

export class Memory {
  constructor() {
    this.whole = null; // the newest frame, of all ranks
    this.frame = null; // what is shown of it
    this.rank = null; // the rank that is shown; null: all
    this.numRanks = 0;
    this.painter = null;
    this.isPending = false;
    this.view = new PageMapView({
      canvas: find("map"),
      tooltip: find("tooltip"),
      cursorText: find("map-cursor"),
      empty: find("map-empty"),
    });
    this.tokens = new Chart(find("chart-tokens"));
    this.pages = new Chart(find("chart-pages"));
    this.legend = this.makeLegend();
    this.figures = new Map();
    new ResizeObserver(() => this.redraw()).observe(find("map").parentElement);
    this.watchScale();
  }

  /** Draw again when the window moves to a screen of other resolution. */
  watchScale() {
    const query = matchMedia(`(resolution: ${window.devicePixelRatio}dppx)`);
    query.addEventListener("change", () => (this.redraw(), this.watchScale()), { once: true });
  }

  show(frame) {
    this.whole = frame;
    this.tokens.push(frame.time, frame.totals.tokens_per_s);
    this.pages.push(frame.time, frame.totals.pages_mapped_per_s);
    if (frame.ranks.length !== this.numRanks) this.makeRanks(frame.ranks);
    this.showRank();
  }

  /** What is chosen of the newest frame. */
  showRank() {
    this.frame = ofRank(this.whole, this.rank);
    this.view.show(this.frame.map, this.frame.time);
    this.showText(this.frame);
    this.showRanks();
    this.schedule();
  }

  /** A choice of all ranks or one, where there are several, and a row for each. */
  makeRanks(ranks) {
    this.numRanks = ranks.length;
    this.rank = null;
    const chooser = find("ranks");
    chooser.hidden = find("rank-figures").hidden = ranks.length === 0;
    chooser.replaceChildren(element("legend", "Ranks", "hidden"));
    for (const rank of [null, ...ranks.map((one) => one.rank)]) {
      const label = element("label");
      const input = element("input");
      Object.assign(input, { type: "radio", name: "rank", checked: rank === null });
      input.addEventListener("change", () => ((this.rank = rank), this.showRank()));
      label.append(input, element("span", rank === null ? `All ${ranks.length} ranks` : `Rank ${rank}`));
      chooser.append(label);
    }
  }

  showRanks() {
    const rows = this.whole.ranks.map(({ rank, map, totals, peak_rss_bytes }) => {
      const row = element("tr");
      row.append(
        element("th", `Rank ${rank}`),
        ...[
          bytes(totals.in_use_pages * map.page_bytes),
          bytes(totals.created_pages * map.page_bytes),
          bytes(totals.ahead_bytes),
          bytes(totals.parked_bytes),
          count(totals.critical_pages),
          `${rate(totals.stall_us / 1000)} ms`,
          bytes(peak_rss_bytes),
        ].map((text) => element("td", text)),
      );
      row.firstChild.scope = "row";
      return row;
    });
    find("rank-figures").tBodies[0].replaceChildren(...rows);
  }

  /** The response whose rows are to stand out. */
  setOwn(id) {
    this.view.own = id;
  }

  /** Colours or sizes changed. */
  redraw() {
    this.painter = null;
    this.schedule();
  }

  schedule() {
    if (this.isPending) return;
    this.isPending = true;
    requestAnimationFrame(() => {
      this.isPending = false;
      this.draw();
    });
  }

  draw() {
    this.painter ??= new Painter();
    this.view.draw(this.painter);
    this.tokens.draw(this.painter, this.painter.colors.live);
    this.pages.draw(this.painter, this.painter.colors.cached);
    for (const [kind, { swatch }] of this.legend) {
      const { context, width, height } = fit(swatch);
      this.painter.paint(context, kind, 0, 0, width, height);
    }
    if (this.frame) this.drawCapacity();
  }

  drawCapacity() {
    const { map, totals } = this.frame;
    const canvas = find("capacity-bar");
    const { context, width, height } = fit(canvas);
    context.save();
    context.beginPath();
    context.roundRect(0, 0, width, height, 5);
    context.clip();
    this.painter.paint(context, "track", 0, 0, width, height);
    const parts = Object.entries(bytesByKind(map, totals));
    const whole = Math.max(totals.capacity_bytes, parts.reduce((sum, [, size]) => sum + size, 0));
    let x = 0;
    for (const [kind, size] of parts) {
      if (size === 0) continue;
      const end = x + Math.max(2, (size / whole) * width);
      this.painter.paint(context, kind, Math.round(x), 0, Math.round(end) - Math.round(x), height);
      x = end;
    }
    context.restore();
    const words = parts.filter(([, size]) => size).map(([kind, size]) => `${KINDS[kind].name} ${bytes(size)}`);
    canvas.setAttribute("aria-label", `Physical memory by use: ${words.join(", ") || "none"}`);
  }

  makeLegend() {
    const list = find("legend");
    const entries = new Map();
    for (const [kind, { name, meaning }] of Object.entries(KINDS)) {
      const item = element("li");
      item.title = `${name}: ${meaning}`;
      const swatch = element("canvas");
      const size = element("span", "–");
      swatch.setAttribute("aria-hidden", "true");
      item.append(swatch, element("b", name), size, element("span", meaning, "hidden"));
      list.append(item);
      entries.set(kind, { swatch, size });
    }
    return entries;
  }

  showText({ map, totals }) {
    const byKind = bytesByKind(map, totals);
    const inUse = Object.values(byKind).reduce((sum, size) => sum + size, 0);
    find("in-use").textContent = bytes(inUse);
    find("capacity").textContent = bytes(totals.capacity_bytes);
    find("reserved").textContent = bytes(totals.reserved_bytes);
    find("memory-note").textContent =
      (map.is_asleep ? "Asleep: memory given back · " : "") +
      (map.backend === "paged" ? `Blocks of ${bytes(map.page_bytes)}` : `Pages of ${bytes(map.page_bytes)}`) +
      (this.numRanks && this.rank === null ? ` on ${this.numRanks} ranks` : "");
    for (const [kind, { size }] of this.legend) size.textContent = bytes(byKind[kind]);
    find("tokens-per-s").textContent = rate(totals.tokens_per_s);
    find("pages-per-s").textContent = rate(totals.pages_mapped_per_s);
    this.showFigure("Running", count(totals.running_seqs), "Sequences that have memory and compute");
    this.showFigure("Waiting", count(totals.waiting), "Requests that wait for room");
    this.showFigure("Live bytes", bytes(totals.live_bytes), "K and V of tokens that exist");
    this.showFigure("Committed", bytes(totals.committed_bytes), "Pages that hold them");
    this.showFigure("Saved by sharing", bytes(totals.shared_bytes), "What further references to shared pages would take");
    this.showFigure("Swapped out", bytes(totals.swapped_bytes), "In host memory");
    this.showFigure("Prefix hits", percent(totals.prefix_hit_tokens, totals.prefix_queried_tokens), "Prompt tokens found in the cache");
    this.showFigure("Preemptions", count(totals.preemptions), "Requests that had to make room so far");
  }

  showFigure(name, value, meaning) {
    if (!this.figures.has(name)) {
      const group = element("div");
      const figure = element("dd");
      group.title = meaning;
      group.append(element("dt", name), figure);
      find("figures").append(group);
      this.figures.set(name, figure);
    }
    this.figures.get(name).textContent = value;
  }
}
