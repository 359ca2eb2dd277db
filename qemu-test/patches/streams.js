// execStreaming: output while it comes, input, signals, the end.
function check(ok, what) {
  if (!ok) throw new Error(`not so: ${what}`);
}
const vm = sup.vm();
try {
  const waiting = vm.execStreaming('echo ready; read answer; echo "got $answer"; echo aside >&2; exit 4');
  let first;
  for (const piece of waiting.output()) {
    first = piece;
    break;
  }
  check(first === 'ready\n', 'the first piece comes while the command waits');
  check(waiting.status.state === 'running' && waiting.status.exitCode === undefined, 'it runs');
  waiting.sendStdin('yes\n');
  const end = waiting.blockResult();
  check(end.exitCode === 4 && end.stdout === 'ready\ngot yes\n' && end.stderr === 'aside\n', 'its whole output');
  check(waiting.status.state === 'exited' && waiting.status.exitCode === 4, 'it has exited');
  check([...waiting.stdout()].join('') === 'ready\ngot yes\n', 'standard output again');
  check([...waiting.stderr()].join('') === 'aside\n', 'standard error again');
  try {
    waiting.block();
    check(false, 'block throws');
  } catch (error) {
    check(error instanceof SupVMExecError && error.exitCode === 4, 'block says how it ended');
  }
  const sum = vm.execStreaming('python3');
  sum.sendStdin('print(6 * 7)\n');
  sum.sendEOF();
  sum.sendEOF();
  check(sum.block() === '42\n', 'input to its end');
  const lines = vm.execStreaming('seq 1 100');
  lines.block();
  check(lines.tail(3).join() === '98,99,100' && lines.tail(0).length === 0, 'the last lines');
  const endless = vm.execStreaming('while :; do echo tick; sleep 0.1; done');
  for (const piece of endless.output()) {
    if (piece.includes('tick')) endless.kill();
  }
  check(endless.status.state === 'killed' && endless.status.exitCode === 143, 'killed in the midst of reading');
  const none = vm.execStreaming(['not-there-at-all']);
  check(none.blockResult().exitCode === 127 && none.status.state === 'error', 'what cannot start');
  return 'streams: good';
} finally {
  vm.delete();
}
