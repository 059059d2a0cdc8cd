// The page map: a row a slot, drawn on a canvas, for pointer and keyboard.

import { bytes, count } from "./format.js";
import { fit, KINDS } from "./kinds.js";

const AXIS_HEIGHT = 26;
const ROW_GAP = 6;
const MOST_STRIPS = 4; // more regions than that are drawn as one
const SMALLEST_CELL = 4; // pages thinner than that are drawn as a run
const EMPTY_S = 4; // rows are kept for so long after the last page left
const RANK = ["live", "shared", "ahead", "parked", "retired"];

/** Pages a row reaches to, rounded up to 16, 24, 32, 48, 64, ... */
function niceLength(numPages) {
  let length = 16;
  while (length < numPages) length = Number.isInteger(Math.log2(length)) ? length * 1.5 : (length * 4) / 3;
  return length;
}

/** Regions one above the other; where they are many, what the first in RANK says at each page. */
function stripsOf(regions) {
  const runs = regions.map((region) => {
    let first = 0;
    return region.map(([kind, numPages]) => {
      first += numPages;
      return { kind, first: first - numPages, end: first };
    });
  });
  if (runs.length <= MOST_STRIPS) return runs;
  const edges = [...new Set(runs.flat().flatMap((run) => [run.first, run.end]))].sort((a, b) => a - b);
  const merged = [];
  for (let i = 0; i + 1 < edges.length; i += 1) {
    const kinds = runs.flat().filter((run) => run.first <= edges[i] && run.end > edges[i]);
    const kind = RANK.find((name) => kinds.some((run) => run.kind === name));
    const last = merged[merged.length - 1];
    if (last && last.kind === kind && last.end === edges[i]) last.end = edges[i + 1];
    else if (kind) merged.push({ kind, first: edges[i], end: edges[i + 1] });
  }
  return [merged];
}

