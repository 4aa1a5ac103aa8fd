// The picture that is edited, and what is drawn on it, by mouse, finger or keys.

const MASK = [255, 0, 170];
const MOST_UNDO = 50;

export class Easel {
  /** `tellPlace(text)` is told where the keys are, for screen readers. */
  constructor(canvas, brush, { width, height, channels }, tellPlace) {
    Object.assign(this, { canvas, brush, width, height, channels, tellPlace });
    this.pixels = new Uint8Array(width * height * channels).fill(255);
    this.mask = new Uint8Array(width * height);
    this.draws = "mask";
    this.size = Math.max(1, Math.round(width / 8));
    this.colour = [224, 48, 48];
    this.erases = false;
    this.place = [width >> 1, height >> 1];
    this.before = [];
    this.original = this.pixels;
    this.version = 0;
    this.edges = new Path2D();
    this.changed = () => {};
    canvas.width = width;
    canvas.height = height;
    brush.width = brush.height = 0;
    this.listen();
    this.show();
  }

  /** Take another picture, bytes row by row; one that was only spoiled keeps what is drawn. */
  load(pixels, isSpoiled = false) {
    this.remember();
    this.pixels = pixels;
    this.original = pixels.slice();
    if (!isSpoiled) this.mask = new Uint8Array(this.mask.length);
    this.version += 1;
    this.show();
    this.changed();
  }

