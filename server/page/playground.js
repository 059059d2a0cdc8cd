// The playground: chat and completion, streamed, with the server's errors in words.

import { readable, readEvents, request, ServerError } from "./api.js";
import { seconds } from "./format.js";
import { Turn } from "./turn.js";

const find = (id) => document.getElementById(id);
const EMPTY = {
  chat: "Talk to the model. Every token it writes takes memory on the right.",
  completion: "Write the beginning of a text, and the model goes on.",
};
const EXAMPLES = {
  chat: ["What is virtual memory?", "Write a haiku about page tables."],
  completion: ["def quicksort(items):", "class Stack:", "import os"],
};
const PLACEHOLDER = { chat: "Ask something", completion: "The beginning of a text" };
const END_WORDS = { length: "reached max tokens", abort: "aborted", error: "ended with an error" };

/** The number in a field, undefined where it is empty. */
function numberIn(id) {
  const text = find(id).value.trim();
  return text === "" ? undefined : Number(text);
}

export class Playground {
  /** `onResponse` hears the id of every response that begins. */
  constructor(onResponse) {
    this.onResponse = onResponse;
    this.hasChosenMode = false;
    this.history = []; // chat messages so far
    this.controller = null;
    this.output = find("output");
    find("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    find("settings-form").addEventListener("submit", (event) => event.preventDefault());
    find("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    find("stop").addEventListener("click", () => this.stop());
    find("clear").addEventListener("click", () => this.clear());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.controller) this.stop();
    });
    for (const input of document.querySelectorAll("input[name=mode]")) {
      input.addEventListener("change", () => {
        this.hasChosenMode = true;
        this.setMode();
      });
    }
    this.setMode();
  }

  get mode() {
    return document.querySelector("input[name=mode]:checked").value;
  }

  setMode() {
    this.stop();
    this.clear();
    const { mode } = this;
    document.body.classList.toggle("mode-completion", mode === "completion");
    this.output.classList.toggle("completion", mode === "completion");
    find("prompt").placeholder = PLACEHOLDER[mode];
    find("system-field").hidden = mode === "completion";
  }

  setModels(models) {
    const select = find("model");
    const chosen = select.value;
    select.replaceChildren(...models.map((model) => new Option(model, model, false, model === chosen)));
    // The bundled model goes on with Python code; it does not converse.
    if (models[0] === "demo" && !this.hasChosenMode && !this.output.firstElementChild?.matches(".turn")) {
      document.querySelector("input[name=mode][value=completion]").checked = true;
      this.setMode();
    }
    this.hasChosenMode = true;
  }

  clear() {
    this.stop();
    this.history = [];
    this.output.replaceChildren(this.makeExamples());
    this.showError("");
  }

  /** What an empty output says, and prompts to begin with. */
  makeExamples() {
    const box = document.createElement("div");
    box.className = "examples";
    const text = document.createElement("p");
    text.textContent = EMPTY[this.mode];
    box.append(text);
    for (const example of EXAMPLES[this.mode]) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = example;
      button.addEventListener("click", () => {
        find("prompt").value = example;
        find("prompt").focus();
        this.send();
      });
      box.append(button);
    }
    return box;
  }

  stop() {
    this.controller?.abort();
  }

  showError(text) {
    find("error").textContent = text;
    find("error").hidden = !text;
  }

  setBusy(isBusy) {
    const hadFocus = document.activeElement === find("stop");
    find("stop").hidden = !isBusy;
    find("send").disabled = isBusy;
    find("hint-idle").hidden = isBusy;
    find("hint-busy").hidden = !isBusy;
    this.output.setAttribute("aria-busy", String(isBusy));
    if (!isBusy && hadFocus) find("prompt").focus();
  }

  settings() {
    const settings = {
      stream: true,
      stream_options: { include_usage: true },
      model: find("model").value || undefined,
      n: numberIn("n"),
    };
    for (const name of ["max_tokens", "temperature", "top_p", "seed"]) settings[name] = numberIn(name);
    return settings;
  }

  /** Path and body of the request for `text`. */
  makeRequest(text) {
    if (this.mode === "completion") return ["v1/completions", { prompt: text, ...this.settings() }];
    const system = find("system").value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.history];
    return ["v1/chat/completions", { messages, ...this.settings() }];
  }

  async send() {
    const prompt = find("prompt");
    const text = prompt.value;
    if (this.controller || !text.trim()) return;
    const isChat = this.mode === "chat";
    if (isChat) this.history.push({ role: "user", content: text });
    const [path, body] = this.makeRequest(text);
    this.showError("");
    const asked = isChat ? Turn.said("You", text) : null;
    const turn = new Turn(isChat ? "Model" : "", isChat ? "" : text);
    if (!isChat || !this.history[1]) this.output.replaceChildren();
    this.append(...(asked ? [asked] : []), turn.element);
    if (isChat) prompt.value = "";
    this.setBusy(true);
    this.controller = new AbortController();
    try {
      await this.stream(path, body, turn);
      turn.end(this.usageText(turn));
    } catch (error) {
      this.fail(error, turn, text);
    } finally {
      this.controller = null;
      this.setBusy(false);
    }
    if (isChat) this.remember(turn);
  }

  async stream(path, body, turn) {
    const options = {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: this.controller.signal,
    };
    turn.startTime = performance.now();
    for await (const message of readEvents(await request(path, options))) {
      if (message === null) continue;
      if (message.data === "[DONE]") return;
      const chunk = JSON.parse(message.data);
      if (chunk.id) this.onResponse(chunk.id);
      if (chunk.error) throw new ServerError(Number(chunk.error.code) || 500, chunk.error.message);
      if (chunk.usage) turn.usage = chunk.usage;
      const isAtEnd = this.isAtEnd();
      for (const choice of chunk.choices ?? []) {
        turn.add(choice.index, choice.delta?.content ?? choice.text ?? "", choice.finish_reason);
      }
      if (isAtEnd) this.output.scrollTop = this.output.scrollHeight;
    }
    throw new ServerError(502, "The stream ended before the answer did.");
  }

  fail(error, turn, text) {
    if (error.name === "AbortError") {
      turn.end(`Stopped · ${this.usageText(turn)}`.replace(/ · $/, ""));
      return;
    }
    this.showError(readable(error));
    turn.end(this.usageText(turn));
    if (turn.isEmpty) {
      turn.element.remove();
      if (!find("prompt").value) find("prompt").value = text; // to correct and send again
      if (this.mode === "chat") this.output.lastElementChild?.remove();
      if (!this.output.children.length) this.output.append(this.makeExamples());
    }
  }

  /** Let the conversation go on from the first completion. */
  remember(turn) {
    if (turn.isEmpty) this.history.pop();
    else this.history.push({ role: "assistant", content: turn.firstText });
  }

  append(...elements) {
    this.output.append(...elements);
    this.output.scrollTop = this.output.scrollHeight;
  }

  isAtEnd() {
    const { scrollTop, clientHeight, scrollHeight } = this.output;
    return scrollTop + clientHeight > scrollHeight - 40;
  }

  usageText(turn) {
    const parts = [];
    const { usage } = turn;
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      parts.push(`${usage.prompt_tokens} prompt tokens${cached ? ` (${cached} cached)` : ""}`);
    }
    const written = usage?.completion_tokens ?? turn.numChunks;
    if (written) parts.push(`${usage ? "" : "about "}${written} written`);
    if (turn.firstTime !== null) {
      const span = (turn.lastTime - turn.firstTime) / 1000;
      if (span > 0 && written > 1) parts.push(`${((written - 1) / span).toFixed(1)} tokens/s`);
      parts.push(`first after ${seconds((turn.firstTime - turn.startTime) / 1000)}`);
    }
    const ends = [...new Set(turn.endReasons.map((reason) => END_WORDS[reason]).filter(Boolean))];
    return [...parts, ...ends].join(" · ");
  }
}
