// The global objects, and how a result is handed back.

function shownValue(value) {
  if (typeof value === 'string') return value;
  if (value instanceof Error) return value.stack ? `${value.name}: ${value.message}\n${value.stack.trimEnd()}` : String(value);
  if (typeof value === 'function') return `[function ${value.name || 'without a name'}]`;
  if (value === null || typeof value !== 'object') return String(value);
  const above = [];
  try {
    return writeJson(value, function (key, one) {
      while (above.length > 0 && above[above.length - 1] !== this) above.pop();
      if (typeof one === 'bigint') return String(one);
      if (typeof one === 'function') return `[function ${one.name}]`;
      if (one !== null && typeof one === 'object') {
        if (above.includes(one)) return '[itself]';
        above.push(one);
      }
      return one;
    });
  } catch {
    return Object.prototype.toString.call(value);
  }
}

// How deep a result is looked into.
const MAX_DEPTH = 50;

// The form that `show.rs` reads.
function described(value, above) {
  if (value === undefined || value === null) return { kind: 'nothing' };
  if (typeof value === 'string') return { kind: 'text', value: value.toWellFormed() };
  if (value instanceof SupMedia) return { kind: 'media', value: mediaFacts(value) };
  if (typeof value !== 'object') {
    const plain = typeof value === 'boolean' || Number.isFinite(value);
    return plain ? { kind: 'plain', value } : { kind: 'text', value: shownValue(value) };
  }
  if (value instanceof Error) return { kind: 'text', value: `${value.name}: ${value.message}` };
  if (value instanceof Date) return { kind: 'text', value: value.toISOString() };
  if (above.includes(value)) return { kind: 'text', value: '[itself]' };
  if (above.length >= MAX_DEPTH) return { kind: 'text', value: '[too deep]' };
  const within = [...above, value];
  if (Array.isArray(value)) {
    return { kind: 'list', value: Array.from(value, (one) => described(one, within)) };
  }
  const own = typeof value.toJSON === 'function' ? value.toJSON() : value;
  if (own === null || typeof own !== 'object') return described(own, within);
  const entries = Object.entries(own).filter(([, one]) => one !== undefined);
  return { kind: 'object', value: entries.map(([key, one]) => [key, described(one, within)]) };
}

const inputs = { texts: settings.input.texts };
for (const kind of Object.keys(MEDIA)) {
  inputs[`${kind}s`] = settings.input[`${kind}s`].map(makeMedia);
}
for (const kind of ['text', ...Object.keys(MEDIA)]) inputs[kind] = inputs[`${kind}s`][0];

const chat = makeScope('chat');
const sup = {
  vm() {
    const [id, url] = call('create');
    return new SupVM(INSIDE, id, url);
  },
  global: makeScope('global'),
  chat: Object.assign(chat, { id: settings.chat }),
  user: Object.assign(makeScope('user'), { id: settings.user }),
  get: (key) => chat.get(key),
  set: (key, value) => chat.set(key, value),
  input: inputs,
  image: (source) => mediaFrom('image', source),
  audio: (source) => mediaFrom('audio', source),
  video: (source) => mediaFrom('video', source),
  file: (source) => mediaFrom('file', source),
  status(text) { call('showStatus', shownValue(text)); },
  sleep(milliseconds) { call('sleep', Number(milliseconds)); },
};

const log = (...values) => call('log', values.map(shownValue).join(' '));
const console = { log, info: log, warn: log, error: log, debug: log };

const globals = {
  sup, console, SupVM, SupVMSession, SupVMStreamHandle, SupFileUploadHandle, SupFileDownloadHandle,
  SupVMError, SupVMExecError, SupVMFileError, SupImage, SupAudio, SupVideo, SupFile,
};
for (const [name, value] of Object.entries(globals)) {
  Object.defineProperty(globalThis, name, { value, writable: true, configurable: true });
}
// What is no VM cannot be made to look like one.
for (const one of [SupVM, SupVMSession, SupVMStreamHandle, Transfer, SupMedia, ...Object.values(globals)]) {
  if (typeof one === 'function') Object.freeze(one);
}
return { describe: (value) => writeJson(described(value, [])) };
