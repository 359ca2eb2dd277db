// exec, execResult and what a failed command tells.
function check(ok, what) {
  if (!ok) throw new Error(`not so: ${what}`);
}
const vm = sup.vm();
try {
  check(/^vm-[a-z0-9]+$/.test(vm.id), `an id, not ${vm.id}`);
  check(/^https:\/\/[^/]+$/.test(vm.url), `an address, not ${vm.url}`);
  check(vm.exec('echo out; sleep 0.2; echo err >&2') === 'out\nerr\n', 'both outputs in one');
  check(vm.exec(['printf', '%s|', 'a b', '$HOME']) === 'a b|$HOME|', 'arguments as they are');
  check(vm.exec('pwd') === '/workspace\n', 'commands begin in /workspace');
  vm.exec('mkdir -p app/deep');
  check(vm.exec('pwd', { cwd: 'app' }) === '/workspace/app\n', 'a relative directory');
  check(vm.exec('echo $A-$B', { env: { A: 'one', B: 2 } }) === 'one-2\n', 'variables');
  const good = vm.execResult('echo o; echo e >&2');
  check(good.exitCode === 0 && good.stdout === 'o\n' && good.stderr === 'e\n' && !('error' in good), 'a good result');
  const bad = vm.execResult('echo no; exit 7');
  check(bad.exitCode === 7 && bad.output === 'no\n' && bad.error === 'Command failed', 'a bad result');
  check(vm.execResult(['no-such-program']).exitCode === 127, 'a program that is not there');
  check(vm.execResult('true', { cwd: '/nowhere' }).error === 'no such directory: /nowhere', 'a directory that is not there');
  try {
    vm.exec('echo some; echo words >&2; exit 3');
    check(false, 'exec throws');
  } catch (error) {
    check(error instanceof SupVMExecError && error instanceof Error, 'an error of its own class');
    check(error.exitCode === 3 && error.stdout === 'some\n' && error.stderr === 'words\n', 'what it carries');
    check(error.reason === undefined && error.message.includes('words'), 'what it says');
  }
  const killed = vm.execResult('kill -SEGV $$');
  check(killed.exitCode === 139 && killed.error === 'killed by signal SIGSEGV', 'a signal');
  return 'commands: good';
} finally {
  vm.delete();
}
