// The stream of page maps: one connection, made again after a drop, none while nobody looks.

import { readable, readEvents, request } from "./api.js";

const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 8000;
const SILENCE_MS = 20000; // the server says something every few seconds

/** Calls `onFrame` with each page map and `onState` with "lost", "refused", "starting", ... */
export function watch(path, { onFrame, onState }) {
  let controller = null;
  let wake = () => {};

  const pause = (milliseconds) =>
    new Promise((resolve) => {
      const timer = setTimeout(resolve, milliseconds);
      wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });

  async function connect() {
    controller = new AbortController();
    let silence = setTimeout(() => controller.abort(), SILENCE_MS);
    let hasFrames = false;
    try {
      const response = await request(path, { signal: controller.signal, cache: "no-store" });
      for await (const message of readEvents(response)) {
        clearTimeout(silence);
        silence = setTimeout(() => controller.abort(), SILENCE_MS);
        if (message === null) continue;
        hasFrames = true;
        const data = JSON.parse(message.data);
        if (message.event === "state") onState(data.state, data.detail ?? "");
        else onFrame(data);
      }
    } finally {
      clearTimeout(silence);
    }
    return hasFrames;
  }

  async function run() {
    let delay = FIRST_DELAY_MS;
    for (;;) {
      if (document.hidden) {
        await pause(2 ** 30);
        continue;
      }
      try {
        if (await connect()) delay = FIRST_DELAY_MS;
        onState("lost", "The stream ended.");
      } catch (error) {
        if (document.hidden) continue;
        const isRefused = error.status === 401 || error.status === 403;
        onState(isRefused ? "refused" : "lost", readable(error));
      }
      await pause(delay);
      delay = Math.min(delay * 2, LONGEST_DELAY_MS);
    }
  }

  const retry = () => {
    controller?.abort();
    wake();
  };
  document.addEventListener("visibilitychange", retry);
  addEventListener("online", retry);
  run();
  return { retry };
}
