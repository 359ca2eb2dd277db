// An error that nobody catches.
function deeper() {
  throw new Error('on purpose');
}
console.log('before');
deeper();
