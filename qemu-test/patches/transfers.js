// Transfers that are watched, and ones that nobody waits for.
function check(ok, what) {
  if (!ok) throw new Error(`not so: ${what}`);
}
const rises = (numbers) => numbers.every((one, at) => Number.isInteger(one) && (at === 0 || one >= numbers[at - 1]));
const vm = sup.vm();
try {
  const text = 'a line of some length\n'.repeat(100_000);
  const up = vm.uploadStreaming(text, 'big.txt');
  const sent = [...up.progress()];
  check(rises(sent) && sent.at(-1) === 100, `per cent: ${sent}`);
  check(up.wait() === 'big.txt' && up.path === 'big.txt', 'its path');
  check(vm.exec('wc -c < big.txt').trim() === String(text.length), 'all of it');
  const down = vm.downloadStreaming('big.txt');
  const came = [...down.progress()];
  check(rises(came) && came.at(-1) === 100, `per cent: ${came}`);
  check(down.wait().size === text.length && down.result.filename === 'big.txt', 'what came');
  check(vm.downloadStreaming('big.txt').result.size === text.length, 'a result waits for itself');
  const background = vm.uploadStreaming('quiet', 'quiet.txt');
  vm.exec('true');
  check(vm.cat(background.path) === 'quiet', 'a transfer beside a command');
  return 'transfers: good';
} finally {
  vm.delete();
}
