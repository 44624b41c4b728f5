// One model at work in onnxruntime-web: requests on stdin, answers on stdout.
//
// A message is four bytes (length of the header, little endian), the header in JSON, and the bytes of its tensors, in order.
// {op: "load", package, model, threads} | {op: "feed", tensors} | {op: "run"} | {op: "fetch"}, answered by a header with
// "error" in it where something failed. A tensor is {type, dims, bytes}.
import { readFileSync, readSync, writeSync } from "node:fs";
import { createRequire } from "node:module";

console.log = console.info = console.debug = console.error; // stdout is for messages

const ARRAYS = {
  float32: Float32Array, float64: Float64Array, float16: Uint16Array, int64: BigInt64Array, uint64: BigUint64Array,
  int32: Int32Array, uint32: Uint32Array, int16: Int16Array, uint16: Uint16Array, int8: Int8Array, uint8: Uint8Array,
  bool: Uint8Array,
};

let ort, session, feeds, results;

function receive(length) {
  const buffer = Buffer.alloc(length);
  for (let at = 0; at < length; ) {
    const count = readSync(0, buffer, at, length - at, null);
    if (count === 0) process.exit(0); // the other side has closed: the work is over
    at += count;
  }
  return buffer;
}

function send(header, payload = []) {
  const text = Buffer.from(JSON.stringify(header));
  const size = Buffer.alloc(4);
  size.writeUInt32LE(text.length);
  for (const part of [size, text, ...payload]) {
    for (let at = 0; at < part.length; ) at += writeSync(1, part, at, part.length - at);
  }
}

function tensor({ type, dims, bytes }) {
  const content = receive(bytes);
  const Kind = ARRAYS[type];
  return new ort.Tensor(type, new Kind(content.buffer, content.byteOffset, bytes / Kind.BYTES_PER_ELEMENT), dims);
}

async function load({ package: folder, model, threads }) {
  ort = createRequire(`${folder}/package.json`)("onnxruntime-web");
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = threads;
  session = await ort.InferenceSession.create(new Uint8Array(readFileSync(model)), { executionProviders: ["wasm"] });
  return { inputs: session.inputNames, outputs: session.outputNames };
}

async function answer(request) {
  if (request.op === "load") return send(await load(request));
  if (request.op === "feed") {
    const values = request.tensors.map(tensor); // all are read, whatever becomes of them
    feeds = Object.fromEntries(values.map((value, place) => [session.inputNames[place], value]));
    return send({});
  }
  if (request.op === "run") {
    results = await session.run(feeds);
    return send({});
  }
  const values = session.outputNames.map((name) => results[name]);
  const bytes = values.map(({ data }) => Buffer.from(data.buffer, data.byteOffset, data.byteLength));
  send({ tensors: values.map(({ type, dims }, place) => ({ type, dims, bytes: bytes[place].length })) }, bytes);
}

for (;;) {
  const request = JSON.parse(receive(receive(4).readUInt32LE(0)).toString());
  try {
    await answer(request);
  } catch (error) {
    send({ error: String((error && error.message) || error) });
  }
}