export class PageMapView {
  constructor({ canvas, tooltip, cursorText, empty }) {
    Object.assign(this, { canvas, tooltip, cursorText, empty });
    this.map = null;
    this.rows = [];
    this.own = null; // id of the response that this page asked for last
    this.emptySince = null;
    this.axis = 16;
    this.selected = null; // {row, strip, run} by index
    this.isByKeyboard = false;
    this.isDismissed = false; // by Escape, until the next key
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.select(null));
    canvas.addEventListener("focus", () => {
      if (canvas.matches(":focus-visible")) this.move(0, 0);
    });
    canvas.addEventListener("blur", () => this.select(null));
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.parentElement.addEventListener("scroll", () => this.placeTooltip());
  }

  show(map, time) {
    this.map = map;
    this.forgetRows(time);
    const slots = new Map(map.slots.map((slot) => [slot.slot_idx, slot]));
    // Rows stay where they are once a slot had pages: what moves about cannot be read.
    for (const row of this.rows) {
      if (!slots.has(row.slot.slot_idx)) {
        slots.set(row.slot.slot_idx, { ...row.slot, seq_id: null, request_id: null, num_tokens: 0, runs: [] });
      }
    }
    this.rows = [...slots.values()]
      .sort((a, b) => a.slot_idx - b.slot_idx)
      .map((slot) => ({ slot, strips: stripsOf(slot.runs) }));
    const longest = Math.max(0, ...this.rows.flatMap((row) => row.strips.map((strip) => strip.at(-1)?.end ?? 0)));
    const wanted = Math.min(niceLength(longest), Math.max(16, ...map.slot_pages));
    if (wanted > this.axis || wanted * 3 <= this.axis) this.axis = wanted;
    if (!this.run) this.select(this.substitute());
  }

  /** For a keyboard's place whose pages went, or that waits for the first ones: one near it. */
  substitute() {
    if (!this.isByKeyboard || this.isDismissed || document.activeElement !== this.canvas) return null;
    const { places } = this;
    return places.filter((place) => place.row === this.selected?.row).at(-1) ?? places[0] ?? null;
  }

  get places() {
    return this.rows.flatMap((row, rowIdx) =>
      row.strips.flatMap((strip, stripIdx) => strip.map((_, runIdx) => ({ row: rowIdx, strip: stripIdx, run: runIdx }))),
    );
  }

  /** Once no slot had pages for a while, begin anew. */
  forgetRows(time) {
    if (this.map.slots.length) this.emptySince = null;
    else this.emptySince ??= time;
    if (this.emptySince !== null && time - this.emptySince > EMPTY_S) this.rows = [];
  }

  get run() {
    if (!this.selected) return null;
    return this.rows[this.selected.row]?.strips[this.selected.strip]?.[this.selected.run] ?? null;
  }

  get numStrips() {
    const numRegions = this.map?.row_bytes.length ?? 1;
    return numRegions <= MOST_STRIPS ? numRegions : 1;
  }

  layout(width) {
    const strip = this.numStrips === 1 ? 14 : 8;
    const height = this.numStrips * (strip + 1) - 1;
    const left = width < 420 ? 96 : 128;
    const right = width - 14;
    return { strip, height, pitch: height + ROW_GAP, left, right, cell: (right - left) / this.axis };
  }

  draw(painter) {
    const { canvas } = this;
    this.empty.hidden = this.rows.length > 0;
    const layout = this.layout(canvas.clientWidth);
    const wanted = AXIS_HEIGHT + this.rows.length * layout.pitch + 8;
    canvas.style.height = `${Math.max(wanted, 170)}px`;
    const { context } = fit(canvas, Math.max(wanted, 170));
    this.painter = painter;
    if (!this.rows.length) return;
    this.drawAxis(context, layout, wanted);
    this.rows.forEach((row, idx) => this.drawRow(context, layout, row, AXIS_HEIGHT + idx * layout.pitch));
    this.drawSelection(context, layout);
    this.placeTooltip();
  }

  drawAxis(context, layout, height) {
    const { colors } = this.painter;
    const tokensPerPage = this.map.page_bytes / this.map.row_bytes[0];
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    const numTicks = layout.right - layout.left < 360 ? 2 : 4;
    for (let i = 0; i <= numTicks; i += 1) {
      const page = (this.axis * i) / numTicks;
      const x = Math.round(layout.left + page * layout.cell) + 0.5;
      context.strokeStyle = colors.line;
      context.beginPath();
      context.moveTo(x, AXIS_HEIGHT - 6);
      context.lineTo(x, height - 4);
      context.stroke();
      context.fillStyle = colors.muted;
      context.textAlign = i === 0 ? "left" : i === numTicks ? "right" : "center";
      const tokens = count(page * tokensPerPage);
      context.fillText(i === numTicks ? `${tokens} tokens` : tokens, x, 11);
    }
  }

  drawRow(context, layout, { slot, strips }, y) {
    const { colors } = this.painter;
    context.textBaseline = "middle";
    context.textAlign = "right";
    context.font = "11px ui-monospace, Menlo, Consolas, monospace";
    context.fillStyle = colors.muted;
    context.fillText(String(slot.slot_idx), 30, y + layout.height / 2 + 0.5);
    context.textAlign = "left";
    const [label, style] = this.labelOf(slot);
    context.fillStyle = colors[style];
    context.font = "11.5px system-ui, sans-serif";
    context.fillText(shorten(context, label, layout.left - 48), 38, y + layout.height / 2 + 0.5);
    for (let idx = 0; idx < this.numStrips; idx += 1) {
      const top = y + idx * (layout.strip + 1);
      this.painter.paint(context, "track", layout.left, top, layout.right - layout.left, layout.strip);
      for (const run of strips[idx] ?? []) this.drawRun(context, layout, run, top);
    }
  }

  drawRun(context, layout, run, y) {
    if (layout.cell < SMALLEST_CELL) {
      const x = layout.left + run.first * layout.cell;
      const width = Math.max(1, (run.end - run.first) * layout.cell);
      this.painter.paint(context, run.kind, x, y, width, layout.strip);
      return;
    }
    for (let page = run.first; page < run.end; page += 1) {
      const x = Math.round(layout.left + page * layout.cell);
      const end = Math.round(layout.left + (page + 1) * layout.cell);
      this.painter.paint(context, run.kind, x, y, end - x - 1, layout.strip);
    }
  }

  drawSelection(context, layout) {
    const { run } = this;
    if (!run) return;
    const [x, y] = this.cornerOf(layout);
    context.strokeStyle = this.painter.colors.ink;
    context.lineWidth = 2;
    context.strokeRect(x - 1.5, y - 1.5, (run.end - run.first) * layout.cell + 2, layout.strip + 3);
  }

  cornerOf(layout) {
    const y = AXIS_HEIGHT + this.selected.row * layout.pitch + this.selected.strip * (layout.strip + 1);
    return [layout.left + this.run.first * layout.cell, y];
  }

  labelOf(slot) {
    if (slot.is_padding) return ["padding", "muted"];
    if (slot.seq_id === null) return ["free", "muted"];
    if (slot.request_id === null) return [`sequence ${slot.seq_id}`, "ink"];
    if (this.own && slot.request_id.startsWith(this.own)) return ["yours", "accent"];
    return [slot.request_id.replace(/^(chat)?cmpl-|^resp_/, ""), "ink"];
  }

  /** What is under the pointer. */
  point(event) {
    if (!this.rows.length) return;
    const layout = this.layout(this.canvas.clientWidth);
    const row = Math.floor((event.offsetY - AXIS_HEIGHT) / layout.pitch);
    const within = event.offsetY - AXIS_HEIGHT - row * layout.pitch;
    const strip = Math.min(this.numStrips - 1, Math.max(0, Math.floor(within / (layout.strip + 1))));
    const page = (event.offsetX - layout.left) / layout.cell;
    const runs = this.rows[row]?.strips[strip] ?? [];
    const run = runs.findIndex((entry) => entry.first <= page && page < entry.end);
    this.isByKeyboard = false;
    this.select(run < 0 ? null : { row, strip, run });
  }

  key(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape") {
      this.isDismissed = true;
      return this.select(null);
    }
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return undefined;
    event.preventDefault();
    return this.move(...moves[event.key]);
  }

  /** Go so many rows and runs on; rows without pages are passed over. */
  move(rows, runs) {
    this.isByKeyboard = true;
    this.isDismissed = false;
    const { places } = this;
    if (!places.length) return;
    const at = this.selected;
    if (!at) return this.select(places[0]);
    let next = null;
    if (rows > 0) next = places.find((place) => place.row > at.row);
    if (rows < 0) {
      const row = places.filter((place) => place.row < at.row).at(-1)?.row;
      next = places.find((place) => place.row === row);
    }
    if (runs) {
      const own = places.filter((place) => place.row === at.row);
      next = own[own.findIndex((place) => place.strip === at.strip && place.run === at.run) + runs];
    }
    this.select(next ?? at);
  }

  select(place) {
    if (!place && !this.selected) return;
    this.selected = place;
    if (this.painter) this.draw(this.painter);
    if (place && this.isByKeyboard) this.cursorText.textContent = this.describe();
  }

  describe() {
    const { slot } = this.rows[this.selected.row];
    const { run } = this;
    const region = this.numStrips === 1 ? 0 : this.selected.strip;
    const pages = run.end - run.first === 1 ? `Page ${run.first}` : `Pages ${run.first} to ${run.end - 1}`;
    const numRegions = this.map.row_bytes.length;
    const where = numRegions === 1 ? "" : this.numStrips === 1 ? ` in each of ${numRegions} regions` : ` of region ${region}`;
    const label = this.labelOf(slot)[0].replace(/^yours$/, "your request");
    const tokens = slot.seq_id === null ? "" : ` · ${count(slot.num_tokens)} tokens`;
    const { name, meaning } = KINDS[run.kind];
    return (
      `Slot ${slot.slot_idx} · ${label}${tokens}\n` +
      `${pages}${where} · ${bytes((run.end - run.first) * this.map.page_bytes)}\n${name}: ${meaning}`
    );
  }

  placeTooltip() {
    const { tooltip, canvas, run } = this;
    tooltip.hidden = !run;
    if (!run) return;
    tooltip.textContent = this.describe();
    const layout = this.layout(canvas.clientWidth);
    const [x, y] = this.cornerOf(layout);
    const left = Math.max(8, Math.min(x, canvas.clientWidth - tooltip.offsetWidth - 8));
    const frame = canvas.parentElement;
    if (this.isByKeyboard) frame.scrollTop = Math.min(frame.scrollTop, Math.max(0, y - AXIS_HEIGHT));
    const below = y + layout.strip + 8;
    const hasRoom = below + tooltip.offsetHeight < frame.scrollTop + frame.clientHeight;
    tooltip.style.left = `${left}px`;
    tooltip.style.top = `${hasRoom ? below : Math.max(frame.scrollTop + 2, y - tooltip.offsetHeight - 8)}px`;
  }
}

function shorten(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let length = text.length;
  while (length > 1 && context.measureText(`${text.slice(0, length)}…`).width > width) length -= 1;
  return `${text.slice(0, length)}…`;
}
