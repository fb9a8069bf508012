// Asks once with the `openai` package, and tells what came: {chunks}, {completion} or {models}, or an {error}.
//
// given: {url, body} and, where wanted, {how: "create" | "helper" | "models", retries, person: true, leaves: "after a
// chunk" | "before one"}. Who leaves stays alive behind it: it is the client that closes its request, not its end.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { given, tell } from "./harness.mjs";

const client = new OpenAI({ baseURL: `${given.url}/v1`, apiKey: "anything", maxRetries: given.retries ?? 0 });
const completions = client.chat.completions;
const Person = z.object({ name: z.string(), year: z.number().int() });
const body = given.person ? { ...given.body, response_format: zodResponseFormat(Person, "person") } : given.body;

const seen = {};
try {
  await ({ create, helper, models })[given.how ?? "create"]();
} catch (error) {
  seen.error = told(error);
}
tell(seen);
if (given.leaves) setTimeout(() => {}, 60_000);

async function create() {
  const leaving = new AbortController();
  if (given.leaves === "before one") setTimeout(() => leaving.abort(), 500);
  const { data, response, request_id } = await completions.create(body, { signal: leaving.signal }).withResponse();
  seen.requestId = request_id;
  seen.headers = Object.fromEntries(response.headers);
  if (!body.stream) {
    seen.completion = data;
    return;
  }
  seen.chunks = [];
  for await (const chunk of data) {
    seen.chunks.push(chunk);
    if (given.leaves === "after a chunk") break;
  }
}

// With what the package has for those who want the whole of an answer, parsed.
async function helper() {
  if (!body.stream) {
    seen.completion = await completions.parse(body);
    return;
  }
  const runner = completions.stream(body);
  seen.chunks = [];
  for await (const chunk of runner) seen.chunks.push(chunk);
  seen.completion = await runner.finalChatCompletion();
}

async function models() {
  seen.models = [];
  for await (const model of client.models.list()) seen.models.push(model);
}

function told(error) {
  const { status, code, type, param, message, requestID } = error;
  const headers = Object.fromEntries(error.headers ?? []);
  const isApiError = error instanceof OpenAI.APIError;
  return { name: error.constructor.name, isApiError, status, code, type, param, message, requestID, headers, body: error.error };
}
