// The page: its two tabs, and what their controls ask the server for.

import { Easel } from "./easel.js";
import { ask, byId, command, fromBase64, latest, make, picture, png, saving, tell, toBase64 } from "./parts.js";

const about = await ask("about").catch((error) => tell(error.message, true));
if (about) start();

function start() {
  byId("model").textContent = about.model;
  const place = (text) => (byId("place").textContent = text);
  const easel = new Easel(byId("canvas"), byId("brush"), about, place);
  const size = `${about.width} by ${about.height} pixels`;
  byId("canvas").setAttribute("aria-label", `The picture, ${size}, to draw on`);
  prepareTabs();
  prepareClasses();
  const edit = prepareEdits(easel);
  preparePictures(easel);
  prepareBrush(easel);
  const levels = prepareLevels();
  prepareSamples(easel, levels);
  prepareMorph(levels);
  edit.choose("inpaint");
  byId("example").click();
}

function prepareTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const choose = (chosen) => {
    for (const tab of tabs) {
      const isChosen = tab === chosen;
      tab.setAttribute("aria-selected", isChosen);
      tab.tabIndex = isChosen ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = !isChosen;
    }
  };
  for (const tab of tabs) {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      const other = tabs[(tabs.indexOf(tab) + 1) % tabs.length];
      other.focus();
      choose(other);
    });
  }
}

function prepareClasses() {
  const rows = [...document.querySelectorAll(".class-row")];
  for (const row of rows) {
    row.hidden = about.classes.length === 0;
    const isEdit = row.querySelector("select").id === "edit-class";
    const any = isEdit ? "that fits best" : "of each seed";
    const options = [["", any], ...about.classes.entries()];
    for (const [value, text] of options) {
      row.querySelector("select").append(make("option", { value }, text));
    }
  }
}

/** Return the number in a field, between its ends; whatever was typed. */
function number(id) {
  const field = byId(id);
  const value = Number(field.value);
  const [low, high] = [Number(field.min), Number(field.max)];
  const isNumber = field.value !== "" && Number.isFinite(value);
  const kept = isNumber ? Math.min(high, Math.max(low, value)) : Number(field.defaultValue || low);
  const isWhole = field.step === "" || Number.isInteger(Number(field.step));
  field.value = isWhole ? Math.round(kept) : kept;
  return Number(field.value);
}

const label = (id) => (byId(id).value === "" ? null : Number(byId(id).value));

