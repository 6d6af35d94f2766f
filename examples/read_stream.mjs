// Reads events from a stream with Node and its package redis (npm install redis).
//
//     node examples/read_stream.mjs redis://localhost:6379 events:user my-group [seconds]
//
// Prints each event as a line of JSON, acknowledges it, and ends when the group has read the whole
// stream and nothing new has come for so many seconds (0).

import process from "node:process";
import { createClient } from "redis";

// Each process of a group has a name of its own, which stays the same when it is started again.
const NAME = "node";

const [url, stream, group, seconds = "0"] = process.argv.slice(2);
const wait = Number(seconds) * 1000;

// Longer than the wait for an entry: a connection that is given up before would be opened again, and
// what the server then sends to the old one is lost until the next start.
const client = createClient({ url, socket: { socketTimeout: wait + 5000 } });
client.on("error", (error) => console.error(error.message));
await client.connect();
try {
  await client.sendCommand(["XGROUP", "CREATE", stream, group, "0", "MKSTREAM"]);
} catch (error) {
  if (!error.message.includes("BUSYGROUP")) throw error;
}

// First what this consumer was given and has not acknowledged, when it ended before that.
let after = "0";
for (;;) {
  const entries = await read(after);
  if (entries.length === 0 && after === ">") break;
  for (const [entry, fields] of entries) {
    // An entry with the field `group` is for that group alone; one without fields was deleted.
    if (fields && (fields.group ?? group) === group) handle(fields);
    await client.sendCommand(["XACK", stream, group, entry]);
  }
  if (after !== ">") after = entries.at(-1)?.[0] ?? ">";
}
await client.close();

async function read(id) {
  const block = id === ">" && wait > 0 ? ["BLOCK", String(wait)] : [];
  const words = ["XREADGROUP", "GROUP", group, NAME, "COUNT", "100", ...block, "STREAMS", stream, id];
  const answer = await client.sendCommand(words);
  // A list of streams or, in the newer protocol, an object or a map of them.
  const streams = answer instanceof Map ? [...answer] : Array.isArray(answer) ? answer : Object.entries(answer ?? {});
  const entries = streams[0]?.[1] ?? [];
  return entries.map(([entry, values]) => [entry, values && pairs(values)]);
}

function pairs(values) {
  const fields = {};
  for (let at = 0; at + 1 < values.length; at += 2) fields[values[at]] = values[at + 1];
  return Object.keys(fields).length > 0 ? fields : undefined;
}

function handle(fields) {
  const { id, type, aggregate_type, aggregate_id, occurred_at, payload, headers = "{}" } = fields;
  const parsed = { payload: JSON.parse(payload), headers: JSON.parse(headers) };
  console.log(JSON.stringify({ id, type, aggregate_type, aggregate_id, occurred_at, ...parsed }));
}
