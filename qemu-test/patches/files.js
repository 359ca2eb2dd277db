// Files in, files out, and errors that name them.
function check(ok, what) {
  if (!ok) throw new Error(`not so: ${what}`);
}
function failure(work) {
  try {
    work();
  } catch (error) {
    return error;
  }
  return undefined;
}
const vm = sup.vm();
try {
  check(vm.upload('some words') === 'file.txt', 'a name by the type');
  check(vm.cat('file.txt') === 'some words', 'what it holds');
  check(vm.upload('echo hello from $0\n', 'tools/hello.sh') === 'tools/hello.sh', 'a name of one’s own');
  check(vm.exec('sh tools/hello.sh') === 'hello from tools/hello.sh\n', 'a file to run');
  check(vm.exec("stat -c '%a %s' /workspace/file.txt") === '644 10\n', 'mode and size');
  vm.upload('{"a": 1}', '/tmp/deep/er/data.json');
  const data = vm.download('/tmp/deep/er/data.json');
  check(data instanceof SupFile && data.size === 8 && data.filename === 'data.json', 'a file comes back');
  check(vm.upload(data, 'copy.json') === 'copy.json' && vm.cat('copy.json') === '{"a": 1}', 'and goes in again');
  check(vm.upload(sup.file([0, 255, 10, 128]), 'bytes.bin') === 'bytes.bin', 'bytes');
  check(vm.exec('od -An -tx1 bytes.bin') === ' 00 ff 0a 80\n', 'every one of them');
  const missing = failure(() => vm.cat('no/such/file'));
  check(missing instanceof SupVMFileError && missing.code === 'ENOENT', 'a file that is not there');
  check(missing.path.endsWith('no/such/file'), 'named');
  check(failure(() => vm.download('/etc')) instanceof SupVMFileError, 'a directory is no file');
  check(failure(() => vm.upload('x', 'tools/')) instanceof SupVMError, 'a name that ends with a slash');
  return 'files: good';
} finally {
  vm.delete();
}