function prepareEdits(easel) {
  let chosen = "";
  const choose = (name) => {
    chosen = name;
    const row = about.edits[name];
    document.querySelector(`input[name=edit][value=${name}]`).checked = true;
    byId("edit-help").textContent = row.help;
    const { amount } = row;
    byId("amount-row").hidden = !amount;
    byId("auto-row").hidden = !amount?.mayBeLeftOut;
    byId("steps-row").hidden = !row.hasSteps;
    byId("variations-row").hidden = !row.hasVariations;
    byId("colour-label").hidden = row.draws !== "paint";
    byId("save-mask").hidden = row.draws !== "mask";
    if (amount) {
      byId("amount-label").textContent = amount.label;
      const { low: min, high: max, step, start } = amount;
      Object.assign(byId("amount"), { min, max, step, value: start, defaultValue: start });
      const options = amount.choices.map((value) => make("option", { value }, String(value)));
      byId("amount-choice").replaceChildren(...options);
      byId("amount").hidden = amount.choices.length > 0;
      byId("amount-choice").hidden = amount.choices.length === 0;
    }
    byId("amount").disabled = Boolean(amount?.mayBeLeftOut) && byId("auto").checked;
    easel.draws = row.draws;
    byId("easel").classList.toggle("draws", Boolean(row.draws));
    easel.show();
    byId("answers").replaceChildren();
  };
  for (const [value, { title }] of Object.entries(about.edits)) {
    const input = make("input", { type: "radio", name: "edit", value });
    input.addEventListener("change", () => choose(value));
    byId("edits").append(make("label", {}, input, title));
  }
  byId("auto").addEventListener("change", () => {
    byId("amount").disabled = byId("auto").checked;
  });
  let stop = new AbortController();
  byId("cancel").addEventListener("click", () => stop.abort());
  const amountOf = ({ amount }) => {
    if (!amount || (amount.mayBeLeftOut && byId("auto").checked)) return null;
    return amount.choices.length ? Number(byId("amount-choice").value) : number("amount");
  };
  const run = latest(byId("answers"), async () => {
    const [name, version, row] = [chosen, easel.version, about.edits[chosen]];
    const asked = {
      edit: name,
      picture: toBase64(easel.pixels),
      mask: row.draws === "mask" ? toBase64(easel.mask) : null,
      amount: amountOf(row),
      steps: row.hasSteps ? [1, number("steps")] : [null],
      seed: number("seed"),
      variations: number("variations"),
      label: label("edit-class"),
    };
    stop = new AbortController();
    byId("cancel").disabled = false;
    const made = await ask("edit", asked, stop.signal).finally(() => (byId("cancel").disabled = true));
    if (chosen !== name || easel.version !== version) return "The answer is not shown: you went on.";
    showAnswers(made, name);
    return `Done in ${made.answers.map(({ seconds }) => `${seconds.toFixed(2)} s`).join(" and ")}.`;
  });
  byId("edit-form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  return { choose };
}

function showAnswers(made, name) {
  const figures = made.answers.map((answer) => {
    const steps = answer.steps === 1 ? "One step" : `${answer.steps} steps`;
    const of = answer.label === null ? "" : `, class ${about.classes[answer.label]}`;
    const caption = `${steps}${of}, ${answer.seconds.toFixed(2)} s`;
    const shown = picture(answer.png, `Answer of ${name}: ${caption}`, 128);
    shown.className = "answer";
    const way = make("div", { className: "way" });
    if (answer.way.length > 1) {
      for (const { sigma, png: step } of answer.way) {
        const text = `noise ${sigma}`;
        way.append(make("figure", {}, picture(step, `Answer at ${text}`), make("figcaption", {}, text)));
      }
    }
    const parts = [make("figcaption", {}, caption), shown, way];
    return make("figure", {}, ...parts, saving(answer.png, answer.name), command(answer.command));
  });
  const files = Object.keys(made.files);
  const them = files.length > 1 ? "them" : "it";
  const beside = `The commands read ${files.join(" and ")}: save ${them}, and type the command in that folder.`;
  const saved = Object.entries(made.files).map(([file, content]) => saving(content, file));
  const seen = make("figure", {}, make("figcaption", {}, "What the model saw"), picture(made.seen, "What the model saw", 64));
  byId("answers").replaceChildren(
    ...figures, seen, make("div", {}, make("p", { className: "note" }, beside), make("div", { className: "row" }, ...saved)),
  );
}

function preparePictures(easel) {
  let wanted = null;
  let next = Math.floor(Math.random() * about.examples);
  const take = latest(byId("easel"), async () => {
    const found = await wanted();
    easel.load(fromBase64(found.pixels), isSpoiled);
    byId("answers").replaceChildren();
    return "";
  });
  let isSpoiled = false;
  let spoils = 0;
  const load = (work, spoiled = false) => {
    wanted = work;
    isSpoiled = spoiled;
    take();
  };
  const open = (file) => file && load(() => ask(`picture?fit=${byId("fit").value}`, file));
  byId("file").addEventListener("change", () => {
    open(byId("file").files[0]);
    byId("file").value = "";
  });
  byId("example").addEventListener("click", () => load(() => ask(`example/${next++}`)));
  const harm = (how, amount) => load(() => {
    const seed = number("seed") + spoils++; // other noise each time
    return ask("harm", { picture: toBase64(easel.pixels), how, amount, seed });
  }, true);
  byId("noise").addEventListener("click", () => harm("noise", 0.3));
  byId("blur").addEventListener("click", () => harm("blur", 1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    open(event.dataTransfer.files[0]);
  });
  for (const kind of ["dragenter", "dragleave", "drop"]) {
    document.addEventListener(kind, () => byId("easel").classList.toggle("over", kind === "dragenter"));
  }
  document.addEventListener("paste", (event) => open(event.clipboardData.files[0]));
  easel.changed = () => {
    const { width, height, channels } = easel;
    byId("save-picture").href = asPng(easel.pixels, width, height, channels);
    byId("save-mask").href = asPng(easel.mask, width, height, 1);
  };
}

function asPng(bytes, width, height, channels) {
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      image.data[4 * pixel + channel] = bytes[pixel * channels + (channels === 3 ? channel : 0)];
    }
    image.data[4 * pixel + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas.toDataURL("image/png");
}

function prepareBrush(easel) {
  const show = () => {
    byId("size").value = easel.size;
    byId("size-out").textContent = `${easel.size} px`;
    byId("erase").checked = easel.erases;
  };
  byId("size").max = Math.max(4, easel.width >> 1);
  byId("size").addEventListener("input", () => {
    easel.size = Number(byId("size").value);
    show();
  });
  byId("erase").addEventListener("change", () => (easel.erases = byId("erase").checked));
  byId("colour").addEventListener("input", () => {
    easel.colour = byId("colour").value.match(/\w\w/g).map((part) => parseInt(part, 16));
  });
  byId("undo").addEventListener("click", () => easel.undo());
  byId("clear").addEventListener("click", () => easel.clear());
  easel.onKeys = show;
  show();
}

/** Sliders of noise levels; return a function that gives the levels, from high to low. */
function prepareLevels() {
  const { sigmaMin, sigmaMax } = about;
  const toLevel = (place) => Number((sigmaMin * (sigmaMax / sigmaMin) ** (place / 1000)).toPrecision(4));
  const toPlace = (level) => (1000 * Math.log(level / sigmaMin)) / Math.log(sigmaMax / sigmaMin);
  let chosen = [];
  const build = (levels) => {
    chosen = [...levels];
    const rows = levels.map((level, index) => {
      const out = make("output", {}, String(level));
      const slider = make("input", { type: "range", min: 0, max: 1000, step: "any", value: toPlace(level) });
      slider.setAttribute("aria-label", `Level ${index + 1}`);
      slider.setAttribute("aria-valuetext", String(level));
      slider.addEventListener("input", () => {
        chosen[index] = Math.min(sigmaMax, toLevel(Number(slider.value)));
        out.textContent = String(chosen[index]);
        slider.setAttribute("aria-valuetext", out.textContent);
      });
      return make("label", {}, `Level ${index + 1}`, slider, out);
    });
    byId("levels").replaceChildren(...rows);
  };
  for (const levels of about.levels) {
    byId("levels-count").append(make("option", { value: levels.length }, String(levels.length)));
  }
  byId("levels-count").addEventListener("change", () => build(about.levels[byId("levels-count").selectedIndex]));
  build(about.levels[0]);
  return () => [...new Set(chosen)].sort((a, b) => b - a);
}

function prepareSamples(easel, levels) {
  const run = latest(byId("samples"), async () => {
    const first = number("first");
    const asked = { first, count: number("count"), sigmas: levels(), label: label("sample-class") };
    const made = await ask("samples", asked);
    const buttons = made.pictures.map((one, index) => {
      const of = made.labels === null ? "" : `, class ${about.classes[made.labels[index]]}`;
      const name = `Seed ${first + index}${of}`;
      const button = make("button", { type: "button", title: `${name}: edit it` }, picture(one.png, `${name}: edit it`));
      button.addEventListener("click", () => {
        easel.load(fromBase64(one.pixels));
        byId("tab-edit").click();
        byId("tab-edit").focus();
        tell(`${name} is on the easel.`);
      });
      return button;
    });
    byId("samples").replaceChildren(
      make("div", { className: "pictures" }, ...buttons), saving(made.grid, "grid.png"), command(made.command),
    );
    return `Drawn in ${made.seconds.toFixed(2)} s. Press a picture to edit it.`;
  });
  byId("sample-form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
}

function prepareMorph(levels) {
  const run = latest(byId("morphed"), async () => {
    const [begin, end, frames] = [number("morph-start"), number("morph-end"), number("frames")];
    const made = await ask("morph", { start: begin, end, frames, sigmas: levels(), label: label("sample-class") });
    const shown = picture(made.pictures[0].png, `From seed ${begin} to seed ${end}`, 160);
    const slider = make("input", { type: "range", min: 0, max: made.pictures.length - 1, value: 0 });
    slider.addEventListener("input", () => (shown.src = png(made.pictures[slider.value].png)));
    const strip = make("div", { className: "pictures" }, ...made.pictures.map((one, index) => picture(one.png, `Picture ${index + 1}`)));
    byId("morphed").replaceChildren(
      shown, make("label", {}, "On the way", slider), strip,
      saving(made.animation, "morph.webp", "image/webp"), command(made.command),
    );
    return "Done.";
  });
  byId("morph-form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
}
