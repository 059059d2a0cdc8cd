// One answer on the page: its completions as they grow. Text only ever becomes text nodes.

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

export class Turn {
  /** `prompt`: shown before each completion, as what it goes on from. */
  constructor(title, prompt = "") {
    this.element = element("article", "turn streaming");
    if (title) this.element.append(element("h3", "", title));
    this.prompt = prompt;
    this.choices = [];
    this.usage = null;
    this.numChunks = 0;
    this.startTime = 0;
    this.firstTime = null;
    this.lastTime = null;
    this.endReasons = [];
    this.choice(0);
  }

  /** What somebody said, complete. */
  static said(title, text) {
    const turn = element("article", "turn user");
    turn.append(element("h3", "", title), element("p", "text", text));
    return turn;
  }

  get firstText() {
    return this.choices[0].node.data;
  }

  get isEmpty() {
    return this.choices.every((choice) => choice.node.data === "");
  }

  choice(idx) {
    while (this.choices.length <= idx) {
      const block = element("div", "choice");
      const text = element("p", "text");
      if (this.prompt) text.append(element("span", "prompt-text", this.prompt));
      const node = document.createTextNode("");
      text.append(node);
      block.append(text);
      this.element.append(block);
      this.choices.push({ node });
    }
    return this.choices[idx];
  }

  add(idx, text, endReason) {
    if (endReason) this.endReasons.push(endReason);
    const choice = this.choice(idx);
    if (!text) return;
    this.lastTime = performance.now();
    this.firstTime ??= this.lastTime;
    this.numChunks += 1;
    choice.node.appendData(text);
  }

  end(usageText) {
    this.element.classList.remove("streaming");
    if (usageText) this.element.append(element("p", "usage", usageText));
  }
}
