// ffmpeg makes a sound and a film; each comes back as what it is. A picture is made of bytes.
const vm = sup.vm();
try {
  vm.exec('ffmpeg -loglevel error -f lavfi -i sine=frequency=440:duration=0.2 tone.wav');
  vm.exec('ffmpeg -loglevel error -f lavfi -i testsrc=duration=0.2:size=32x32:rate=10 film.mp4');
  const [tone, film] = [sup.audio(vm.download('tone.wav')), sup.video(vm.download('film.mp4'))];
  const dot = sup.image([0x89, 0x50, 0x4e, 0x47, 13, 10, 26, 10]);
  return [
    `${tone instanceof SupAudio} ${tone.mimeType.startsWith('audio/')}`,
    `${film instanceof SupVideo} ${film.mimeType}`,
    vm.upload(dot),
  ];
} finally {
  vm.delete();
}
