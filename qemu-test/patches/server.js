// A web server that outlives the script; vm.url is where the world will find it.
const vm = sup.vm();
try {
  vm.upload('<h1>hello</h1>', 'index.html');
  const server = vm.execStreaming('python3 -m http.server 3000');
  let answer = { exitCode: 1 };
  for (let tries = 0; tries < 100 && answer.exitCode !== 0; tries += 1) {
    sup.sleep(200);
    answer = vm.execResult('curl -sf http://127.0.0.1:3000/');
  }
  if (answer.output !== '<h1>hello</h1>') throw new Error(JSON.stringify(answer));
  server.kill();
  if (server.status.state !== 'killed') throw new Error(server.status.state);
  return ['server: good', vm.url.startsWith('https://')];
} finally {
  vm.delete();
}
