// The first run makes a VM and keeps it; the next one finds everything alive. A word as input says
// which run it is.
function check(ok, what) {
  if (!ok) throw new Error(`not so: ${what}`);
}
if (sup.input.text === 'first') {
  check(sup.global.get('vm') === null, 'nothing is kept yet');
  const vm = sup.vm();
  sup.global.set('vm', vm);
  const session = vm.session();
  session.setEnv('WHO', 'me');
  session.cd('/tmp');
  sup.global.set('session', session);
  sup.chat.set('count', 1);
  sup.set('handle', vm.execStreaming('echo started; read line; echo "heard $line"'));
  sup.user.set('notes', { list: [1, 'two', null], at: new Date(0) });
  return vm.id;
}
const vm = sup.global.get('vm');
check(vm.execResult('echo ok').exitCode === 0, 'the VM is well');
check(sup.global.get('session').exec('echo $WHO; pwd') === 'me\n/tmp\n', 'the session, too');
const handle = sup.chat.get('handle');
if (sup.input.text === 'second') {
  handle.sendStdin('this\n');
  check(handle.block() === 'started\nheard this\n', 'the process went on meanwhile');
  check(sup.get('handle').status.state === 'exited', 'and has ended');
  return vm.id;
}
// The VM was stopped in between, and was started by the first command above.
check(handle.blockResult().exitCode === 0 && handle.tail(1)[0] === 'heard this', 'its log is kept');
check(sup.user.get('notes').list[1] === 'two' && sup.user.get('notes').at instanceof Date, 'values');
check(sup.chat.keys().sort().join() === 'count,handle' && sup.chat.get('count') === 1, 'the chat');
check(sup.user.keys().join() === 'notes', 'the user');
check(sup.global.keys().sort().join() === 'session,vm' && sup.chat.id === 'qemu', 'keys');
vm.delete();
sup.global.set('vm', undefined);
sup.global.set('session', undefined);
check(sup.global.get('vm') === null && sup.global.keys().length === 0, 'they are gone');
return 'kept: good';
