// What npm's eventsource makes of many streams, as JSON.
//
//     npm ci; node table.mjs URL NAMES COUNT
//
// It asks for URL + "0" and on, and listens for NAMES, a JSON list. A stream is over when
// the client says that it would reconnect.

import { EventSource } from "eventsource";

const [base, names, count] = process.argv.slice(2);

function read(url) {
  return new Promise((resolve) => {
    const events = [];
    const source = new EventSource(url);
    for (const name of JSON.parse(names)) {
      source.addEventListener(name, (event) => {
        if (event.data !== undefined) {
          events.push([event.type, event.data, event.lastEventId]);
        }
      });
    }
    source.addEventListener("error", (event) => {
      if (event.data === undefined) {
        source.close();
        resolve(events);
      }
    });
  });
}

const urls = Array.from({ length: count }, (_, number) => base + number);
console.log(JSON.stringify(await Promise.all(urls.map(read))));
process.exit(0);
