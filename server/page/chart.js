// A small area chart of the last two minutes.

import { fit } from "./kinds.js";

const WINDOW_S = 120;

function niceTop(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((top) => top >= value);
}

export class Chart {
  constructor(canvas) {
    this.canvas = canvas;
    this.points = []; // [seconds, value]
  }

  push(time, value) {
    if (this.points.length && time < this.points.at(-1)[0]) this.points = []; // the server began anew
    this.points.push([time, value]);
    while (this.points.length > 2 && this.points[1][0] < time - WINDOW_S) this.points.shift();
  }

  draw(painter, color) {
    const { context, width, height } = fit(this.canvas);
    const { colors } = painter;
    context.strokeStyle = colors.line;
    context.beginPath();
    context.moveTo(0, height - 0.5);
    context.lineTo(width, height - 0.5);
    context.stroke();
    if (this.points.length < 2) return;
    const end = this.points.at(-1)[0];
    const top = niceTop(Math.max(...this.points.map(([, value]) => value)));
    const place = ([time, value]) => [
      width - ((end - time) / WINDOW_S) * width,
      height - 1 - (value / top) * (height - 14),
    ];
    const line = new Path2D();
    this.points.map(place).forEach(([x, y], idx) => (idx ? line.lineTo(x, y) : line.moveTo(x, y)));
    const area = new Path2D(line);
    area.lineTo(width, height - 1);
    area.lineTo(place(this.points[0])[0], height - 1);
    context.fillStyle = color;
    context.globalAlpha = 0.16;
    context.fill(area);
    context.globalAlpha = 1;
    context.strokeStyle = color;
    context.lineWidth = 1.5;
    context.stroke(line);
    context.fillStyle = colors.muted;
    context.font = "10.5px system-ui, sans-serif";
    context.textBaseline = "top";
    context.fillText(String(top), 0, 0);
  }
}
