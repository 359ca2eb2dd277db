// What is left of a VM that was deleted.
const vm = sup.vm();
const other = vm.session();
sup.global.set('again', vm);
vm.delete();
vm.delete();
const lines = [];
try {
  vm.exec('true');
} catch (error) {
  lines.push(`${error instanceof SupVMError} ${error.code}`);
}
// An object of its own for the same VM has not been told.
const again = sup.global.get('again').execResult('echo ok');
lines.push(`${again.exitCode} ${again.error}`);
sup.global.set('again', undefined);
return lines;
