// ffmpeg makes a sound and a film; each comes back as what it is.
const vm = sup.vm();
try {
  vm.exec('ffmpeg -loglevel error -f lavfi -i sine=frequency=440:duration=0.2 tone.wav');
  vm.exec('ffmpeg -loglevel error -f lavfi -i testsrc=duration=0.2:size=32x32:rate=10 film.mp4');
  const [tone, film] = [vm.download('tone.wav'), vm.download('film.mp4')];
  return [
    `${tone instanceof SupAudio} ${tone.mimeType.startsWith('audio/')}`,
    `${film instanceof SupVideo} ${film.mimeType}`,
  ];
} finally {
  vm.delete();
}
