// A process that goes on while the patch does something else.

// A process that was asked to end by kill() and ended well has not failed.
function failed({ exitCode, reason }) {
  return exitCode !== 0 || (reason !== undefined && reason !== 'killed');
}
function failIfFailed(command, result) {
  if (failed(result)) throw new SupVMExecError(command, result);
  return result.output;
}
function plainResult(result) {
  const { output, stdout, stderr, exitCode, reason, droppedBytes } = result;
  const plain = { output, stdout, stderr, exitCode };
  if (droppedBytes > 0) plain.droppedBytes = droppedBytes;
  if (failed(result)) plain.error = reason ?? 'Command failed';
  return plain;
}

class SupVMStreamHandle {
  #vm; #id; #command; #failed;
  constructor(key, facts) {
    needInside(key, 'SupVMStreamHandle');
    this.#vm = facts.vm;
    this.#id = facts.id;
    this.#command = facts.command;
    // Why the VM could not even try; then there is no process.
    this.#failed = facts.failed;
  }
  static facts(key, handle) {
    needInside(key, 'SupVMStreamHandle');
    return { vm: handle.#vm, id: handle.#id, command: handle.#command, failed: handle.#failed };
  }
  output() { return this.#read('output'); }
  stdout() { return this.#read('stdout'); }
  stderr() { return this.#read('stderr'); }
  *#read(which) {
    if (this.#failed !== undefined) return;
    const reader = call('openReader', this.#vm, this.#id, which);
    if (reader === undefined) return;
    try {
      for (;;) {
        const piece = call('read', reader);
        if (piece === undefined) return;
        yield piece;
      }
    } finally {
      native.closeReader(reader);
    }
  }
  sendStdin(text) {
    needString('what sendStdin() sends', text);
    this.#needProcess();
    call('sendStdin', this.#vm, this.#id, text);
  }
  sendEOF() {
    if (this.#failed === undefined) call('sendEOF', this.#vm, this.#id);
  }
  kill() {
    if (this.#failed === undefined) call('kill', this.#vm, this.#id);
  }
  block() { return failIfFailed(this.#command, this.#end()); }
  blockResult() { return plainResult(this.#end()); }
  get status() {
    if (this.#failed !== undefined) return { state: 'error', exitCode: 255 };
    return call('status', this.#vm, this.#id) ?? { state: 'running' };
  }
  tail(n) {
    const lines = Number(n);
    return this.#failed === undefined ? call('tail', this.#vm, this.#id, lines) : [];
  }
  #needProcess() {
    if (this.#failed !== undefined) throw new SupVMError(this.#failed, 'NOT_RUNNING');
  }
  #end() {
    if (this.#failed !== undefined) {
      return { output: '', stdout: '', stderr: '', exitCode: 255, reason: this.#failed };
    }
    return call('block', this.#vm, this.#id);
  }
}

class Transfer {
  #id; #make; #product;
  constructor(key, id, make) {
    needInside(key, new.target.name);
    this.#id = id;
    this.#make = make;
  }
  *progress() {
    for (let shown = -1; shown < 100;) {
      shown = call('progress', this.#id, shown);
      yield shown;
    }
  }
  wait() {
    this.#product ??= this.#make(call('wait', this.#id));
    return this.#product;
  }
}
class SupFileUploadHandle extends Transfer {
  get path() { return this.wait(); }
}
class SupFileDownloadHandle extends Transfer {
  get result() { return this.wait(); }
}
