// What the clients of Node make of the streams of apps/clients_app.py, as JSON.
//
//     npm ci; node clients.mjs URL
//
// For each client and path: its events, whether it saw a failure, and how it asked.

import { fetchEventSource } from "@microsoft/fetch-event-source";
import { EventSource } from "eventsource";
import { createParser } from "eventsource-parser";

const base = process.argv[2];

// eventsource's timer before it comes back keeps no process alive.
setInterval(() => {}, 1000);

// fetch-event-source wants a browser around it.
globalThis.window = globalThis;
globalThis.document = {
  hidden: false,
  addEventListener() {},
  removeEventListener() {},
};

function eventSource(url) {
  return new Promise((resolve) => {
    const seen = { events: [], retries: 0, failed: false };
    const source = new EventSource(url);
    const note = ({ type, data, lastEventId }) =>
      seen.events.push([type, data, lastEventId]);
    const end = () => {
      source.close();
      resolve(seen);
    };
    source.onmessage = note;
    source.addEventListener("end", (event) => {
      note(event);
      end();
    });
    source.onerror = ({ code }) => {
      if (source.readyState === EventSource.CLOSED) {
        seen.code = code; // it was told to stay away
        end();
      } else if (url.includes("fail")) {
        seen.failed = true;
        end();
      } else {
        seen.retries += 1;
      }
    };
  });
}

async function fetchSource(url) {
  const seen = { events: [], failed: false };
  const control = new AbortController();
  await fetchEventSource(url, {
    openWhenHidden: true,
    signal: control.signal,
    onmessage({ event, data, id }) {
      seen.events.push([event || "message", data, id]);
      if (event === "end") control.abort();
    },
    onerror(error) {
      throw error;
    },
  }).catch((error) => {
    seen.failed = true;
    seen.error = String(error);
  });
  return seen;
}

async function parser(url, headers = {}) {
  const seen = { events: [], failed: false };
  const control = new AbortController();
  const { feed } = createParser({
    onEvent({ event, data, id }) {
      seen.events.push([event ?? "message", data, id ?? ""]);
      if (event === "end") control.abort();
    },
  });
  try {
    const response = await fetch(url, { headers, signal: control.signal });
    const decoder = new TextDecoder();
    for await (const bytes of response.body) {
      feed(decoder.decode(bytes, { stream: true }));
    }
  } catch (error) {
    if (!control.signal.aborted) {
      seen.failed = true;
      seen.error = String(error);
    }
  }
  return seen;
}

// As many pages do it: whatever is between two blank lines is an event.
async function split(url) {
  const seen = { events: [], failed: false };
  let text = "";
  try {
    const decoder = new TextDecoder();
    for await (const bytes of (await fetch(url)).body) {
      text += decoder.decode(bytes, { stream: true });
    }
  } catch (error) {
    seen.failed = true;
    seen.error = String(error);
  }
  for (const block of text.split("\n\n")) {
    const found = block.match(/^(?:id: (.*)\n)?data: (.*)$/);
    if (found) seen.events.push(["message", found[2], found[1] ?? ""]);
  }
  return seen;
}

const clients = {
  eventsource: eventSource,
  "fetch-event-source": fetchSource,
  "eventsource-parser": parser,
  "eventsource-parser, by name": (url) =>
    parser(url, { accept: "text/event-stream" }),
  split,
};
const runs = [];
for (const [name, run] of Object.entries(clients)) {
  const paths = ["/plain/", "/plain/?fail=1"];
  if (run !== split) paths.push(`/channel/${encodeURIComponent(name)}`); // no end
  for (const path of paths) {
    const kind = path.startsWith("/channel") ? "/channel" : path;
    runs.push(run(base + path).then((seen) => ({ name, path: kind, ...seen })));
  }
}
console.log(JSON.stringify(await Promise.all(runs)));
process.exit(0);
