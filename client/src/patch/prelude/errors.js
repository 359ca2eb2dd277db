// Errors as patches see them, and the way there from what a native function throws.

// As they were before the script could put others in their places.
const { parse: readJson, stringify: writeJson } = JSON;

class SupVMError extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}
class SupVMFileError extends SupVMError {
  constructor(message, code, path) {
    super(message, code);
    this.path = path;
  }
}
class SupVMExecError extends Error {
  constructor(command, result) {
    const why = result.reason ?? `exit code ${result.exitCode}`;
    const last = result.output.trimEnd().slice(-2000).toWellFormed().split('\n').slice(-5).join('\n');
    super(`Command failed (${why}): ${command}${last ? `\n${last}` : ''}`);
    this.exitCode = result.exitCode;
    this.stdout = result.stdout;
    this.stderr = result.stderr;
    this.output = result.output;
    this.reason = result.reason;
  }
}
for (const one of [SupVMError, SupVMFileError, SupVMExecError]) {
  Object.defineProperty(one.prototype, 'name', { value: one.name, configurable: true, writable: true });
}

// Calls a native function; what it throws becomes an error with a stack.
function call(name, ...args) {
  try {
    return native[name](...args.map((one) => (typeof one === 'string' ? one.toWellFormed() : one)));
  } catch (thrown) {
    if (thrown === null || typeof thrown !== 'object' || thrown instanceof Error) throw thrown;
    switch (thrown.kind) {
      case 'file': throw new SupVMFileError(thrown.message, thrown.code, thrown.path);
      case 'vm': throw new SupVMError(thrown.message, thrown.code);
      default: throw new TypeError(thrown.message);
    }
  }
}

function needString(what, value) {
  if (typeof value !== 'string') {
    throw new TypeError(`${what} is a string, not ${value === null ? 'null' : typeof value}`);
  }
  // Half of a pair of surrogates is no character that could leave here.
  return value.toWellFormed();
}

// Objects of these classes come from `sup`, never from `new`.
const INSIDE = Symbol('inside');
function needInside(key, name) {
  if (key !== INSIDE) throw new TypeError(`${name} cannot be made with new: sup gives it`);
}