  listen() {
    let last = null;
    let pointer = null; // the one that draws: other fingers do not
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button || !this.draws || pointer !== null) return;
      pointer = event.pointerId;
      event.preventDefault();
      canvas.focus();
      canvas.setPointerCapture(event.pointerId);
      this.remember();
      last = this.at(event);
      this.line(last, last);
    });
    canvas.addEventListener("pointermove", (event) => {
      this.outline(this.at(event));
      if (!last || event.pointerId !== pointer) return;
      for (const part of event.getCoalescedEvents?.() ?? [event]) {
        const next = this.at(part);
        this.line(last, next);
        last = next;
      }
    });
    const end = (event) => {
      if (event.pointerId !== pointer) return;
      if (last) this.changed();
      last = pointer = null;
    };
    canvas.addEventListener("pointerup", end);
    canvas.addEventListener("pointercancel", end);
    canvas.addEventListener("pointerleave", () => this.outline(null));
    canvas.addEventListener("blur", () => this.outline(null));
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (move) {
      const [x, y] = this.place;
      this.place = [
        Math.min(this.width - 1, Math.max(0, x + move[0])),
        Math.min(this.height - 1, Math.max(0, y + move[1])),
      ];
    } else if (event.key === " " && this.draws) {
      if (!event.repeat) this.remember();
      const middle = this.place.map((n) => n + 0.5);
      this.line(middle, middle);
      this.changed();
    } else if ((event.ctrlKey || event.metaKey) && event.key === "z") {
      this.undo();
    } else if (event.ctrlKey || event.metaKey || event.altKey) {
      return;
    } else if (event.key === "e" || event.key === "E") {
      this.erases = !this.erases;
    } else if (event.key === "[" || event.key === "]") {
      this.size = Math.max(1, this.size + (event.key === "[" ? -1 : 1));
    } else {
      return;
    }
    event.preventDefault();
    this.outline(this.place.map((n) => n + 0.5));
    const [x, y] = this.place;
    const isDrawn = this.draws === "mask" && this.mask[y * this.width + x];
    const how = this.erases ? ", the brush erases" : "";
    this.tellPlace(`Row ${y + 1}, column ${x + 1}${isDrawn ? ", painted" : ""}${how}`);
    this.onKeys?.();
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.width,
      ((event.clientY - box.top) / box.height) * this.height,
    ];
  }

  /** Draw with the brush from one place to another. */
  line([x0, y0], [x1, y1]) {
    const steps = Math.max(1, Math.ceil(2 * Math.hypot(x1 - x0, y1 - y0)));
    for (let step = 0; step <= steps; step++) {
      const way = step / steps;
      this.dab(x0 + (x1 - x0) * way, y0 + (y1 - y0) * way);
    }
    this.show();
  }

  dab(x, y) {
    const reach = this.size / 2;
    const [column, row] = [Math.floor(x), Math.floor(y)];
    for (let j = Math.floor(y - reach); j <= y + reach; j++) {
      for (let i = Math.floor(x - reach); i <= x + reach; i++) {
        if (i < 0 || j < 0 || i >= this.width || j >= this.height) continue;
        const isInside = Math.hypot(i + 0.5 - x, j + 0.5 - y) <= reach;
        if (isInside || (i === column && j === row)) this.set(j * this.width + i);
      }
    }
  }

  set(pixel) {
    if (this.draws === "mask") {
      this.mask[pixel] = this.erases ? 0 : 255;
      return;
    }
    const start = pixel * this.channels;
    const [r, g, b] = this.colour;
    const paint = this.channels === 3 ? this.colour : [0.299 * r + 0.587 * g + 0.114 * b];
    const source = this.erases ? this.original.subarray(start, start + this.channels) : paint;
    this.pixels.set(source, start);
  }

  remember() {
    this.before.push([this.pixels.slice(), this.mask.slice(), this.original]);
    if (this.before.length > MOST_UNDO) this.before.shift();
  }

  undo() {
    const last = this.before.pop();
    if (last) [this.pixels, this.mask, this.original] = last;
    this.version += 1;
    this.show();
    this.changed();
  }

  /** Take away all that was drawn. */
  clear() {
    this.remember();
    this.pixels = this.original.slice();
    this.mask = new Uint8Array(this.mask.length);
    this.show();
    this.changed();
  }

  show() {
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(this.width, this.height);
    for (let pixel = 0; pixel < this.width * this.height; pixel++) {
      const isMasked = this.draws === "mask" && this.mask[pixel];
      for (let channel = 0; channel < 3; channel++) {
        const from = this.channels === 3 ? channel : 0;
        const value = this.pixels[pixel * this.channels + from];
        image.data[4 * pixel + channel] = isMasked ? 0.35 * value + 0.65 * MASK[channel] : value;
      }
      image.data[4 * pixel + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    this.edges = this.draws === "mask" ? this.edgesOfMask() : new Path2D();
    this.outline(this.at_);
  }

  /** The border of the mask: its colour alone may be that of the picture. */
  edgesOfMask() {
    const path = new Path2D();
    const { width, height, mask } = this;
    const has = (x, y) => x >= 0 && y >= 0 && x < width && y < height && mask[y * width + x] > 0;
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        if (!has(x, y)) continue;
        if (!has(x - 1, y)) { path.moveTo(x, y); path.lineTo(x, y + 1); }
        if (!has(x + 1, y)) { path.moveTo(x + 1, y); path.lineTo(x + 1, y + 1); }
        if (!has(x, y - 1)) { path.moveTo(x, y); path.lineTo(x + 1, y); }
        if (!has(x, y + 1)) { path.moveTo(x, y + 1); path.lineTo(x + 1, y + 1); }
      }
    }
    return path;
  }

  /** Show the edges of the mask, and of the brush at a place, or nowhere. */
  outline(at) {
    this.at_ = at;
    const box = this.canvas.getBoundingClientRect();
    const scale = box.width / this.width;
    this.brush.width = Math.round(box.width);
    this.brush.height = Math.round(box.height);
    const context = this.brush.getContext("2d");
    const lines = new Path2D();
    lines.addPath(this.edges, new DOMMatrix([scale, 0, 0, scale, 0, 0]));
    if (at && this.draws) {
      const reach = Math.max(0.5, this.size / 2) * scale;
      const round = new Path2D();
      round.arc(at[0] * scale, at[1] * scale, reach, 0, 2 * Math.PI);
      lines.addPath(round);
    }
    for (const [colour, width] of [["#fff", 3], ["#000", 1]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.stroke(lines);
    }
  }
}
