// Starts the page: theme, playground, memory, and the stream of page maps.

import { apiKey, getJson, readable } from "./api.js";
import { watch } from "./feed.js";
import { Memory } from "./memory.js";
import { Playground } from "./playground.js";
import { startTheme } from "./theme.js";

const STATES = {
  connecting: "Connecting",
  starting: "Starting",
  running: "Running",
  asleep: "Asleep",
  draining: "Draining",
  stopped: "Stopped",
  dead: "Engine failed",
  refused: "API key needed",
  lost: "Reconnecting",
};

const find = (id) => document.getElementById(id);

function showState(state, detail = "") {
  const status = find("status");
  if (status.dataset.state === state && status.title === detail) return;
  status.dataset.state = state;
  status.title = detail;
  find("status-text").textContent = STATES[state] ?? state;
}

async function loadModels(playground) {
  try {
    const models = (await getJson("v1/models")).data.map((model) => model.id);
    playground.setModels(models);
    find("model-name").textContent = models[0] ?? "";
  } catch (error) {
    if (error.status === 401) return showState("refused", readable(error));
  }
}

const memory = new Memory();
const playground = new Playground((id) => memory.setOwn(id));
startTheme(() => memory.redraw());

const feed = watch("page-map/events", {
  onFrame(frame) {
    showState(frame.map.is_asleep ? "asleep" : frame.state);
    if (find("model").options.length === 0) loadModels(playground);
    memory.show(frame);
  },
  onState: showState,
});

const keyField = find("api-key");
keyField.value = apiKey.get();
keyField.addEventListener("change", () => {
  apiKey.set(keyField.value.trim());
  loadModels(playground);
  feed.retry();
});

loadModels(playground);
