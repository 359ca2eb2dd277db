// VMs and their sessions.

// A command and its options as the native functions take them.
function order(command, cwd, env) {
  const made = {};
  if (typeof command === 'string') made.shell = command.toWellFormed();
  else if (Array.isArray(command)) {
    if (command.length === 0) throw new TypeError('the command is an empty array');
    made.argv = Array.from(command, (part) => needString('every part of a command', part));
  } else throw new TypeError('a command is a string or an array of strings');
  if (cwd !== undefined && cwd !== null) made.cwd = needString('cwd', cwd);
  if (env !== undefined && env !== null) {
    if (typeof env !== 'object') throw new TypeError('env is an object');
    made.env = Object.entries(env).map(([key, value]) =>
      [checkKey(key), value === undefined || value === null ? null : String(value).toWellFormed()]);
  }
  return writeJson(made);
}
function checkKey(key) {
  needString('the name of an environment variable', key);
  if (key === '' || key.includes('=') || key.includes('\0')) {
    throw new TypeError(`${writeJson(key)} cannot be the name of an environment variable`);
  }
  return key;
}
function shownCommand(command) {
  const text = Array.isArray(command) ? command.join(' ') : String(command);
  return text.length > 200 ? `${text.slice(0, 200).toWellFormed()}…` : text;
}

class SupVM {
  #id; #url; #deleted = false;
  constructor(key, id, url) {
    needInside(key, 'SupVM');
    this.#id = id;
    this.#url = url;
  }
  #alive() {
    if (this.#deleted) throw new SupVMError(`${this.#id} was deleted`, 'VM_DELETED');
    return this.#id;
  }
  get id() { return this.#id; }
  get url() { return this.#url; }
  exec(command, options) {
    return failIfFailed(shownCommand(command), this.#run(command, options));
  }
  execResult(command, options) { return plainResult(this.#run(command, options)); }
  #run(command, options) {
    return call('exec', this.#alive(), order(command, options?.cwd, options?.env));
  }
  execStreaming(command, options) {
    const vm = this.#alive();
    const [id, failed] = call('start', vm, order(command, options?.cwd, options?.env));
    return new SupVMStreamHandle(INSIDE, { vm, id, failed: failed ?? undefined, command: shownCommand(command) });
  }
  upload(source, dest) { return this.uploadStreaming(source, dest).wait(); }
  uploadStreaming(source, dest) {
    const vm = this.#alive();
    if (dest === null) dest = undefined;
    if (dest !== undefined) needString('dest', dest);
    let id;
    if (typeof source === 'string') id = call('upload', vm, dest, 'string', source);
    else if (source instanceof SupMedia) id = call('upload', vm, dest, 'media', writeJson(mediaFacts(source)));
    else throw new TypeError('upload takes a string or a media object');
    return new SupFileUploadHandle(INSIDE, id, (path) => path);
  }
  download(path) { return this.downloadStreaming(path).wait(); }
  downloadStreaming(path) {
    const id = call('download', this.#alive(), needString('path', path));
    return new SupFileDownloadHandle(INSIDE, id, (facts) => makeMedia(readJson(facts)));
  }
  cat(path) { return call('cat', this.#alive(), needString('path', path)); }
  session() {
    this.#alive();
    return new SupVMSession(INSIDE, this, undefined, {});
  }
  delete() {
    if (this.#deleted) return;
    call('delete', this.#id);
    this.#deleted = true;
  }
  toJSON() { return { id: this.#id, url: this.#url }; }
}

// Joins and cleans paths by their text alone.
function resolvePath(base, path) {
  const parts = [];
  for (const part of (path.startsWith('/') ? path : `${base}/${path}`).split('/')) {
    if (part === '..') parts.pop();
    else if (part !== '' && part !== '.') parts.push(part);
  }
  return `/${parts.join('/')}`;
}

class SupVMSession {
  #vm; #cwd; #env;
  constructor(key, vm, cwd, env) {
    needInside(key, 'SupVMSession');
    this.#vm = vm;
    this.#cwd = cwd;
    this.#env = new Map(Object.entries(env));
  }
  static facts(key, session) {
    needInside(key, 'SupVMSession');
    return { vm: session.#vm, cwd: session.#cwd, env: Object.fromEntries(session.#env) };
  }
  cd(dir) {
    needString('a directory', dir);
    if (dir.includes('\0')) throw new TypeError('a directory cannot contain NUL');
    this.#cwd = resolvePath(this.#cwd ?? '/workspace', dir);
  }
  setEnv(key, value) {
    checkKey(key);
    // Unset stays known: the command is to run without the variable, whatever the default is.
    this.#env.set(key, value === undefined || value === null ? null : String(value));
  }
  get cwd() { return this.#cwd; }
  get env() {
    return Object.fromEntries([...this.#env].filter(([, value]) => value !== null));
  }
  #options() { return { cwd: this.#cwd, env: Object.fromEntries(this.#env) }; }
  exec(command) { return this.#vm.exec(command, this.#options()); }
  execResult(command) { return this.#vm.execResult(command, this.#options()); }
  execStreaming(command) { return this.#vm.execStreaming(command, this.#options()); }
}
