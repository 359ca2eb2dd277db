// Values between runs. In the stored form an object with the key $sup stands for something that
// JSON cannot say; an object of the patch that has such a key itself is stored as its entries.

const TAG = '$sup';

function encode(value, path, above) {
  switch (typeof value) {
    case 'string': case 'boolean': return value;
    case 'number':
      return Number.isFinite(value) ? value : { [TAG]: 'number', value: String(value) };
    case 'bigint': return { [TAG]: 'bigint', value: String(value) };
    case 'undefined': return null;
    case 'object': break;
    default: throw new TypeError(`${path} is a ${typeof value} and cannot be stored`);
  }
  if (value === null) return null;
  if (value instanceof SupVM) return { [TAG]: 'vm', id: value.id, url: value.url };
  if (value instanceof SupVMSession) {
    const { vm, cwd, env } = SupVMSession.facts(INSIDE, value);
    return { [TAG]: 'session', vm: encode(vm), cwd, env: Object.entries(env) };
  }
  if (value instanceof SupVMStreamHandle) {
    return { [TAG]: 'stream', ...SupVMStreamHandle.facts(INSIDE, value) };
  }
  if (value instanceof SupMedia) {
    const { path: place, ...facts } = mediaFacts(value);
    return { [TAG]: 'media', ...facts, content: call('keepMedia', place) };
  }
  if (value instanceof Transfer) {
    throw new TypeError(`${path} is a transfer and cannot be stored: wait() for it and store what it gives`);
  }
  if (value instanceof Date) return { [TAG]: 'date', value: value.getTime() };
  if (value instanceof Map || value instanceof Set || value instanceof ArrayBuffer || ArrayBuffer.isView(value)) {
    throw new TypeError(`${path} is a ${value.constructor?.name} and cannot be stored: make an array of it`);
  }
  if (above.includes(value)) throw new TypeError(`${path} contains itself and cannot be stored`);
  const within = [...above, value];
  if (Array.isArray(value)) {
    return Array.from(value, (one, at) => encode(one, `${path}[${at}]`, within));
  }
  const entries = [];
  for (const key of Object.keys(value)) {
    if (value[key] !== undefined) entries.push([key, encode(value[key], `${path}.${key}`, within)]);
  }
  if (entries.some(([key]) => key === TAG)) return { [TAG]: 'object', entries };
  return Object.fromEntries(entries);
}

function decode(value) {
  if (value === null || typeof value !== 'object') return value;
  if (Array.isArray(value)) return value.map(decode);
  switch (value[TAG]) {
    case undefined: return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, decode(one)]));
    case 'object': return Object.fromEntries(value.entries.map(([key, one]) => [key, decode(one)]));
    case 'number': return Number(value.value);
    case 'bigint': return BigInt(value.value);
    case 'date': return new Date(value.value);
    case 'vm': return new SupVM(INSIDE, value.id, value.url);
    case 'session':
      return new SupVMSession(INSIDE, decode(value.vm), value.cwd, Object.fromEntries(value.env));
    case 'stream': return new SupVMStreamHandle(INSIDE, value);
    case 'media': {
      const { content, [TAG]: _, ...facts } = value;
      const path = call('keptMedia', content);
      // A content that had no address of its own is now where it is kept.
      const url = facts.url.startsWith('file:') ? `file://${path}` : facts.url;
      return makeMedia({ ...facts, url, path });
    }
    default: throw new SupVMError(`the store holds a ${value[TAG]}, which this sup does not know: update it`, 'STORE');
  }
}

function makeScope(name) {
  return {
    get(key) {
      const text = call('get', name, needString('a key', key));
      return text === undefined ? null : decode(readJson(text));
    },
    set(key, value) {
      needString('a key', key);
      call('set', name, key, value === undefined ? undefined : writeJson(encode(value, key, [])));
    },
    keys() { return call('keys', name); },
  };
}
