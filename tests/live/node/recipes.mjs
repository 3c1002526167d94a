// What npm's clients make of the recipes that are written for them, as JSON.
//
//     npm ci; node recipes.mjs URL KEY
//
// Each asks for four answers: a whole one, one that it cancels, one that fails, and one
// that is cut; the words of the questions are those of apps/recipes_app.py. It says
// "read" when what comes before the cancel and the cut has been read, for a client may
// drop what it has not; and it cancels at a line of stdin.

import { once } from "node:events";

import { HttpAgent } from "@ag-ui/client";
import { Chat } from "@ai-sdk/react";
import { DefaultChatTransport } from "ai";

const [base, key] = process.argv.slice(2);
const QUESTIONS = {
  end: "a b c",
  cancel: "a b WAIT c",
  error: "a b FAIL c",
  cut: "a b GATE CUT c",
};

// @ag-ui/client 1.0.0 cancels its reader of a stream that was cut, and does not catch
// what that throws again.
process.on("unhandledRejection", (error) => {
  if (error.message !== "terminated") throw error;
});

const isTold = once(process.stdin, "data");
setTimeout(() => process.exit(2), 50_000).unref();

let unread = 4;

async function untilRead(hasRead) {
  while (!hasRead()) await new Promise((resolve) => setTimeout(resolve, 5));
  if (--unread === 0) console.log("read");
}

async function aiSDK(question, how) {
  const seen = {};
  const chat = new Chat({
    transport: new DefaultChatTransport({ api: `${base}/ai_sdk/api/chat` }),
    onFinish({ isAbort, isDisconnect, isError }) {
      Object.assign(seen, { isAbort, isDisconnect, isError });
    },
  });
  const text = () => chat.lastMessage?.parts.map(({ text }) => text).join("");
  const sent = chat.sendMessage({ text: question });
  if (how === "cancel" || how === "cut") await untilRead(() => text() === "ab");
  if (how === "cancel") {
    await isTold;
    await chat.stop();
  }
  await sent;
  return { ...seen, text: text(), status: chat.status, error: chat.error?.message };
}

async function agUI(question, how) {
  const seen = { events: [], text: "" };
  const agent = new HttpAgent({ url: `${base}/ag_ui/agent` });
  agent.addMessage({ id: "question", role: "user", content: question });
  const subscriber = {
    onEvent({ event }) {
      seen.events.push(event.type);
      if (event.type === "RUN_ERROR") seen.error = event.message;
      seen.text += event.delta ?? "";
    },
  };
  // It rejects only if the stream was cut.
  const run = agent
    .runAgent({}, subscriber)
    .catch(({ message }) => (seen.cut = message));
  if (how === "cancel" || how === "cut") await untilRead(() => seen.text === "ab");
  if (how === "cancel") {
    await isTold;
    agent.abortRun();
  }
  await run;
  const answer = agent.messages[1].content;
  return { ...seen, answer, isRunning: agent.isRunning };
}

const clients = { ag_ui: agUI, ai_sdk: aiSDK };
const runs = [];
for (const [name, ask] of Object.entries(clients)) {
  for (const [how, words] of Object.entries(QUESTIONS)) {
    const question = `${key}-${name}-${how} ${words}`;
    runs.push(ask(question, how).then((seen) => ({ name, how, seen })));
  }
}
console.log(JSON.stringify(await Promise.all(runs)));
