// A session keeps a directory and variables.
function check(ok, what) {
  if (!ok) throw new Error(`not so: ${what}`);
}
function main() {
  const vm = sup.vm();
  try {
    const session = vm.session();
    check(session.cwd === undefined && Object.keys(session.env).length === 0, 'it begins with nothing');
    vm.exec('mkdir -p web/api');
    session.cd('web');
    session.cd('./api/../api');
    check(session.cwd === '/workspace/web/api', `where it is: ${session.cwd}`);
    check(session.exec('pwd') === '/workspace/web/api\n', 'where its commands are');
    session.setEnv('MODE', 'test');
    session.env.MODE = 'a copy';
    check(session.execResult('printf %s $MODE').output === 'test', 'its variables');
    check(session.execStreaming(['sh', '-c', 'echo $MODE; pwd']).block() === 'test\n/workspace/web/api\n', 'its streams');
    session.cd('/gone');
    const lost = session.execResult('true');
    check(lost.exitCode === 126 && lost.error === 'no such directory: /gone', 'a directory that is not there');
    try {
      session.setEnv('A=B', '1');
      check(false, 'a name with an equals sign');
    } catch (error) {
      check(error instanceof TypeError, 'is a TypeError');
    }
    return ['session:', 'good'];
  } finally {
    vm.delete();
  }
}
