// A chat with a model of this gateway. All text of a model reaches the page by textContent alone.

const at = (id) => document.getElementById(id);
const chat = at("chat");
const numbers = ["temperature", "top_p", "max_tokens", "seed"];
let messages = []; // as the model is asked with
let running = null; // what stops the answer that is being made

function make(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

// What an answer that is none says of why.
async function complaint(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `status ${response.status}: ${text.slice(0, 200)}`;
  }
}

async function listModels() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await complaint(response));
    const before = at("model").value;
    // One that names its task is of batch inference, and does not chat.
    const names = (await response.json()).data.filter((own) => !own.task).map((own) => own.id);
    at("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === before)));
    notice(names.length ? "" : "No model here generates text.");
  } catch (error) {
    notice(`The models cannot be listed: ${error.message}`);
  }
}

// The fields of a body that the settings say. Throws where the tools are no JSON.
function settings() {
  const fields = {};
  for (const name of numbers) if (at(name).value !== "") fields[name] = Number(at(name).value);
  const tools = at("tools").value.trim();
  if (tools) {
    try {
      fields.tools = JSON.parse(tools);
    } catch (error) {
      throw new Error(`The tools are no JSON: ${error.message}`);
    }
  }
  return fields;
}

// A message as it is shown: its parts are made when there is something for them.
class Shown {
  constructor(role) {
    this.element = make("article", `message ${role}`);
    this.element.append(make("div", "who", role === "user" ? "You" : at("model").value));
    this.parts = new Map();
    chat.append(this.element);
  }

  part(name, title) {
    if (!this.parts.has(name)) {
      const text = make("div", "text", "");
      let holder = text;
      if (title !== undefined) {
        holder = make("details", `folded ${name.split(" ")[0]}`);
        holder.append(make("summary", "", title), text);
      }
      this.element.append(holder);
      this.parts.set(name, { text, holder });
    }
    return this.parts.get(name);
  }

  add(name, text, title) {
    const isAtEnd = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 40;
    this.part(name, title).text.append(text);
    if (isAtEnd) chat.scrollTop = chat.scrollHeight;
  }

  figures(text) {
    this.figuresLine ??= make("div", "figures", "");
    this.figuresLine.textContent = text;
    if (this.element.lastChild !== this.figuresLine) this.element.append(this.figuresLine);
  }

  fail(text) {
    this.element.append(make("div", "failed", text));
  }
}

// One answer in the making: what it says, and how fast.
class Answer {
  constructor(shown) {
    this.shown = shown;
    this.content = "";
    this.reasoning = "";
    this.calls = [];
    this.finishReason = null;
    this.tokens = 0;
    this.begin = performance.now();
    this.first = null; // when the first piece came
    this.firstTokens = 0; // that it had
    this.last = null;
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    const choice = chunk.choices?.[0];
    if (choice) {
      this.last = performance.now();
      this.finishReason = choice.finish_reason ?? this.finishReason;
      this.takeDelta(choice.delta ?? {});
    }
    this.tell();
  }

  takeDelta(delta) {
    const reasoning = delta.reasoning_content ?? delta.reasoning;
    if (this.first === null && (delta.content || reasoning || delta.tool_calls)) {
      this.first = this.last;
      this.firstTokens = this.tokens;
    }
    if (reasoning) {
      this.reasoning += reasoning;
      this.shown.add("reasoning", reasoning, "Reasoning");
    }
    if (delta.content) {
      this.content += delta.content;
      this.shown.add("content", delta.content);
    }
    for (const piece of delta.tool_calls ?? []) {
      const call = (this.calls[piece.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
      if (piece.id) call.id = piece.id;
      if (piece.function?.name) call.function.name = piece.function.name;
      const more = piece.function?.arguments ?? "";
      call.function.arguments += more;
      this.shown.add(`call ${piece.index}`, more, `Call of ${call.function.name}`);
    }
  }

  tell() {
    if (this.first === null) return;
    const unit = this.tokens === 1 ? "token" : "tokens";
    const parts = [`${this.tokens} ${unit}`, `first after ${Math.round(this.first - this.begin)} ms`];
    const [more, seconds] = [this.tokens - this.firstTokens, (this.last - this.first) / 1000];
    if (more > 0 && seconds > 0) parts.push(`${(more / seconds).toFixed(1)} tokens/s`);
    if (this.finishReason && this.finishReason !== "stop") parts.push(`ended by ${this.finishReason}`);
    this.shown.figures(parts.join(" · "));
  }

  message() {
    const calls = this.calls.filter(Boolean);
    return {
      role: "assistant",
      content: this.content || (calls.length ? null : ""),
      ...(this.reasoning ? { reasoning_content: this.reasoning } : {}),
      ...(calls.length ? { tool_calls: calls } : {}),
    };
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (part.startsWith("data:") && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// Ask for the next message, and show it as it comes. What was said up to a stop or a failure stays in the chat.
async function ask() {
  let fields;
  try {
    fields = settings();
  } catch (error) {
    notice(error.message);
    return;
  }
  const said = messages; // a new chat has others
  const system = at("system").value.trim();
  const asked = system ? [{ role: "system", content: system }, ...said] : said;
  const answer = new Answer(new Shown("assistant"));
  running = new AbortController();
  busy(true);
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        model: at("model").value,
        messages: asked,
        stream: true,
        stream_options: { include_usage: true, continuous_usage_stats: true },
        ...fields,
      }),
    });
    if (!response.ok) throw new Error(await complaint(response));
    for await (const chunk of events(response)) answer.take(chunk);
  } catch (error) {
    answer.shown.fail(error.name === "AbortError" ? "Stopped." : error.message);
  } finally {
    if (said === messages) {
      running = null;
      busy(false);
    }
  }
  const message = answer.message();
  if (message.content || message.tool_calls) said.push(message);
  if (message.tool_calls && said === messages) askForResults(answer.shown, message.tool_calls);
}

// A field for the result of each call; once all have one, the model goes on.
function askForResults(shown, calls) {
  const results = new Map();
  calls.forEach((call, number) => {
    const form = make("form", "result");
    const input = make("input", "");
    input.placeholder = `Result of ${call.function.name}`;
    input.setAttribute("aria-label", input.placeholder);
    form.append(input, make("button", "", "Answer"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (running) return;
      results.set(number, { role: "tool", tool_call_id: call.id, content: input.value });
      form.replaceChildren(make("div", "text", input.value));
      if (results.size < calls.length) return;
      for (let each = 0; each < calls.length; each++) messages.push(results.get(each));
      ask();
    });
    shown.element.append(form);
  });
}

function busy(isBusy) {
  at("send").disabled = isBusy;
  at("stop").hidden = !isBusy;
  chat.setAttribute("aria-busy", String(isBusy));
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value;
  if (!text.trim() || running) return;
  at("text").value = "";
  notice("");
  messages.push({ role: "user", content: text });
  new Shown("user").add("content", text);
  chat.scrollTop = chat.scrollHeight;
  ask();
});

at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});

at("stop").addEventListener("click", () => running?.abort());

at("new").addEventListener("click", () => {
  running?.abort();
  running = null;
  busy(false);
  messages = [];
  chat.replaceChildren();
  notice("");
  at("text").focus();
});

at("key").addEventListener("change", listModels);
listModels();
