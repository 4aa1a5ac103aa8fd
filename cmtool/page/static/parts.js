// Small parts of the page: elements, requests, pictures, commands.

export const byId = (id) => document.getElementById(id);

const TAB = crypto.randomUUID?.() ?? String(Math.random());

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A mistake that the server explains. */
export class Refused extends Error {
  constructor(what, hint, status) {
    super(hint ? `${what}. What to do: ${hint}.` : what);
    this.status = status;
  }
}

/** Ask the server; return its JSON. `content` is an object, a file, or nothing for GET. */
export async function ask(path, content, signal) {
  const headers = { "X-Tab": TAB };
  const options = { headers, signal };
  if (content !== undefined) {
    options.method = "POST";
    const isFile = content instanceof Blob;
    options.body = isFile ? content : JSON.stringify(content);
    headers["Content-Type"] = isFile ? "application/octet-stream" : "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    if (signal?.aborted) throw new Refused("Cancelled", "", 409);
    throw new Refused("the server does not answer", "look at the terminal where cmtool runs", 0);
  }
  const said = await response.json().catch(() => null);
  if (response.ok) return said;
  const what = said?.what ?? `the server failed (${response.status})`;
  throw new Refused(what, said?.hint ?? "look at the terminal where cmtool runs", response.status);
}

export function tell(text, isError = false) {
  const status = byId("status");
  status.textContent = text;
  status.classList.toggle("error", isError);
}

/** Return a function that runs `work` at most once at a time: the newest call waits, others go. */
export function latest(place, work) {
  let isRunning = false;
  let isWanted = false;
  return async function run() {
    isWanted = true;
    if (isRunning) return;
    isRunning = true;
    place.setAttribute("aria-busy", "true");
    while (isWanted) {
      isWanted = false;
      try {
        tell("Working...");
        tell((await work()) ?? "");
      } catch (error) {
        tell(error.message, error.status !== 409);
        if (!(error instanceof Refused)) console.error(error);
      }
    }
    place.setAttribute("aria-busy", "false");
    isRunning = false;
  };
}

export function toBase64(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

export const fromBase64 = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

export const png = (base64) => `data:image/png;base64,${base64}`;

/** A picture, each pixel several pixels of the screen. */
export function picture(base64, alt, least = 0) {
  const image = make("img", { src: png(base64), alt });
  if (least) {
    image.addEventListener("load", () => {
      const times = Math.max(1, Math.round(least / image.naturalHeight));
      image.width = image.naturalWidth * times;
    });
  }
  return image;
}

export function saving(base64, name, type = "image/png") {
  const href = `data:${type};base64,${base64}`;
  return make("a", { className: "button", href, download: name }, `Save ${name}`);
}

export function command(text) {
  const copy = make("button", { type: "button" }, "Copy");
  copy.setAttribute("aria-label", "Copy the command");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      tell("Copied.");
    } catch {
      getSelection().selectAllChildren(copy.previousSibling);
      tell("Marked: copy it with Ctrl+C.");
    }
  });
  return make("div", { className: "command" }, make("code", {}, text), copy);
}
