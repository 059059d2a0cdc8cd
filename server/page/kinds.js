// What a page can be, and how it is drawn: every kind differs in colour, lightness and texture.

export const KINDS = {
  live: { name: "Live", meaning: "holds a sequence's tokens" },
  shared: { name: "Shared", meaning: "several sequences have it" },
  ahead: { name: "Ahead", meaning: "mapped before it is needed" },
  parked: { name: "Parked", meaning: "still mapped in a free slot, warm for the next sequence" },
  cached: { name: "Cached", meaning: "only the prefix cache has it, in no slot" },
  retired: { name: "Retired", meaning: "waits for kernels that may still read it" },
};

/** Size a canvas to its box in device pixels; its context, in CSS pixels. */
export function fit(canvas, height = canvas.clientHeight) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const pixels = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== pixels[0] || canvas.height !== pixels[1]) {
    [canvas.width, canvas.height] = pixels;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

let probe = null;

/** A colour token as the theme resolves it now. */
export function color(name) {
  if (!probe) {
    probe = document.createElement("i");
    probe.hidden = true;
    document.body.append(probe);
  }
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

/** Draws runs of pages in the colours of the moment; make a new one when the theme changes. */
export class Painter {
  constructor() {
    const names = ["live", "shared", "shared-ink", "ahead", "ahead-wash", "parked", "parked-ink"];
    names.push("retired", "cached", "cached-ink", "track", "ink", "muted", "line", "surface", "accent");
    this.colors = Object.fromEntries(names.map((name) => [name, color(name)]));
    this.scale = window.devicePixelRatio || 1;
    this.patterns = new Map();
  }

  /** One page, or a run of them where they are too many to tell apart. */
  paint(context, kind, x, y, width, height) {
    const { colors } = this;
    if (kind === "ahead" || kind === "retired") {
      context.fillStyle = kind === "ahead" ? colors["ahead-wash"] : this.pattern("retired");
      context.fillRect(x, y, width, height);
      context.strokeStyle = colors[kind];
      context.lineWidth = 1;
      if (width > 2) context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
      return;
    }
    context.fillStyle = colors[kind];
    context.fillRect(x, y, width, height);
    if (kind === "live" || kind === "track") return;
    context.fillStyle = this.pattern(kind);
    context.fillRect(x, y, width, height);
  }

  /** The texture of a kind, in device pixels so that it stays crisp. */
  pattern(kind) {
    if (!this.patterns.has(kind)) {
      const size = Math.round(6 * this.scale);
      const tile = new OffscreenCanvas(size, size);
      const context = tile.getContext("2d");
      context.scale(size / 6, size / 6);
      this[`${kind}Tile`](context);
      const pattern = context.createPattern(tile, "repeat");
      pattern.setTransform(new DOMMatrix().scale(1 / this.scale));
      this.patterns.set(kind, pattern);
    }
    return this.patterns.get(kind);
  }

  sharedTile(context) {
    this.diagonals(context, this.colors["shared-ink"], [-3, 3, 9]);
  }

  retiredTile(context) {
    this.diagonals(context, this.colors.retired, [0, 6]);
  }

  diagonals(context, style, starts) {
    context.strokeStyle = style;
    context.lineWidth = 1.4;
    context.beginPath();
    for (const start of starts) {
      context.moveTo(start - 3, 9);
      context.lineTo(start + 9, -3);
    }
    context.stroke();
  }

  parkedTile(context) {
    context.fillStyle = this.colors["parked-ink"];
    context.fillRect(1, 1, 1.6, 1.6);
    context.fillRect(4, 4, 1.6, 1.6);
  }

  cachedTile(context) {
    context.fillStyle = this.colors["cached-ink"];
    context.fillRect(0, 1, 6, 1);
    context.fillRect(0, 4, 6, 1);
  }
}
