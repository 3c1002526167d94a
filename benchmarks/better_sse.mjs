// better-sse's channel on node:http, one process: see handover.py.
//
//     node better_sse.mjs FD

import http from "node:http";
import { createRequire } from "node:module";

// By require, as it looks where NODE_PATH says.
const { createChannel, createSession } = createRequire(import.meta.url)("better-sse");
const channel = createChannel();

function payload(n, size) {
  const t = Number(process.hrtime.bigint());
  const least = `{"n":${n},"t":${t},"p":""}`.length;
  return { n, t, p: "x".repeat(Math.max(0, size - least)) };
}

async function publish(count, rate, size) {
  const start = performance.now();
  for (let n = 0; n < count; n++) {
    const pause = rate ? start + (n * 1000) / rate - performance.now() : 0;
    if (pause > 0) await new Promise((resolve) => setTimeout(resolve, pause));
    channel.broadcast(payload(n, size));
  }
}

http
  .createServer(async (request, response) => {
    const { pathname, searchParams } = new URL(request.url, "http://localhost");
    if (pathname === "/events") {
      channel.register(await createSession(request, response));
      return;
    }
    if (pathname === "/publish") {
      const [count, rate, size] = ["count", "rate", "size"].map((name) =>
        Number(searchParams.get(name)),
      );
      publish(count, rate, size);
    }
    response.end(
      JSON.stringify({ pid: process.pid, subscribers: channel.sessionCount }),
    );
  })
  .listen({ fd: Number(process.argv[2]) });
