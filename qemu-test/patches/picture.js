// A picture goes in, ImageMagick makes it smaller, and it comes out as the result.
const vm = sup.vm();
try {
  const path = vm.upload(sup.input.image);
  if (path !== 'image.png') throw new Error(`it was called ${path}`);
  sup.status('converting');
  vm.exec(['convert', path, '-resize', '48x32!', 'small.png']);
  console.log(vm.exec(['identify', '-format', '%wx%h', 'small.png']));
  const small = vm.download('small.png');
  if (!(small instanceof SupImage) || small.mimeType !== 'image/png') throw new Error(`it is ${small.mimeType}`);
  return small;
} finally {
  vm.delete();
}
